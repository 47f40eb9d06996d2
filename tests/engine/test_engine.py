"""The engine: conversations that are resent, regenerated, edited, branched, moved out and brought back.

What it answers is compared with a single stream that processes the same tokens, by the logits of the first token
sampled.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import assert_close, joined, run, submitted
from conftest import F32, MakeEngine, MakeLlama

from lminf_edge import LMInfConfig
from lminf_edge.cache.token_log import Tokens
from lminf_edge.engine.engine import Engine
from lminf_edge.engine.request import Output, Phase, RequestCancelled
from lminf_edge.errors import UserError


def close(engine: Engine) -> None:
    engine.close()
    engine.model.close()


# --- one conversation -------------------------------------------------------------------------------------------------


def test_a_long_prompt_and_its_answer(make_engine: MakeEngine, expected: Any, tokens: Tokens) -> None:
    engine = make_engine()
    stats, answer, first = run(engine, tokens[:1000], 30)
    assert_close(first, expected(tokens[:1000]))
    assert (stats.n_cached, stats.n_prefilled, stats.position) == (0, 1000, 1030)
    assert len(answer) == 30
    stream = list(tokens[:1000])
    for token in answer:  # greedy: each is the likeliest after those before it
        assert token == int(expected(stream).argmax())
        stream.append(token)


def test_a_resent_history_costs_what_is_new(make_engine: MakeEngine, expected: Any, tokens: Tokens) -> None:
    engine = make_engine()
    history = tokens[:700].tolist()
    for i in range(5):
        stats, answer, first = run(engine, history, 20)
        assert stats.n_cached == (0 if i == 0 else len(history) - 15)
        assert stats.n_prefilled == len(history) - stats.n_cached
        assert_close(first, expected(history))
        history += answer + tokens[700 + 15 * i : 715 + 15 * i].tolist()


def test_regenerate_reads_one_token(make_engine: MakeEngine, expected: Any, tokens: Tokens) -> None:
    engine = make_engine()
    prompt = tokens[:500]
    for n_answer in (200, 10, 0, 300):  # beyond what can be rolled back, within it, nothing at all
        stats, _, first = run(engine, prompt, n_answer)
        assert_close(first, expected(prompt))
    assert stats.n_prefilled == 1
    assert engine.counters.restored >= 1


def test_an_edit_costs_the_message_in_question(make_engine: MakeEngine, expected: Any, tokens: Tokens) -> None:
    engine = make_engine()
    messages = [tokens[i : i + 90].tolist() for i in range(0, 900, 90)]
    starts = list(range(90, 900, 90))
    run(engine, joined(messages), 100, boundaries=starts)
    for k in (9, 8, 7):
        edited = joined(messages[:k]) + tokens[1000 : 1000 + 50 + k].tolist()
        stats, _, first = run(engine, edited, 0, boundaries=starts[:k])
        assert stats.n_cached >= 90 * k
        assert_close(first, expected(edited))


def test_an_edit_far_back_costs_no_more_than_the_way_from_the_end(
    make_engine: MakeEngine, expected: Any, tokens: Tokens
) -> None:
    engine = make_engine()
    boundaries = list(range(50, 2500, 50))
    run(engine, tokens[:2500], 0, boundaries=boundaries)
    for at in (1200, 600, 2000):
        edited = np.concatenate([tokens[:at], tokens[2600:2620]])
        stats, _, first = run(engine, edited, 0)
        assert at - stats.n_cached <= 2500 - at + 50
        assert stats.n_cached > 0 or at < 1200
        assert_close(first, expected(edited))


def test_a_branch_leaves_the_other_as_it_was(make_engine: MakeEngine, expected: Any, tokens: Tokens) -> None:
    engine = make_engine(parallel=1)
    system = tokens[:40].tolist()
    first = system + tokens[100:400].tolist()
    second = system + tokens[500:800].tolist()
    stats, answer, _ = run(engine, first, 10, boundaries=[40])
    stats, _, logits = run(engine, second, 10, boundaries=[40])
    assert stats.n_cached == 40
    assert_close(logits, expected(second))
    longer = first + answer + tokens[800:820].tolist()
    stats, _, logits = run(engine, longer, 0)
    assert stats.n_cached == len(first + answer)
    assert_close(logits, expected(longer))


def test_the_same_prompt_again_and_a_shorter_one(make_engine: MakeEngine, expected: Any, tokens: Tokens) -> None:
    engine = make_engine()
    run(engine, tokens[:300], 5)
    stats, _, first = run(engine, tokens[:300], 0)
    assert stats.n_prefilled == 1
    assert_close(first, expected(tokens[:300]))
    stats, _, first = run(engine, tokens[:290], 0)
    assert_close(first, expected(tokens[:290]))
    stats, _, first = run(engine, tokens[:1], 0)
    assert_close(first, expected(tokens[:1]))


# --- several at a time ------------------------------------------------------------------------------------------------


def test_conversations_side_by_side_are_as_if_alone(make_engine: MakeEngine, expected: Any, tokens: Tokens) -> None:
    engine = make_engine(parallel=3)
    prompts = [tokens[i : i + 200 + i // 7] for i in range(0, 1800, 300)]  # twice as many as fit
    results: dict[int, Any] = {}

    def work(i: int) -> None:
        results[i] = run(engine, prompts[i], 40)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, prompt in enumerate(prompts):
        _, answer, first = results[i]
        assert_close(first, expected(prompt))
        alone = expected(prompt, answer)
        _, _, last = run(engine, [*prompt.tolist(), *answer], 0)
        assert_close(last, alone)


def test_a_long_prompt_does_not_stop_the_others(make_engine: MakeEngine, tokens: Tokens) -> None:
    engine = make_engine()
    begun = threading.Event()
    long = submitted(engine, np.tile(tokens, 20), on_progress=lambda _: begun.set())
    assert begun.wait(60)
    _, answer, _ = run(engine, tokens[:50], 20)
    assert len(answer) == 20
    assert long.stats.n_prefilled < 60_000  # still at it
    engine.cancel(long)
    with pytest.raises(RequestCancelled):
        next(engine.stream(long))


def test_cancelling_stops_the_prefill_and_keeps_what_was_processed(
    make_engine: MakeEngine, expected: Any, tokens: Tokens
) -> None:
    engine = make_engine()
    text = np.tile(tokens, 4)
    seen = threading.Event()
    request = submitted(engine, text, on_progress=lambda r: seen.set() if r.stats.n_prefilled > 500 else None)
    assert seen.wait(60)
    engine.cancel(request)
    with pytest.raises(RequestCancelled):
        next(engine.stream(request))
    n_prefilled = request.stats.n_prefilled
    assert 500 < n_prefilled < len(text)
    again, _, first = run(engine, text[: n_prefilled + 10], 0)
    assert again.n_cached == n_prefilled
    assert_close(first, expected(text[: n_prefilled + 10]))


def test_those_who_wait_can_leave(make_engine: MakeEngine, tokens: Tokens) -> None:
    engine = make_engine(parallel=1)
    busy = submitted(engine, tokens[:20])
    stream = engine.stream(busy)
    next(stream)
    waiting, after = submitted(engine, tokens[:30]), submitted(engine, tokens[:40])
    assert engine.call(lambda: engine.n_waiting) == 2
    engine.cancel(waiting)
    with pytest.raises(RequestCancelled):
        next(engine.stream(waiting))
    assert waiting.stats.n_prefilled == 0
    stream.close()
    with contextlib.closing(engine.stream(after)) as outputs:
        next(outputs)
    assert engine.n_waiting == engine.n_busy == 0


def test_who_stops_taking_tokens_holds_up_nobody(make_engine: MakeEngine, expected: Any, tokens: Tokens) -> None:
    engine = make_engine()
    slow = submitted(engine, tokens[:20])
    stream = engine.stream(slow)
    taken = [next(stream).token]
    run(engine, tokens[:50], 50)
    assert slow.outputs.qsize() <= 9  # generated ahead, and no more
    taken += [next(stream).token for _ in range(30)]
    stream.close()
    text = tokens[:20].tolist()
    for token in taken:
        assert token == int(expected(text).argmax())
        text.append(token)
    stats, _, first = run(engine, text, 0)
    assert stats.n_cached == len(text) - 1  # what was ahead is taken back, the last taken is not processed
    assert_close(first, expected(text))


def test_the_position_is_that_of_what_was_taken(make_engine: MakeEngine, tokens: Tokens) -> None:
    engine = make_engine()
    request = submitted(engine, tokens[:20])
    with contextlib.closing(engine.stream(request)) as outputs:
        next(outputs)
        while engine.call(request.outputs.qsize) < 5:
            time.sleep(0.001)
    assert request.stats.position == len(engine.slots[0]) == 20


def test_prompt_logits_come_part_by_part(make_engine: MakeEngine, make_llama: MakeLlama, tokens: Tokens) -> None:
    engine = make_engine()
    request = submitted(engine, tokens[:300], wants_prompt_logits=True)
    rows = np.concatenate([part.logits for part in engine.prompt_logits(request)])
    llm = make_llama(logits_all=True, n_batch=300, **F32)
    llm.eval(tokens[:300])
    np.testing.assert_allclose(rows, llm.scores, atol=5e-4, rtol=0)


def test_wrong_requests(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for prompt in ([], [-1], [99_999]):
        with pytest.raises(UserError, match="prompt"):
            submitted(engine, prompt)
    with pytest.raises(UserError, match="sinks"):
        run(engine, [1, 2, 3], n_sinks=5)
    run(engine, [1, 2, 3])
    assert engine.counters.failed == 0
    close(engine)
    with pytest.raises(RuntimeError, match="has been closed"):
        submitted(engine, [1])


def test_closing_tells_those_who_wait(make_engine: MakeEngine, tokens: Tokens) -> None:
    engine = make_engine(parallel=1)
    begun = threading.Event()
    requests = [submitted(engine, np.tile(tokens, 20), on_progress=lambda _: begun.set()) for _ in range(2)]
    assert begun.wait(60)
    engine.close()
    for request in requests:
        with pytest.raises(RequestCancelled):
            next(engine.stream(request))
        assert request.phase is Phase.FINISHED
    assert not engine.is_alive


def test_closing_tells_those_who_came_last(make_engine: MakeEngine, tokens: Tokens) -> None:
    """A request that the thread has not looked at yet."""
    engine = make_engine(parallel=1)
    is_held, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        is_held.set()
        may_go.wait(60)

    holding = threading.Thread(target=engine.call, args=(hold,))
    holding.start()
    assert is_held.wait(60)
    request = submitted(engine, tokens[:20])
    closing = threading.Thread(target=engine.close)
    closing.start()
    while engine.is_alive:
        time.sleep(0.001)
    may_go.set()
    closing.join()
    holding.join()
    while isinstance(output := request.outputs.get(timeout=1), Output):
        pass  # of a step in between
    assert isinstance(output, RequestCancelled)
    assert (request.phase, request.sampler) == (Phase.FINISHED, None)


def test_a_fault_of_ours_ends_the_engine_aloud(
    make_engine: MakeEngine, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no request is to blame: whoever waits is told, and whoever runs the engine sees it."""
    engine = make_engine()

    def fail() -> None:
        raise AssertionError("a fault of ours")

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(engine.scheduler, "step", fail)
    request = submitted(engine, tokens[:20])
    with pytest.raises(RequestCancelled):
        next(engine.stream(request))
    assert not engine.is_alive
    assert "the engine cannot go on" in caplog.text
    with pytest.raises(RuntimeError, match="has been closed"):
        submitted(engine, tokens[:20])


# --- out of the context and back --------------------------------------------------------------------------------------


def test_conversations_take_turns_in_one_sequence(make_engine: MakeEngine, expected: Any, tokens: Tokens) -> None:
    engine = make_engine(parallel=1)
    histories = [tokens[i : i + 150 + i // 4].tolist() for i in range(0, 1000, 250)]
    for turn_number in range(3):
        for history in histories:
            stats, answer, first = run(engine, history, 12)
            if turn_number:
                assert stats.n_cached == len(history) - 7
            assert_close(first, expected(history))
            history += answer + tokens[2000 + turn_number : 2007 + turn_number].tolist()
    assert engine.counters.restored == 8


@pytest.mark.parametrize("memory_budget", [0, 1 << 30])
def test_a_restart_loses_nothing(
    make_engine: MakeEngine, expected: Any, tokens: Tokens, tmp_path: Path, memory_budget: int
) -> None:
    histories = [tokens[i : i + 150 + i // 4].tolist() for i in range(0, 1000, 250)]
    for n_parallel in (1, 3, 2):  # with any number of sequences
        engine = make_engine(parallel=n_parallel, folder=tmp_path, memory_budget=memory_budget)
        for history in histories:
            stats, answer, first = run(engine, history, 12)
            if n_parallel != 1:
                assert stats.n_cached == len(history) - 7
            assert_close(first, expected(history))
            history += answer + tokens[2000 + n_parallel : 2007 + n_parallel].tolist()
        close(engine)


def test_budgets_are_kept(make_engine: MakeEngine, expected: Any, tokens: Tokens, tmp_path: Path) -> None:
    probe = make_engine(parallel=1)
    run(probe, tokens[:300], 0)
    state_bytes = probe.call(lambda: probe.slots[0].sequence.save()[1].nbytes)
    memory, disk = 3 * state_bytes, 8 * state_bytes
    engine = make_engine(parallel=1, folder=tmp_path, memory_budget=memory, disk_budget=disk)
    for i in range(0, 2000, 100):
        run(engine, tokens[i : i + 300], 5)
        assert engine.call(lambda: engine.store.memory_bytes) <= memory
    engine.close()
    on_disk = sum(file.stat().st_size for file in tmp_path.rglob("*.checkpoint"))
    assert 4 * state_bytes < on_disk <= disk + 20 * 200
    assert 3 <= len(engine.store.conversations) < 20
    again = make_engine(parallel=1, folder=tmp_path, memory_budget=memory, disk_budget=disk)
    stats, _, first = run(again, tokens[1900:2210], 0)  # the last one is still there
    assert stats.n_cached >= 299
    assert_close(first, expected(tokens[1900:2210]))


def test_a_damaged_file_is_read_again_from_the_text(
    make_engine: MakeEngine, expected: Any, tokens: Tokens, tmp_path: Path
) -> None:
    engine = make_engine(parallel=1, folder=tmp_path)
    _, answer, _ = run(engine, tokens[:300], 5)
    close(engine)
    for file in tmp_path.rglob("*.checkpoint"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    engine = make_engine(parallel=1, folder=tmp_path)
    history = tokens[:300].tolist() + answer + tokens[400:410].tolist()
    stats, _, first = run(engine, history, 0)
    assert stats.n_cached == 0
    assert_close(first, expected(history))


def test_two_engines_do_not_share_a_folder(make_engine: MakeEngine, tmp_path: Path) -> None:
    make_engine(folder=tmp_path)
    with pytest.raises(ValueError, match="perhaps by another server"):
        make_engine(folder=tmp_path)


def test_sinks_of_a_conversation(make_engine: MakeEngine, make_llama: MakeLlama, tokens: Tokens) -> None:
    engine = make_engine(max_sinks=40)
    assert (engine.n_sinks, engine.max_sinks, engine.window.n_local) == (4, 40, 64)
    pinned = make_llama(lminf=LMInfConfig(n_global=30, n_local=64), **F32)
    pinned.eval(tokens[:500])
    _, _, first = run(engine, tokens[:500], 0, n_sinks=30)
    assert_close(first, pinned.scores[-1])
    stats, _, other = run(engine, tokens[:500], 0)  # the same tokens with other sinks are another stream
    assert stats.n_cached == 0
    assert np.abs(other - first).max() > 1e-2
