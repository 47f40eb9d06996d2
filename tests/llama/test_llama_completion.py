"""Completions: the same text as llama_cpp.Llama inside the window, and the pieces they are made of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import TEXT, MakeLlama

from lminf_edge import Llama, LMInfConfig
from lminf_edge.text.detokenizer import Detokenizer, StopScanner, partial_character, partial_stop
from lminf_edge.text.logprobs import TokenLogprobs, top_tokens

# after what it knows from no book, the model writes single bytes: that is for the tests of partial characters below
PROMPTS = ["Anna", TEXT[:240], "The 'late' ferry--", "\n\n", "Did you see"]

REQUESTS: list[dict[str, Any]] = [
    {},
    {"max_tokens": 1},
    {"stop": "."},
    {"stop": ["e, ", "the "]},
    {"echo": True},
    {"logprobs": 3},
    {"logprobs": 0},
    {"logprobs": 2, "echo": True},
    {"logit_bias": {5: 4.0, 77: -3.0}},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 1.0, "seed": 1, "repeat_penalty": 1.1, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.5, "seed": 1, "mirostat_mode": 2},
    # without tokens for a gap the model is lost, and would write single bytes
    {"suffix": " the end.", "logit_bias": dict.fromkeys(range(3, 259), -100.0)},
    {"grammar": llama_cpp.LlamaGrammar.from_string('root ::= "yes" | "no"', verbose=False)},
]


@pytest.fixture(scope="module")
def stock(nano_path: str) -> Iterator[llama_cpp.Llama]:
    llm = llama_cpp.Llama(nano_path, n_ctx=512, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def ours() -> Iterator[Llama]:
    # the same text to the last letter needs the same rounding: the fused attention has less of it
    lminf = LMInfConfig(attention="stock")
    llm = Llama("nano", lminf=lminf, verbose=False, n_threads=1, n_threads_batch=1)
    yield llm
    llm.close()


def comparable(response: dict[str, Any]) -> dict[str, Any]:
    """A response without what is different each time, and its logprobs rounded to what an f16 cache can give."""
    response = {key: value for key, value in response.items() if key not in ("id", "created", "model")}
    logprobs = response["choices"][0]["logprobs"]
    if logprobs:

        def rounded(value: Any) -> Any:
            return None if value is None else pytest.approx(float(value), abs=0.02)

        logprobs["token_logprobs"] = [rounded(value) for value in logprobs["token_logprobs"]]
        logprobs["top_logprobs"] = [
            top and {key: rounded(value) for key, value in top.items()} for top in logprobs["top_logprobs"]
        ]
    return response


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: ",".join(request) or "plain")
def test_same_response_as_llama_cpp(stock: llama_cpp.Llama, ours: Llama, request_: dict[str, Any]) -> None:
    arguments = {"temperature": 0.0, "max_tokens": 24, **request_}
    for prompt in PROMPTS:
        expected, response = stock(prompt, **arguments), ours(prompt, **arguments)
        assert comparable(response) == comparable(expected)
        json.dumps(response["id"])


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: ",".join(request) or "plain")
def test_same_stream_as_llama_cpp(stock: llama_cpp.Llama, ours: Llama, request_: dict[str, Any]) -> None:
    arguments = {"temperature": 0.0, "max_tokens": 24, "stream": True, **request_}
    for prompt in PROMPTS:
        # llama_cpp sends an empty chunk where a stop string was cut off
        expected = [comparable(chunk) for chunk in stock(prompt, **arguments)]
        expected = [chunk for chunk in expected[:-1] if chunk["choices"][0]["text"]] + expected[-1:]
        chunks = [comparable(chunk) for chunk in ours(prompt, **arguments)]
        assert [chunk for chunk in chunks[:-1] if chunk["choices"][0]["text"]] + chunks[-1:] == expected


@pytest.mark.parametrize("prompt", ["", *PROMPTS])
def test_streamed_text_is_the_text(ours: Llama, prompt: str) -> None:
    for arguments in ({"temperature": 0.0}, {"temperature": 1.2, "seed": 7}, {"stop": [" t", "\n"], "seed": 2}):
        whole = ours(prompt, max_tokens=40, **arguments)["choices"][0]
        chunks = [chunk["choices"][0] for chunk in ours(prompt, max_tokens=40, stream=True, **arguments)]
        assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
        assert chunks[-1]["finish_reason"] == whole["finish_reason"]
        assert all(chunk["finish_reason"] is None for chunk in chunks[:-1])


def test_empty_prompt(stock: llama_cpp.Llama, ours: Llama) -> None:
    arguments = {"temperature": 0.0, "max_tokens": 12}
    assert comparable(ours("", **arguments)) == comparable(stock("", **arguments))


def test_a_prompt_of_tokens(stock: llama_cpp.Llama, ours: Llama) -> None:
    prompt = stock.tokenize(TEXT.encode())[:50]
    arguments = {"temperature": 0.0, "max_tokens": 12}
    assert comparable(ours.create_completion(prompt, **arguments)) == comparable(
        stock.create_completion(prompt, **arguments)
    )


def test_chat_is_that_of_llama_cpp(stock: llama_cpp.Llama, ours: Llama) -> None:
    messages: Any = [{"role": "user", "content": "Who was late?"}]
    for arguments in ({}, {"logprobs": True, "top_logprobs": 2}):
        settings: Any = {"temperature": 0.0, "max_tokens": 20, **arguments}
        expected: Any = stock.create_chat_completion(messages, **settings)
        response: Any = ours.create_chat_completion(messages, **settings)
        assert response["choices"][0]["message"] == expected["choices"][0]["message"]
        assert response["choices"][0]["finish_reason"] == expected["choices"][0]["finish_reason"]
        assert response["usage"] == expected["usage"]


def test_chat_in_json(ours: Llama) -> None:
    """By llama.cpp's grammar, not llama_cpp's: its white space is another."""
    messages: Any = [{"role": "user", "content": "Who was late?"}]
    schema = {"type": "object", "properties": {"late": {"type": "boolean"}}, "required": ["late"]}
    response: Any = ours.create_chat_completion(
        messages, response_format={"type": "json_object", "schema": schema}, temperature=0.0, max_tokens=100
    )
    assert isinstance(json.loads(response["choices"][0]["message"]["content"])["late"], bool)


def test_chat_stream(ours: Llama) -> None:
    messages: Any = [{"role": "user", "content": "Who was late?"}]
    whole: Any = ours.create_chat_completion(messages, temperature=0.0, max_tokens=20)
    chunks: Any = list(ours.create_chat_completion(messages, temperature=0.0, max_tokens=20, stream=True))
    assert (
        "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        == (whole["choices"][0]["message"]["content"])
    )


def test_logprobs_can_be_written_as_json(ours: Llama) -> None:
    json.dumps(ours("Anna", max_tokens=4, logprobs=2))


def test_logit_bias_joins_logits_processors(ours: Llama) -> None:
    seen = []

    def watch(input_ids: Any, scores: Any) -> Any:
        seen.append(len(input_ids))
        return scores

    processors = llama_cpp.LogitsProcessorList([watch])
    response = ours("Anna", max_tokens=3, temperature=0.0, logits_processor=processors, logit_bias={300: 100.0})
    n_prompt = response["usage"]["prompt_tokens"]
    assert seen == [n_prompt, n_prompt + 1, n_prompt + 2]
    assert response["choices"][0]["text"].strip() == (ours.detokenize([300]).decode() * 3).strip()
    assert len(processors) == 1


def test_max_tokens_is_never_exceeded(ours: Llama) -> None:
    # the first byte of a three-byte character, again and again
    first_byte = ours.tokenize("日".encode(), add_bos=False)[-3]
    response = ours("Anna", max_tokens=5, temperature=0.0, logit_bias={first_byte: 1000.0})
    assert response["usage"]["completion_tokens"] == 5
    assert response["choices"][0]["text"] == ""


def test_stopping_criteria_see_tokens_and_logits(ours: Llama) -> None:
    calls = []

    def stop_at_five(input_ids: Any, logits: Any) -> bool:
        calls.append((len(input_ids), int(np.argmax(logits))))
        return len(calls) == 5

    criteria = llama_cpp.StoppingCriteriaList([stop_at_five])
    response = ours("Anna", max_tokens=20, temperature=0.0, stopping_criteria=criteria)
    n_prompt = response["usage"]["prompt_tokens"]
    assert [length for length, _ in calls] == [n_prompt + i for i in range(5)]
    assert response["usage"]["completion_tokens"] == 4
    assert response["choices"][0]["finish_reason"] == "stop"
    greedy = list(ours.tokenize(("Anna" + response["choices"][0]["text"]).encode()))[n_prompt:]
    assert [token for _, token in calls][: len(greedy)] == greedy


def test_end_of_text_stops(ours: Llama) -> None:
    response = ours("Anna", max_tokens=20, temperature=0.0, logit_bias={ours.token_eos(): 1000.0})
    assert response["choices"][0] == {"text": "", "index": 0, "logprobs": None, "finish_reason": "stop"}
    assert response["usage"]["completion_tokens"] == 0


def test_without_max_tokens_only_a_stop_ends_it(make_llama: MakeLlama) -> None:
    llm = make_llama()
    limit = 400

    def enough(input_ids: Any, logits: Any) -> bool:
        return len(input_ids) >= limit

    for max_tokens in (None, 0, -1):
        response = llm(
            "Anna", max_tokens=max_tokens, temperature=0.0, stopping_criteria=llama_cpp.StoppingCriteriaList([enough])
        )
        assert response["usage"]["total_tokens"] == limit


def test_two_bos_warn(ours: Llama) -> None:
    with pytest.warns(RuntimeWarning, match="twice"):
        ours("<s>Anna", max_tokens=1)


# --- the pieces -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", 0),
        (b"a", 0),
        ("é".encode(), 0),
        ("é".encode()[:1], 1),
        ("日".encode(), 0),
        ("日".encode()[:1], 1),
        (b"a" + "日".encode()[:2], 2),
        ("🙂".encode()[:3], 3),
        ("🙂".encode(), 0),
        (b"\x80\x80\x80\x80", 0),
        (b"\xe6a", 0),
        (b"\xe6\xe6", 1),
    ],
)
def test_partial_character(text: bytes, expected: int) -> None:
    assert partial_character(text) == expected


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        (b"abc", [], 0),
        (b"abc", [b"x"], 0),
        (b"abc", [b"cd"], 1),
        (b"abab", [b"ababc"], 4),
        (b"abab", [b"abac", b"bx"], 2),
        (b"###", [b"####"], 3),
        (b"", [b"ab"], 0),
    ],
)
def test_partial_stop(text: bytes, stops: list[bytes], expected: int) -> None:
    assert partial_stop(text, stops) == expected


def scan(pieces: list[bytes], stops: list[bytes]) -> tuple[list[list[str]], bool]:
    """What each piece releases, then what the end does."""
    scanner = StopScanner(stops)
    released = []
    for piece in pieces:
        released.append([part.text for part in scanner.push(piece, None)])
        if scanner.stopped:
            break
    released.append([part.text for part in scanner.flush()])
    return released, scanner.stopped


def test_scanner_lets_text_through_token_by_token() -> None:
    assert scan([b"a", b"bc", b"", b"d"], []) == ([["a"], ["bc"], [""], ["d"], []], False)


def test_scanner_waits_for_whole_characters() -> None:
    sun = "日".encode()
    assert scan([sun[:1], sun[1:2], sun[2:], b"a"], []) == ([[], [], ["日"], ["a"], []], False)
    assert scan([b"a" + sun[:2]], []) == ([[], ["a"]], False)


def test_scanner_does_not_wait_for_a_broken_character() -> None:
    assert scan([b"\xe6", b"a", b"b"], []) == ([[], ["a"], ["b"], []], False)


def test_scanner_stops_inside_a_token_and_across_tokens() -> None:
    assert scan([b"one. two"], [b". "]) == ([["one"], []], True)
    assert scan([b"one", b".", b" two"], [b". "]) == ([["one"], [], [], []], True)
    assert scan([b"a#", b"#", b"# b"], [b"###"]) == ([[], [], ["a"], []], True)


def test_scanner_releases_what_did_not_become_a_stop() -> None:
    assert scan([b"a", b"#", b"#", b"b"], [b"###"]) == ([["a"], [], [], ["#", "#", "b"], []], False)
    assert scan([b"a", b"#"], [b"###"]) == ([["a"], [], ["#"]], False)


def test_scanner_takes_the_earliest_stop() -> None:
    assert scan([b"one two three"], [b"three", b"two"]) == ([["one "], []], True)


def test_scanner_holds_no_more_than_a_stop_string() -> None:
    scanner = StopScanner([b"a" * 10])
    longest = 0
    for _ in range(1000):
        for piece in (b"aaa", b"b"):
            list(scanner.push(piece, None))
            longest = max(longest, sum(len(held.text) for held in scanner._held))
    assert longest < 10


def test_scanner_against_a_search_in_the_whole_text() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        text = bytes(rng.choice(list(b"ab."), size=rng.integers(0, 30)))
        cuts = np.sort(rng.integers(0, len(text) + 1, size=rng.integers(0, 12)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        stops = [bytes(rng.choice(list(b"ab."), size=rng.integers(1, 5))) for _ in range(rng.integers(0, 3))]
        found = [text.index(stop) for stop in stops if stop in text]
        released, stopped = scan(pieces, stops)
        assert stopped == bool(found)
        # a stop may be complete before an earlier, longer one is
        expected = text[: min(found)] if found else text
        got = "".join(part for parts in released for part in parts).encode()
        assert got == expected or (stopped and any((got + stop) in text for stop in stops))


def test_logprobs_travel_with_their_text() -> None:
    entries = [TokenLogprobs(str(i), i, -1.0, {}) for i in range(3)]
    scanner = StopScanner([])
    sun = "日".encode()
    parts = [
        part
        for piece, entry in zip([b"a", sun[:1], sun[1:]], entries, strict=True)
        for part in scanner.push(piece, entry)
    ]
    assert [(part.text, part.logprobs) for part in parts] == [("a", entries[:1]), ("日", entries[1:])]


def test_top_tokens_order() -> None:
    logprobs = np.array([-1.0, -0.5, -1.0, -3.0, -0.5], dtype=np.float32)
    expected = [i for _, i in sorted(zip(logprobs.tolist(), range(5), strict=True), reverse=True)]
    for n in range(7):
        assert top_tokens(logprobs, n).tolist() == expected[:n]


def test_detokenizer_agrees_with_detokenizing_everything(ours: Llama) -> None:
    tokens = ours.tokenize(TEXT.encode() + "日本🙂".encode(), add_bos=False)
    detokenizer = Detokenizer(ours, [], [])
    assert b"".join(map(detokenizer.piece, tokens)) == ours.detokenize(tokens)
    detokenizer = Detokenizer(ours, [], [ours.token_bos()])
    assert b"".join(map(detokenizer.piece, tokens)) == ours.detokenize([ours.token_bos(), *tokens])


def test_detokenizer_with_a_tokenizer_that_looks_back(ours: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["a", "b", "c"]

    class Spaced(llama_cpp.llama_tokenizer.BaseLlamaTokenizer):
        """Puts a space between tokens, as some tokenizers do, and so needs the tokens before."""

        def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
            raise AssertionError

        def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
            text = "_".join(words[token] for token in [*(prev_tokens or []), *tokens])
            return text[len("_".join(words[token] for token in prev_tokens or [])) :].encode()

    monkeypatch.setattr(ours, "tokenizer_", Spaced())
    detokenizer = Detokenizer(ours, [0], [])
    assert b"".join(map(detokenizer.piece, [1, 2] * 40)) == b"_b_c" * 40
