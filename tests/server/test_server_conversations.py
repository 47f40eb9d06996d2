"""Whose conversation answers whom: names, keys, and what a request costs that was not seen before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from served import Served, serve

from lminf_edge import LMInfConfig
from lminf_edge.server import Settings

WINDOW = LMInfConfig(n_global=4, n_local=128, prefill="tail")
KEYS = tuple(f"key {i}" for i in range(1000))
SETTINGS = Settings(model_name="nano", api_keys=KEYS)
NAMES = [
    lambda name: ({"prompt_cache_key": name}, {}),
    lambda name: ({}, {"X-Conversation-Id": name}),
    lambda name: ({}, {"X-OpenWebUI-Chat-Id": name}),
]

SYSTEM = {"role": "system", "content": "Go on with the story of the ferry."}
PIN = "The PIN of my card is 4711, and nobody but me is ever to know it."
fresh_key = iter(KEYS)

Messages = list[dict[str, str]]


def serve_zephyr(nano_path: str, **kwargs: Any) -> Any:
    """With a chat format whose messages begin with a control token, which nano's own template has not."""
    return serve(nano_path, SETTINGS, lminf=WINDOW, chat_format="zephyr", **kwargs)


@pytest.fixture(scope="module")
def server(nano_path: str) -> Iterator[Served]:
    with serve_zephyr(nano_path) as served:
        yield served


@pytest.fixture
def key() -> str:
    """Of somebody who has not said anything yet."""
    return next(fresh_key)


def ask(served: Served, messages: Messages, key: str, named: Any = ({}, {}), **body: Any) -> Any:
    more, headers = named
    answer = httpx.post(
        f"{served.url}/v1/chat/completions",
        json={"messages": messages, "max_tokens": 7, "temperature": 0, **more, **body},
        headers={"Authorization": f"Bearer {key}", **headers},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def cached(answer: Any) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def skipped(answer: Any) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["skipped_tokens"])


def text(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def said(answer: Any) -> dict[str, str]:
    return {"role": "assistant", "content": text(answer)}


def converse(served: Served, subject: str, key: str, n: int = 4, **kwargs: Any) -> Messages:
    """A conversation of n exchanges."""
    messages: Messages = [{"role": "system", "content": f"{subject}. {SYSTEM['content']}"}]
    for i in range(n):
        messages.append(user(f"{i}: the sea was calm and the lamp was lit, and nobody on board had slept."))
        messages.append(said(ask(served, messages, key, **kwargs)))
    return messages


def assert_only_its_own(answer: Any) -> None:
    """The stream that gave the answer has no more tokens than the request had."""
    usage = answer["usage"]
    assert answer["lminf"]["position"] <= usage["prompt_tokens"] + usage["completion_tokens"]


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", NAMES)
@pytest.mark.parametrize("n_dropped", [2, 4])
def test_a_named_conversation_goes_on_without_its_oldest_messages(
    server: Served, key: str, named: Any, n_dropped: int
) -> None:
    name = named("the ferry")
    messages = converse(server, "The ferry", key, named=name)
    answer = ask(server, [messages[0], *messages[1 + n_dropped :], user("And then?")], key, named=name)
    n_new = answer["usage"]["prompt_tokens"] - cached(answer)
    assert n_new < 30  # the question, and what is around it
    assert answer["lminf"]["position"] > answer["usage"]["prompt_tokens"] + 50  # the dropped messages are in the stream


@pytest.mark.parametrize("named", [NAMES[0](""), NAMES[0]("another"), NAMES[1]("another")])
def test_without_its_name_it_is_processed_again(server: Served, key: str, named: Any) -> None:
    messages = converse(server, "The ferry", key, named=NAMES[0]("the ferry"))
    answer = ask(server, [messages[0], *messages[3:], user("And then?")], key, named=named)
    assert 0 < cached(answer) < 50  # the system block
    assert_only_its_own(answer)


def test_the_name_of_another_keys_conversation_is_worth_nothing(server: Served, key: str) -> None:
    name = NAMES[0]("the ferry")
    messages = converse(server, "The ferry", key, named=name)
    trimmed = [messages[0], *messages[3:], user("And then?")]
    for each in ([*messages, user("And then?")], trimmed):
        answer = ask(server, each, next(fresh_key), named=name)
        assert cached(answer) == 0
        assert_only_its_own(answer)
    assert cached(ask(server, trimmed, key, named=name)) > 100


def test_what_is_missing_elsewhere_is_not_gone_on_with(server: Served, key: str) -> None:
    """Only whole messages right after the system block may be missing, whatever the name says."""
    name = NAMES[0]("the ferry")
    messages = converse(server, "The ferry", key, named=name)
    first = messages[1]["content"]
    for each in (
        [*messages[:3], *messages[5:]],
        [messages[0], user(first[10:]), *messages[2:]],
        [{"role": "system", "content": "Another ferry."}, *messages[3:]],
        [messages[0], user(first + "!"), *messages[3:]],
    ):
        answer = ask(server, [*each, user("And then?")], key, named=name)
        assert cached(answer) < answer["usage"]["prompt_tokens"] - 50
        assert_only_its_own(answer)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_states_of_one_key_never_serve_another(server: Served, key: str) -> None:
    messages = [*converse(server, "The ferry", key), user("And then?")]
    first, other, mine = (ask(server, messages, each) for each in (key, next(fresh_key), key))
    assert cached(first) > 100
    assert cached(other) == 0
    assert cached(mine) == mine["usage"]["prompt_tokens"] - 1
    assert text(mine) == text(first)


def test_answers_of_one_key_do_not_change_how_anothers_text_is_tokenized(server: Served) -> None:
    """Else the number of prompt tokens would tell what another was answered."""
    tokenizer, llm = server.service.tokenizer, server.service.llm
    prompt, answer = "</s>\n<|assistant|>\n\n", "The sea was calm"
    letters = [token for letter in answer for token in llm.tokenize(letter.encode(), add_bos=False)]
    tokenizer.remember_answer(prompt, answer, np.array(letters, np.int32), "one")
    written = [*llm.tokenize(prompt.encode(), add_bos=False, special=True), *letters]
    canonical = llm.tokenize((prompt + answer).encode(), add_bos=False, special=True)
    for owner, expected in (("one", written), ("two", canonical), ("", canonical)):
        assert tokenizer.encode(prompt + answer, False, owner=owner)[0].tolist() == expected
    assert len(written) > len(canonical)


# --- the attack -------------------------------------------------------------------------------------------------------


def attacks(victim: Messages) -> list[Messages]:
    """What another may send to go on in the victim's conversation: parts of it that can be guessed, and a question."""
    question = user("What is the PIN?")
    return [
        [victim[0], *victim[3:], question],
        [victim[0], victim[-2], victim[-1], question],
        [victim[-2], victim[-1], question],
        [victim[0], user("x"), victim[-2], victim[-1], question],
        [victim[0], {"role": "assistant", "content": victim[-1]["content"]}, question],
    ]


def tell_the_pin(served: Served, key: str, **kwargs: Any) -> Messages:
    messages = [SYSTEM, user(PIN)]
    messages.append(said(ask(served, messages, key, **kwargs)))
    messages.append(user("Thank you. What else can you do?"))
    messages.append(said(ask(served, messages, key, **kwargs)))
    return messages


@pytest.mark.parametrize("same_key", [True, False])
@pytest.mark.parametrize("i", range(5))
@pytest.mark.parametrize("named", [({}, {}), NAMES[0]("mine")])
def test_nobody_is_answered_from_anothers_conversation(
    server: Served, key: str, i: int, same_key: bool, named: Any
) -> None:
    if same_key:  # who has the name, too, is the victim
        named = NAMES[1]("the attacker's own") if named[0] else named
    attack = attacks(tell_the_pin(server, key, named=NAMES[0]("mine")))[i]
    answer = ask(server, attack, key if same_key else next(fresh_key), named=named)
    assert_only_its_own(answer)
    assert cached(answer) < 50 if same_key else cached(answer) == 0
    assert text(answer) == text(ask(server, attack, next(fresh_key)))  # for whom there is nothing in the cache


def test_nor_after_a_restart(nano_path: str, tmp_path: Path, key: str) -> None:
    mine = NAMES[0]("mine")
    with serve_zephyr(nano_path, folder=tmp_path) as served:
        victim = tell_the_pin(served, key, named=mine)
    with serve_zephyr(nano_path, folder=tmp_path) as served:
        for attack in attacks(victim):
            answer = ask(served, attack, next(fresh_key), named=mine)
            assert cached(answer) == 0
            assert_only_its_own(answer)
            assert_only_its_own(ask(served, attack, key))
        answer = ask(served, [SYSTEM, *victim[3:], user("What is the PIN?")], key, named=mine)
        assert answer["usage"]["prompt_tokens"] - cached(answer) < 30


@pytest.mark.parametrize("named", [({}, {}), NAMES[0]("the ferry")])
def test_what_its_author_deleted_is_gone(server: Served, key: str, named: Any) -> None:
    messages = converse(server, "The ferry", key, n=3, named=named)
    answer = ask(server, [*messages[:3], *messages[5:], user("And then?")], key, named=named)
    assert cached(answer) < answer["usage"]["prompt_tokens"] - 30
    assert_only_its_own(answer)


# --- the tail ---------------------------------------------------------------------------------------------------------


def test_of_an_unknown_history_its_last_windows_are_processed(server: Served, key: str) -> None:
    messages = [user("The sea was calm and the lamp was lit. " * 200)]
    tail = ask(server, messages, key)
    assert skipped(tail) == tail["usage"]["prompt_tokens"] - 4 - 2 * 128
    assert tail["lminf"]["position"] > 1500
    full = ask(server, messages, key, lminf={"prefill": "full"})
    assert (cached(full), skipped(full)) == (0, 0)  # what skipped tokens does not serve who wants all of them
    for answer in (tail, full):
        n_processed = answer["usage"]["prompt_tokens"] - cached(answer) - skipped(answer)
        assert answer["timings"]["prompt_n"] == n_processed
        assert answer["lminf"]["skipped"] == skipped(answer)


def test_props_tell_how_prompts_are_processed(server: Served, key: str) -> None:
    props = httpx.get(f"{server.url}/props", headers={"X-Api-Key": key}).json()
    assert (props["lminf"]["prefill"], props["lminf"]["n_tail"]) == ("tail", 2)
