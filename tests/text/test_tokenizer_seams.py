"""A long text is tokenized in parts, and comes out as if it had been tokenized whole; parts are remembered."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import TEXT

from lminf_edge import Llama
from lminf_edge.engine.request import RequestCancelled
from lminf_edge.text import tokenizer as module
from lminf_edge.text.tokenizer import CachedTokenizer

PIECES = [
    *TEXT.split(" "),
    "",
    " ",
    "\n",
    "\n\n",
    "\t",
    "1234",
    "ö",
    "日本",
    "🙂",
    "<s>",
    "</s>",
    "<unk>",
    "e",
    "x\u2581y",
    ".",
]


@pytest.fixture(scope="module", params=["nano_path", "stories_path"])
def llm(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = Llama(request.getfixturevalue(request.param), vocab_only=True, verbose=False)
    yield made
    made.close()


def whole(llm: Any, text: str, add_bos: bool, special: bool) -> list[int]:
    """By llama_cpp's own way to the library."""
    tokens: list[int] = llm._model.tokenize(text.encode(), add_bos, special)
    return tokens


@pytest.mark.parametrize("seed", range(20))
def test_parts_are_as_the_whole(llm: Any, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(module, "_PART", 10)
    cached = CachedTokenizer(llm, None, 0)
    rng = random.Random(seed)
    text = "".join(rng.choice(PIECES) + rng.choice([" ", " ", " ", ""]) for _ in range(300))
    assert len(list(cached._parts(text))) > 20
    for add_bos in (False, True):
        for special in (False, True):
            assert cached.tokenize(text, add_bos, special).tolist() == whole(llm, text, add_bos, special)
            assert llm.tokenize(text.encode(), add_bos, special) == whole(llm, text, add_bos, special)


def test_short_texts(llm: Any) -> None:
    cached = CachedTokenizer(llm, None, 0)
    for text in ("", " ", "a", "<s>", "the sea"):
        for add_bos in (False, True):
            assert cached.tokenize(text, add_bos).tolist() == whole(llm, text, add_bos, True)
            assert llm.tokenize(text.encode(), add_bos, True) == whole(llm, text, add_bos, True)


def test_it_is_cancelled_between_two_parts(llm: Any) -> None:
    n_asked = 0

    def is_cancelled() -> bool:
        nonlocal n_asked
        n_asked += 1
        return n_asked > 3

    with pytest.raises(RequestCancelled):
        CachedTokenizer(llm, None, 0).tokenize("the sea was calm. " * 100_000, is_cancelled=is_cancelled)
    assert n_asked == 4


def test_of_a_text_too_large_to_be_remembered_the_beginning_is(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn costs what is too much, not all of it, and so does an answer that is remembered between them."""
    cached = CachedTokenizer(llm, "</s>", 40_000)
    asked: list[str] = []
    tokenize = cached.tokenize

    def counting(text: str, **more: Any) -> Any:
        asked.append(text)
        return tokenize(text, **more)

    monkeypatch.setattr(cached, "tokenize", counting)
    pieces = [f"</s>{i}: the sea was calm, and nobody on board had slept." for i in range(120)]
    expected = whole(llm, "".join(pieces), False, True)
    tokens, found, _ = cached.encode("".join(pieces), False)
    assert (tokens.tolist(), found) == (expected, pieces)
    assert asked == ["".join(pieces)]
    n_remembered = sum(piece in pieces for _, piece in cached._known)
    assert 40 < n_remembered < 100
    for turn in range(9):
        asked.clear()
        assert cached.encode("".join(pieces), False)[0].tolist() == expected
        assert len(asked) == 1
        assert asked[0] in "".join(pieces[n_remembered - 3 :])
        assert asked[0].count("</s>") <= 120 - n_remembered + 3  # some made room for an answer
        cached.remember_answer(pieces[-1], f" {turn}", cached.tokenize(f" {turn}"))
        assert cached.n_bytes <= 40_000
