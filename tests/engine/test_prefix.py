"""Whose tokens serve whose prompts: the attacks on other people's conversations, and what a name allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import assert_close, joined, run
from conftest import F32, MakeEngine, MakeLlama
from hypothesis import given, settings
from hypothesis import strategies as st

from lminf_edge import LMInfConfig
from lminf_edge.cache.sequence import CacheSequence
from lminf_edge.cache.token_log import Tokens, as_tokens
from lminf_edge.engine.engine import Engine
from lminf_edge.engine.prefix import trim_point

MARK = 5  # the control token that messages begin with


def message(seed: int, n_tokens: int) -> list[int]:
    return [MARK, *np.random.default_rng(seed).integers(300, 1900, n_tokens - 1).tolist()]


SYSTEM = [1, *message(1, 29)]
CANNED = message(2, 50)  # anyone may ask this
SECRET = message(3, 80)  # the text with the PIN
WHAT_IS_IT = message(4, 12)


@dataclass
class Victim:
    """What client A has sent and got, and where it is now."""

    history: list[list[int]]
    answer: list[int]
    engine: Engine


Place = Callable[[Victim, MakeEngine], Engine]


def hot(victim: Victim, make_engine: MakeEngine) -> Engine:
    return victim.engine


def in_memory(victim: Victim, make_engine: MakeEngine) -> Engine:
    for i in range(2):
        run(victim.engine, message(90 + i, 100), owner="somebody else")
    assert victim.engine.call(lambda: len(victim.engine.store.checkpoints)) > 0
    return victim.engine


def in_files(victim: Victim, make_engine: MakeEngine) -> Engine:
    victim.engine.store.memory_budget = 0
    for i in range(2):
        run(victim.engine, message(90 + i, 100), owner="somebody else")
    assert victim.engine.call(lambda: victim.engine.store.checkpoints) == []
    return victim.engine


def after_a_restart(victim: Victim, make_engine: MakeEngine) -> Engine:
    folder = victim.engine.store.folder
    assert folder is not None
    victim.engine.close()
    engine = make_engine(folder=folder.parent)
    assert engine.store.conversations
    return engine


PLACES = [hot, in_memory, in_files, after_a_restart]
two_places = pytest.mark.parametrize("place", [hot, after_a_restart], indirect=True)


@pytest.fixture(params=PLACES, ids=lambda place: place.__name__)
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.param
    return found


@pytest.fixture
def attacked(make_engine: MakeEngine, place: Place, tmp_path: Path) -> Callable[..., tuple[Victim, Engine]]:
    """Lets client A have its conversation, and moves that to where it is attacked."""

    def make(history: list[list[int]] | None = None, **names: Any) -> tuple[Victim, Engine]:
        history = history or [SYSTEM, SECRET, message(5, 8), CANNED]
        engine = make_engine(folder=tmp_path)
        _, answer, _ = run(engine, joined(history), 10, boundaries=starts(history), n_system=len(history[0]), **names)
        victim = Victim(history, answer, engine)
        return victim, place(victim, make_engine)

    return make


def starts(messages: list[list[int]]) -> list[int]:
    return np.cumsum([len(each) for each in messages])[:-1].tolist()


def n_common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# --- the attack -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ({}, {}),
        ({"label": "chat"}, {}),
        ({}, {"label": "chat"}),
        ({"label": "chat"}, {"label": "another"}),
        ({"owner": "a", "label": "chat"}, {"owner": "b", "label": "chat"}),
    ],
    ids=str,
)
def test_the_end_of_a_conversation_does_not_open_its_middle(attacked: Any, expected: Any, names: Any) -> None:
    """The PIN that only A has sent is not in the stream of who knows the questions around it and A's answer."""
    victim, engine = attacked(**names[0])
    sent = [joined(victim.history) + victim.answer]
    for answer in (victim.answer, victim.answer[:5], []):  # A's answer, the beginning of it, none
        prompt = SYSTEM + CANNED + answer + WHAT_IS_IT
        stats, got, first = run(engine, prompt, n_system=len(SYSTEM), boundaries=[len(SYSTEM)], **names[1])
        assert stats.n_cached <= max(n_common(each, prompt) for each in sent)
        assert stats.position == len(prompt)
        assert_close(first, expected(prompt))
        sent.append(prompt + got)
    assert engine.counters.trimmed == 0


def test_another_owner_is_told_nothing_by_the_time_it_takes(attacked: Any, expected: Any) -> None:
    victim, engine = attacked(owner="a", label="chat")
    full = joined(victim.history)
    for i, prompt in enumerate((full + victim.answer + WHAT_IS_IT, full, full[:-5], SYSTEM + WHAT_IS_IT)):
        stats, _, first = run(engine, prompt, owner=f"b{i}", label="chat", n_system=len(SYSTEM))
        assert stats.n_cached == 0
        assert_close(first, expected(prompt))


def test_other_sinks_are_another_stream(
    make_engine: MakeEngine, make_llama: MakeLlama, place: Place, tmp_path: Path
) -> None:
    engine = make_engine(folder=tmp_path, max_sinks=20)
    prompt = SYSTEM + SECRET + CANNED
    _, answer, _ = run(engine, prompt, 5, label="chat", n_system=len(SYSTEM))
    victim = Victim([SYSTEM, SECRET, CANNED], answer, engine)
    found = place(victim, lambda **kwargs: make_engine(max_sinks=20, **kwargs))
    pinned = make_llama(lminf=LMInfConfig(n_global=20, n_local=64), **F32)
    for messages in ([SYSTEM, CANNED, answer, WHAT_IS_IT], [SYSTEM, SECRET, CANNED, answer, WHAT_IS_IT]):
        stats, _, first = run(found, joined(messages), n_sinks=20, label="chat", n_system=len(SYSTEM))
        pinned.reset()
        pinned.eval(joined(messages))
        assert_close(first, pinned.scores[-1])
        assert stats.n_cached <= (len(SYSTEM) + 1) * (messages[1] == SECRET)
    assert found.counters.trimmed == 0


def test_another_window_is_another_stream(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine(folder=tmp_path)
    prompt = SYSTEM + SECRET
    run(engine, prompt, 5)
    engine.close()
    other = make_engine(folder=tmp_path, lminf=LMInfConfig(n_global=4, n_local=80))
    stats, _, _ = run(other, prompt)
    assert stats.n_cached == 0
    other.close()
    same = make_engine(folder=tmp_path)
    assert run(same, prompt)[0].n_cached == len(prompt) - 1


@two_places
@pytest.mark.parametrize("label", ["", "chat"])
def test_a_message_that_its_author_deletes_is_gone(attacked: Any, expected: Any, label: str) -> None:
    history = [SYSTEM, message(10, 40), message(11, 30), SECRET, message(12, 9), CANNED]
    victim, engine = attacked(history, label=label)
    for without in (3, 2):
        messages = [*history[:without], *history[without + 1 :], victim.answer, WHAT_IS_IT]
        prompt = joined(messages)
        stats, _, first = run(engine, prompt, label=label, n_system=len(SYSTEM), boundaries=starts(messages))
        assert stats.n_cached <= len(joined(history[:without])) + 1  # the mark of the next
        assert_close(first, expected(prompt))
    assert engine.counters.trimmed == 0


# --- what a name allows -----------------------------------------------------------------------------------------------

HISTORY = [SYSTEM, message(20, 60), message(21, 30), message(22, 50), message(23, 40), message(24, 45)]


@two_places
@pytest.mark.parametrize("n_dropped", [1, 4])
def test_a_named_conversation_goes_on_without_its_oldest_messages(attacked: Any, expected: Any, n_dropped: int) -> None:
    victim, engine = attacked(HISTORY, label="chat", owner="a")
    ask = {"label": "chat", "owner": "a", "n_system": len(SYSTEM)}
    shown = joined([SYSTEM, *HISTORY[1 + n_dropped :]]) + victim.answer
    stream = joined(HISTORY) + victim.answer
    stats, answer, first = run(engine, shown + WHAT_IS_IT, 12, **ask)
    assert stats.n_cached == len(shown)
    assert engine.counters.trimmed == 1
    assert_close(first, expected(stream + WHAT_IS_IT))
    assert stats.position == len(stream + WHAT_IS_IT + answer)
    # regenerated, edited, and gone on with
    stats, _, first = run(engine, shown + WHAT_IS_IT, 150, **ask)
    assert stats.n_prefilled <= 1
    assert_close(first, expected(stream + WHAT_IS_IT))
    stats, answer, first = run(engine, shown + CANNED, 12, **ask)
    assert stats.n_cached == len(shown) + 1
    assert_close(first, expected(stream + CANNED))
    shown, stream = shown + CANNED + answer, stream + CANNED + answer
    stats, _, first = run(engine, shown + WHAT_IS_IT, **ask)
    assert stats.n_cached == len(shown)
    assert_close(first, expected(stream + WHAT_IS_IT))
    # nobody else may use it, and not without the name
    for other in ({"owner": "b", "label": "chat"}, {"owner": "a", "label": "other"}, {"owner": "a"}):
        stats, _, first = run(engine, shown + WHAT_IS_IT, n_system=len(SYSTEM), **other)
        assert stats.position == len(shown + WHAT_IS_IT)
        assert_close(first, expected(shown + WHAT_IS_IT))


def test_a_name_survives_restarts_also_of_what_was_trimmed(
    make_engine: MakeEngine, expected: Any, tmp_path: Path
) -> None:
    ask = {"label": "chat", "owner": "a", "n_system": len(SYSTEM)}
    messages: list[list[int]] = [*HISTORY]
    stream: list[int] = []
    for i in range(3):
        engine = make_engine(folder=tmp_path)
        messages.append(message(30 + i, 40))
        new = joined(messages[-1:]) if i else joined(messages)
        stats, answer, first = run(engine, joined(messages), 12, **ask)
        stream += new
        assert stats.n_cached == (len(joined(messages)) - 40 if i else 0)
        assert engine.counters.trimmed == (i > 0)
        assert_close(first, expected(stream))
        stream += answer
        messages.append(answer)
        engine.close()
        del messages[1:3]


@two_places
@pytest.mark.parametrize(
    "change",
    [
        lambda m: [m[0], [MARK, *m[1][10:]], *m[2:]],  # half a message
        lambda m: [m[0], m[1][10:], *m[2:]],
        lambda m: [m[0], [MARK, *m[2][10:]], *m[3:]],
        lambda m: [m[0], m[1], *m[3:]],  # one in the middle
        lambda m: [m[0], m[1][:20], *m[3:]],
        lambda m: [m[0], message(77, 30), *m[3:]],  # an edit of what would be the first
        lambda m: [m[0][:-3], *m[2:]],  # of the system block
        lambda m: [m[0][:-3], *m[1:]],
        lambda m: [[*m[0], 444], *m[2:]],
        lambda m: m[2:],
    ],
)
def test_anything_else_that_is_missing_is_processed(attacked: Any, expected: Any, change: Any) -> None:
    victim, engine = attacked(HISTORY, label="chat")
    messages = change(HISTORY)
    prompt = joined(messages) + victim.answer + WHAT_IS_IT
    stats, _, first = run(engine, prompt, label="chat", n_system=len(messages[0]))
    assert stats.n_cached <= n_common(joined(HISTORY), prompt)
    assert engine.counters.trimmed == 0
    assert_close(first, expected(prompt))


@two_places
@pytest.mark.parametrize(
    ("n_dropped", "change"),
    [
        (1, lambda m: [*m[:4], m[5]]),  # one of those that are left is deleted
        (1, lambda m: [*m[:4], message(77, 30), m[5]]),  # or edited
        (2, lambda m: [*m[:4], m[2], *m[4:]]),  # an old one comes back as a new one
    ],
)
def test_what_else_is_changed_in_a_trimmed_history_is_processed(
    attacked: Any, expected: Any, n_dropped: int, change: Any
) -> None:
    victim, engine = attacked(HISTORY, label="chat")
    messages = change(HISTORY)
    rest = victim.answer + WHAT_IS_IT
    prompt = joined([SYSTEM, *messages[1 + n_dropped :]]) + rest
    stats, _, first = run(engine, prompt, label="chat", n_system=len(SYSTEM))
    whole = joined(messages) + rest  # all that was dropped is the oldest
    stream = prompt if stats.position == len(prompt) else whole
    assert stats.position == len(stream)
    assert stats.n_cached <= n_common(joined(HISTORY), whole) - (len(whole) - len(prompt)) or stream is prompt
    assert_close(first, expected(stream))


def test_what_others_add_to_a_named_conversation_is_not_its_own(attacked: Any, expected: Any) -> None:
    """Of two clients with one key, one names its conversation, and the other's begins with that by chance."""
    victim, engine = attacked([SYSTEM, CANNED], label="chat")
    begun = SYSTEM + CANNED + victim.answer
    for label, question in (("", WHAT_IS_IT), ("of mine", message(6, 9))):
        _, answer, _ = run(engine, begun + SECRET + question, 8, label=label, n_system=len(SYSTEM))
        prompt = SYSTEM + question + answer + WHAT_IS_IT  # without the secret
        stats, _, first = run(engine, prompt, label="chat", n_system=len(SYSTEM))
        assert stats.n_cached <= len(SYSTEM) + 1
        assert_close(first, expected(prompt))
    assert engine.counters.trimmed == 0


@two_places
def test_a_branch_leaves_a_named_conversation_its_tokens(attacked: Any, expected: Any) -> None:
    victim, engine = attacked(HISTORY, label="chat")
    run(engine, joined(HISTORY[:3]) + WHAT_IS_IT, 8, label="another", n_system=len(SYSTEM))
    run(engine, joined(HISTORY) + WHAT_IS_IT, 8, n_system=len(SYSTEM))
    shown = joined([SYSTEM, *HISTORY[3:]]) + victim.answer
    stats, _, first = run(engine, shown + WHAT_IS_IT, label="chat", n_system=len(SYSTEM))
    assert stats.n_cached == len(shown)
    assert_close(first, expected(joined(HISTORY) + victim.answer + WHAT_IS_IT))


def test_a_checkpoint_from_before_an_edit_is_not_what_was_edited(
    make_engine: MakeEngine, expected: Any, tmp_path: Path
) -> None:
    """Both are of the same conversation, and as long as each other."""
    engine = make_engine(parallel=1, folder=tmp_path)
    ask = {"label": "chat", "n_system": len(SYSTEM)}
    edited = [*HISTORY[:4], message(60, 40), HISTORY[5]]
    for messages in (HISTORY, edited):
        run(engine, joined(messages), 10, boundaries=starts(messages), **ask)
        run(engine, message(99, 20), owner="somebody else")
    [conversation] = engine.call(lambda: engine.store.named("", "chat"))
    assert [each.n_tokens for each in conversation.checkpoints].count(len(joined(HISTORY)) + 10) == 2
    for before in (edited, HISTORY):
        shown = joined([SYSTEM, *before[2:]]) + WHAT_IS_IT
        stats, _, first = run(engine, shown, **ask)
        is_trimmed = stats.position > len(shown)
        assert is_trimmed or before is HISTORY
        assert_close(first, expected(joined(before) + WHAT_IS_IT if is_trimmed else shown))


# --- skipped tokens ---------------------------------------------------------------------------------------------------


@two_places
def test_a_state_with_skipped_tokens_serves_only_who_allows_it(
    attacked: Any, make_engine: MakeEngine, expected: Any, tokens: Tokens
) -> None:
    history = [SYSTEM, message(40, 600)]
    victim, engine = attacked(history, prefill="tail", label="chat")
    prompt = joined(history) + victim.answer + WHAT_IS_IT
    for label in ("chat", ""):
        stats, _, first = run(engine, prompt, prefill="full", label=label, n_system=len(SYSTEM))
        assert (stats.n_cached <= len(SYSTEM)) == (label == "chat")
        assert stats.n_skipped == 0
        assert_close(first, expected(prompt))
    stats, _, _ = run(engine, prompt[:-1], prefill="tail", label="chat", n_system=len(SYSTEM))
    assert stats.n_prefilled <= len(WHAT_IS_IT)


@two_places
def test_a_trimmed_state_with_skipped_tokens_serves_only_who_allows_it(attacked: Any, expected: Any) -> None:
    history = [SYSTEM, message(40, 600), message(41, 30)]
    victim, engine = attacked(history, prefill="tail", label="chat")
    prompt = joined([SYSTEM, history[2]]) + victim.answer + WHAT_IS_IT
    stats, _, first = run(engine, prompt, prefill="full", label="chat", n_system=len(SYSTEM))
    assert stats.n_cached <= len(SYSTEM) + 1
    assert_close(first, expected(prompt))
    assert engine.counters.trimmed == 0


@pytest.mark.parametrize("label", ["", "chat"])
def test_a_checkpoint_that_does_not_lead_back_as_far_as_it_says_is_not_used(
    make_engine: MakeEngine, expected: Any, monkeypatch: pytest.MonkeyPatch, label: str
) -> None:
    engine = make_engine(parallel=1)
    ask = {"label": label, "n_system": len(SYSTEM)}
    run(engine, joined(HISTORY), 40, **ask)
    run(engine, message(99, 40), owner="somebody else")
    monkeypatch.setattr(CacheSequence, "rollback", lambda *_: False)
    prompt = joined([SYSTEM, *HISTORY[2:]] if label else HISTORY) + WHAT_IS_IT
    _, _, first = run(engine, prompt, **ask)
    assert engine.counters.failed == 0
    assert_close(first, expected(prompt))


# --- the place where a trimmed history goes on ------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_trim_point_is_where_whole_messages_are_missing(data: st.DataObject) -> None:
    """Of small histories with many repetitions, against a search through all that could have been dropped."""
    words = st.lists(st.integers(6, 7), max_size=3)
    say = st.builds(lambda text: [MARK, *text], words)
    system = [1, *data.draw(words)]
    messages = data.draw(st.lists(say, min_size=1, max_size=6))
    prompt = system + joined(data.draw(st.one_of(st.just(messages), st.lists(say, max_size=5)))[1:])
    prompt += joined(data.draw(st.lists(say, min_size=1, max_size=2)))
    n_rollback = data.draw(st.integers(0, 6))
    log = system + joined(messages)
    reach = {n: n if len(log) - n <= n_rollback else 0 for n in range(len(log) + 1)}
    found = trim_point(as_tokens(log), as_tokens(prompt), len(system), reach.__getitem__)
    if found is None:
        return
    n_log, n_covered = found
    assert len(log) - n_rollback <= n_log <= len(log)
    assert len(system) < n_covered < len(prompt)
    dropped = [len(system + joined(messages[:k])) for k in range(1, len(messages))]
    assert any(prompt[:n_covered] == log[: len(system)] + log[start:n_log] for start in dropped)


def test_a_history_made_to_take_long_does_not() -> None:
    """Nothing but beginnings of messages, which all agree with each other."""
    n = 200_000
    log = np.full(n, MARK, dtype=np.int32)
    prompt = np.full(n, MARK, dtype=np.int32)
    prompt[n // 2] = 9
    trim_point(log, prompt, 10, lambda n_tokens: n_tokens if n - n_tokens <= 64 else 0)


def test_any_length_of_the_system_block(make_engine: MakeEngine, expected: Any) -> None:
    engine = make_engine()
    prompt = joined([SYSTEM, *HISTORY[3:]]) + WHAT_IS_IT
    for n_system in (0, 1, 29, 31, 500, 10_000):
        run(engine, joined(HISTORY), 5, label=str(n_system), owner=str(n_system), n_system=n_system)
        stats, _, first = run(engine, prompt, label=str(n_system), owner=str(n_system), n_system=n_system)
        assert stats.position == len(prompt)
        assert_close(first, expected(prompt))
