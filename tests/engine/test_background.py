"""With recall, what prefill "tail" skipped is read while there are no requests, and can then be recalled."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import run, submitted
from conftest import MakeEngine

from lminf_edge import Llama, LMInfConfig
from lminf_edge.cache.token_log import Tokens
from lminf_edge.cli.demo import python_documentation
from lminf_edge.engine import scheduler
from lminf_edge.engine.engine import Engine
from lminf_edge.evaluate.prompts import Prompts

N_PROMPT, N_ANSWER = 2000, 9
N_LOG = N_PROMPT + N_ANSWER


def window(**more: Any) -> LMInfConfig:
    return LMInfConfig(**{"n_global": 4, "n_local": 64, "n_recall": 16, "prefill": "tail", **more})


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "READ_AFTER", 0.02)
    monkeypatch.setattr(scheduler, "SAVE_AFTER", 60.0)  # where a stream is saved decides where prompts are cut


def wait_until(reached: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.005)


def n_read(engine: Engine) -> int:
    reading = engine.scheduler.reading
    return 0 if reading is None else reading.n_read


def wait_for_reading(engine: Engine) -> None:
    wait_until(lambda: engine.scheduler.reading is None and engine.call(lambda: engine.scheduler._reading) is None)


def hold(engine: Engine, monkeypatch: pytest.MonkeyPatch, after: int) -> threading.Event:
    """Reading stops before a batch, once so many tokens have been read in the background, until the event is set."""
    released, process = threading.Event(), engine.scheduler._process

    def slow(parts: Any) -> None:
        if engine.scheduler._reading is not None and engine.counters.background_tokens >= after:
            released.wait(60)
        process(parts)

    monkeypatch.setattr(engine.scheduler, "_process", slow)
    return released


@pytest.fixture
def full(make_engine: MakeEngine, tokens: Tokens) -> Callable[..., Any]:
    """Logits after a second prompt, by a stream that has processed all of the first one."""

    def logits(first: Tokens, second: Tokens, boundaries: tuple[int, ...] = (), **lminf: Any) -> Any:
        engine = make_engine(parallel=1, lminf=window(prefill="full", **lminf))
        run(engine, first, boundaries=boundaries)
        stats, _, found = run(engine, second)
        assert stats.n_cached == len(first)
        return found

    return logits


# --- what it is for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recall_index", ["exact", "sketch"])
def test_then_it_is_as_if_all_had_been_processed(
    make_engine: MakeEngine, full: Any, tokens: Tokens, recall_index: str
) -> None:
    engine = make_engine(lminf=window(recall_index=recall_index))
    stats, answer, _ = run(engine, tokens[:N_PROMPT], N_ANSWER)
    assert stats.n_skipped == stats.n_unread == N_PROMPT - 132
    assert stats.n_archived == 132 + N_ANSWER
    wait_for_reading(engine)
    assert engine.counters.background_tokens == N_LOG
    assert engine.counters.prefilled_tokens == 132
    log = np.concatenate([tokens[:N_PROMPT], answer]).astype(np.int32)
    more = np.concatenate([log, tokens[N_PROMPT : N_PROMPT + 100]])
    stats, _, logits = run(engine, more)
    assert (stats.n_cached, stats.n_skipped, stats.n_unread) == (N_LOG, 0, 0)
    assert stats.position == stats.n_archived == N_LOG + 100
    # a choice is one of a micro-batch: these are cut at the same marks
    expected = full(log, more, (N_PROMPT - 1,), recall_index=recall_index)
    np.testing.assert_array_equal(logits, expected)


def test_a_fact_that_was_skipped_is_recalled_in_the_next_turn(make_engine: MakeEngine, nano_path: str) -> None:
    vocabulary = Llama(nano_path, vocab_only=True, verbose=False)
    prompt = Prompts(vocabulary, "prose", python_documentation()).prompt(8000, 0.3, 0)
    engine = make_engine(parallel=1, lminf=window(n_global=10, n_local=246, n_recall=8))
    key = prompt.wanted[0].accepted[0]

    def answered(text: Tokens) -> str:
        stats, answer, _ = run(engine, text, 8)
        found.append(stats)
        return vocabulary.detokenize(answer).decode(errors="replace")

    found: list[Any] = []
    assert key not in answered(prompt.tokens)
    wait_for_reading(engine)
    assert key in answered(np.concatenate([engine.slots[0].log.recent(), prompt.tokens[-40:]]))
    assert found[0].n_skipped > 7000
    assert found[1].n_prefilled == 40
    vocabulary.close()


def test_an_answer_is_regenerated_from_what_was_read(make_engine: MakeEngine, tokens: Tokens) -> None:
    engine = make_engine(lminf=window())
    run(engine, tokens[:N_PROMPT], 200, boundaries=[700, 1900])
    wait_for_reading(engine)
    stats, _, _ = run(engine, tokens[:N_PROMPT])
    assert (stats.n_prefilled, stats.n_unread, stats.n_archived) == (1, 0, N_PROMPT)
    stats, _, _ = run(engine, np.concatenate([tokens[:1900], tokens[:50]]))  # a message was edited
    assert (stats.n_prefilled, stats.n_archived) == (50, 1950)


def test_it_is_read_once(make_engine: MakeEngine, tokens: Tokens) -> None:
    engine = make_engine(lminf=window())
    run(engine, tokens[:1000], N_ANSWER)
    wait_for_reading(engine)
    text = np.concatenate([engine.slots[0].log.recent(), tokens[1000:2800]])
    stats, _, _ = run(engine, text, N_ANSWER)
    assert stats.n_skipped == stats.n_unread == 1800 - 128
    wait_for_reading(engine)
    assert engine.counters.background_tokens == len(text) + N_ANSWER
    assert engine.slots[0].n_skipped == 0


# --- requests come first ----------------------------------------------------------------------------------------------


def test_a_request_waits_for_one_batch_at_most(
    make_engine: MakeEngine, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(lminf=window())
    run(engine, tokens[:N_PROMPT], N_ANSWER)
    done: list[str] = []
    process, submit = engine.scheduler._process, engine.scheduler.submit

    def processing(parts: Any) -> None:
        done.append("request" if engine.scheduler._reading is None else "reading")
        process(parts)

    monkeypatch.setattr(engine.scheduler, "_process", processing)
    monkeypatch.setattr(engine.scheduler, "submit", lambda request: (done.append("submitted"), submit(request)))
    released = hold(engine, monkeypatch, 500)
    wait_until(lambda: engine.counters.background_tokens >= 500)
    request = submitted(engine, tokens[::-1][:90], max_tokens=3)
    released.set()
    assert len(list(engine.stream(request))) == 3
    wait_for_reading(engine)
    start, n_batches = done.index("submitted"), done.count("request")
    assert n_batches > 3
    assert done[start + 1 : start + 1 + n_batches] == ["request"] * n_batches
    assert engine.counters.background_tokens == N_LOG  # nothing was read twice


def test_what_was_read_serves_a_stream_that_went_on(
    make_engine: MakeEngine, full: Any, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(lminf=window())
    run(engine, tokens[:N_PROMPT])
    released = hold(engine, monkeypatch, 640)
    wait_until(lambda: engine.counters.background_tokens >= 640)
    request = submitted(engine, tokens[: N_PROMPT + 60], max_tokens=1)
    released.set()
    list(engine.stream(request))
    assert (request.stats.n_cached, request.stats.n_skipped) == (N_PROMPT, 0)
    assert request.stats.n_unread > 0
    wait_for_reading(engine)
    assert engine.counters.background_tokens == N_PROMPT + 60
    _, _, logits = run(engine, tokens[: N_PROMPT + 160])
    expected = full(tokens[: N_PROMPT + 60], tokens[: N_PROMPT + 160], (N_PROMPT + 59,))
    np.testing.assert_allclose(logits, expected, atol=5e-4)


def test_what_was_read_does_not_serve_another_text(
    make_engine: MakeEngine, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(parallel=1, lminf=window())
    run(engine, tokens[:N_PROMPT])
    released = hold(engine, monkeypatch, 1000)
    wait_until(lambda: engine.counters.background_tokens >= 1000)
    edited = np.concatenate([tokens[:300], tokens[:1500]])
    request = submitted(engine, edited, max_tokens=1)
    released.set()
    list(engine.stream(request))
    assert request.stats.n_cached <= 300
    wait_for_reading(engine)
    [slot] = engine.slots
    assert (slot.n_skipped, slot.sequence.info().n_archived) == (0, len(edited))
    np.testing.assert_array_equal(slot.log.recent(), edited)


def test_each_stream_in_the_context_is_read(make_engine: MakeEngine, tokens: Tokens) -> None:
    engine = make_engine(lminf=window())
    one, two = tokens[:1500], tokens[::-1][:1200].copy()
    requests = [submitted(engine, each, max_tokens=1) for each in (one, two)]
    for request in requests:
        list(engine.stream(request))
    wait_for_reading(engine)
    assert [slot.n_skipped for slot in engine.slots] == [0, 0]
    assert engine.counters.background_tokens == len(one) + len(two)
    for each in (one, two):
        assert run(engine, each)[0].n_prefilled <= 1


def test_a_client_that_is_gone(make_engine: MakeEngine, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(parallel=1, lminf=window())
    run(engine, tokens[:N_PROMPT], N_ANSWER)
    released = hold(engine, monkeypatch, 300)
    wait_until(lambda: engine.counters.background_tokens >= 300)
    request = submitted(engine, tokens[: N_PROMPT + 200])
    engine.cancel(request)
    released.set()
    wait_for_reading(engine)
    assert engine.slots[0].n_skipped == 0
    assert run(engine, tokens[:N_PROMPT])[0].n_archived == N_PROMPT


# --- what ends it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_done", [False, True])
def test_an_erased_conversation_is_gone(
    make_engine: MakeEngine, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_done: bool
) -> None:
    engine = make_engine(parallel=1, lminf=window(), folder=tmp_path)
    run(engine, tokens[:N_PROMPT], N_ANSWER, boundaries=[300, 900, 1500])
    if is_done:
        wait_for_reading(engine)
        run(engine, tokens[:N_PROMPT], N_ANSWER)
    else:
        released = hold(engine, monkeypatch, 1200)
        wait_until(lambda: engine.counters.background_tokens >= 1200)
        threading.Timer(0.05, released.set).start()
    assert engine.call(lambda: engine.scheduler.erase_slot(0, "")) == N_LOG
    assert not engine.store.conversations
    assert engine.scheduler.reading is None
    n_before = engine.counters.background_tokens
    stats, _, _ = run(engine, tokens[:N_PROMPT], prefill="full")
    assert stats.n_cached == 0
    assert engine.counters.background_tokens == n_before
    engine.call(lambda: engine.scheduler.erase_slot(0, ""))
    engine.close()
    assert not list(tmp_path.rglob("*.segment"))


def test_it_ends_with_the_engine_and_goes_on_after_a_restart(
    make_engine: MakeEngine, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = make_engine(parallel=1, lminf=window(), folder=tmp_path)
    run(engine, tokens[:N_PROMPT], N_ANSWER)
    released = hold(engine, monkeypatch, 1000)
    wait_until(lambda: engine.counters.background_tokens >= 1000)
    closing = threading.Thread(target=engine.close)
    closing.start()
    wait_until(lambda: not engine.is_alive)
    released.set()
    closing.join(30)
    assert 1000 < engine.counters.background_tokens < 1000 + 2 * 64
    n_done = engine.counters.background_tokens

    again = make_engine(parallel=1, lminf=window(), folder=tmp_path)
    assert again.scheduler.reading is None  # what is in no slot is not read
    run(again, tokens[: N_PROMPT + 5], 1)
    wait_for_reading(again)
    assert again.counters.background_tokens == N_PROMPT + 6 - n_done
    assert again.slots[0].sequence.info().n_archived == N_PROMPT + 6


def test_a_failure_is_not_repeated(
    make_engine: MakeEngine, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(parallel=1, lminf=window())
    run(engine, tokens[:N_PROMPT], N_ANSWER)
    decode, failed = engine.scheduler._decode, threading.Event()

    def refuse(runs: Any) -> Any:
        if engine.scheduler._reading is not None:
            failed.set()
            raise RuntimeError("no")
        return decode(runs)

    monkeypatch.setattr(engine.scheduler, "_decode", refuse)
    with caplog.at_level(logging.ERROR):
        assert failed.wait(30)
        wait_for_reading(engine)
        stats, _, _ = run(engine, tokens[:N_PROMPT])
    assert stats.n_prefilled <= 1
    assert len(caplog.records) == engine.counters.failed == 1


def test_streams_keep_their_memory(make_engine: MakeEngine, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read gives way to a request where archives have no more memory."""
    gc.collect()  # the budget is one of the process
    segment = make_engine(lminf=window()).parts.archive_token_bytes * 1024
    engine = make_engine(parallel=1, lminf=window(archive_memory=5 * segment, n_archive=4 << 10), memory_budget=0)
    run(engine, tokens[:1900], N_ANSWER)
    released = hold(engine, monkeypatch, 1300)
    wait_until(lambda: engine.counters.background_tokens >= 1300)
    request = submitted(engine, tokens[:1900], max_tokens=4)
    released.set()
    assert len(list(engine.stream(request))) == 4
    assert request.stats.n_archived == 132 + 3
    wait_for_reading(engine)
    assert engine.counters.background_tokens > 1300 + 1900  # it began again
    assert run(engine, tokens[:1900])[0].n_archived == 1900


# --- where nothing is read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"background": False}, {"lminf": window(n_recall=0)}, {"lminf": window(prefill="full")}]
)
def test_off(make_engine: MakeEngine, tokens: Tokens, settings: dict[str, Any]) -> None:
    engine = make_engine(**{"lminf": window(), **settings})
    stats, _, _ = run(engine, tokens[:N_PROMPT], prefill="tail")
    assert (stats.n_skipped, stats.n_unread) == (N_PROMPT - 132, 0)
    assert engine.scheduler.reading is None
    assert engine.scheduler._seconds_to_reading() is None
    assert len(engine.model.sequences) == len(engine.slots) == 2


def test_a_request_without_recall(make_engine: MakeEngine, tokens: Tokens) -> None:
    engine = make_engine(lminf=window())
    stats, _, _ = run(engine, tokens[:N_PROMPT], n_recall=0)
    assert stats.n_unread == 0
    assert engine.scheduler.reading is None


def test_a_stream_whose_client_has_dropped_messages(make_engine: MakeEngine, tokens: Tokens) -> None:
    """Not all of its tokens are known any more."""
    engine = make_engine(lminf=window())
    start, mark = tokens[:20], np.array([7], dtype=np.int32)
    messages = [np.concatenate([mark, part[part != 7]]) for part in np.split(tokens[100:2500], 8)]
    run(engine, np.concatenate([start, *messages]), label="a", n_system=20)
    stats, _, _ = run(engine, np.concatenate([start, *messages[3:], mark, tokens[:9]]), label="a", n_system=20)
    assert engine.counters.trimmed == 1
    assert stats.n_unread == 0
    assert engine.scheduler.reading is None
