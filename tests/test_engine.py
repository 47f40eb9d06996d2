"""The engine: conversations that are resent, regenerated, edited, branched, trimmed, moved out and brought back.

What it answers is compared with a single stream that reads the same tokens, by the logits of the first token sampled.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import MakeLlama

from lminf_edge import LMInfConfig
from lminf_edge.engine import Engine, load_engine
from lminf_edge.engine.turn import Progress, Turn, TurnCancelled
from lminf_edge.history import Tokens

WINDOW = LMInfConfig(n_global=4, n_local=64)
# with everything in f32, another order of additions is all that can differ
F32: dict[str, Any] = {"type_k": 0, "type_v": 0}
SETTINGS: dict[str, Any] = {"verbose": False, "n_threads": 1, "n_threads_batch": 1, **F32}

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(nano_f32_path: str) -> Iterator[MakeEngine]:
    """Engines of two sequences with a window of 64 + 4 tokens and nothing on disk, unless told otherwise."""
    made: list[Engine] = []

    def make(**kwargs: Any) -> Engine:
        made.append(load_engine(nano_f32_path, **{"parallel": 2, "lminf": WINDOW, **SETTINGS, **kwargs}))
        return made[-1]

    yield make
    for engine in made:
        close(engine)


def close(engine: Engine) -> None:
    engine.close()
    engine.llm.close()


def greedy() -> Any:
    sampler = llama_cpp._internals.LlamaSampler()
    sampler.add_greedy()
    return sampler


def run(engine: Engine, prompt: Sequence[int] | Tokens, n: int = 0, **kwargs: Any) -> tuple[Turn, list[int], Any]:
    """Reads a prompt and goes on for n tokens; the turn, the tokens, and the logits after the prompt."""
    turn = engine.begin(prompt, greedy(), wants_logits=True, **kwargs)
    answer: list[int] = []
    first = None
    with contextlib.closing(turn.tokens()) as given:
        for token in given:
            if first is None:
                assert turn.logits is not None
                first = turn.logits.copy()
            if len(answer) == n:
                break
            answer.append(token)
    return turn, answer, first


@pytest.fixture
def expected(make_llama: MakeLlama) -> Callable[..., Any]:
    """Logits (n_vocab,) after a stream of tokens, by a single stream that reads it from its start."""
    llm = make_llama(**F32)

    def logits(*parts: Sequence[int] | Tokens) -> Any:
        llm.reset()
        for part in parts:
            if len(part):
                llm.eval(part)
        return llm.scores[-1].copy()

    return logits


def joined(messages: list[list[int]]) -> list[int]:
    return [token for message in messages for token in message]


def assert_close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, atol=5e-4, rtol=0)


# --- one conversation -------------------------------------------------------------------------------------------------


def test_a_long_prompt_and_its_answer(make_engine: MakeEngine, expected: Any, tokens: Tokens) -> None:
    engine = make_engine()
    turn, answer, first = run(engine, tokens[:1000], 30)
    assert_close(first, expected(tokens[:1000]))
    assert (turn.n_cached, turn.n_read, turn.position) == (0, 1000, 1030)
    assert len(answer) == 30
    stream = list(tokens[:1000])
    for token in answer:  # greedy: each is the likeliest after those before it
        assert token == int(expected(stream).argmax())
        stream.append(token)


def test_a_resent_history_costs_what_is_new(make_engine: MakeEngine, expected: Any, tokens: Tokens) -> None:
    engine = make_engine()
    history = tokens[:700].tolist()
    for i in range(5):
        turn, answer, first = run(engine, history, 20)
        assert turn.n_cached == (0 if i == 0 else len(history) - 15)
        assert turn.n_read == len(history) - turn.n_cached
        assert_close(first, expected(history))
        history += answer + tokens[700 + 15 * i : 715 + 15 * i].tolist()


def test_regenerate_reads_one_token(make_engine: MakeEngine, expected: Any, tokens: Tokens) -> None:
    engine = make_engine()
    prompt = tokens[:500]
    for n_answer in (200, 10, 0, 300):  # beyond what can be rolled back, within it, nothing at all
        turn, _, first = run(engine, prompt, n_answer)
        assert_close(first, expected(prompt))
    assert turn.n_read == 1
    assert engine.counters.restored >= 1


def test_an_edit_costs_the_message_in_question(make_engine: MakeEngine, expected: Any, tokens: Tokens) -> None:
    engine = make_engine()
    messages = [tokens[i : i + 90].tolist() for i in range(0, 900, 90)]
    starts = list(range(90, 900, 90))
    run(engine, joined(messages), 100, boundaries=starts)
    for k in (9, 8, 7):
        edited = joined(messages[:k]) + tokens[1000 : 1000 + 50 + k].tolist()
        turn, _, first = run(engine, edited, 0, boundaries=starts[:k])
        assert turn.n_cached >= 90 * k
        assert_close(first, expected(edited))


def test_an_edit_far_back_costs_no_more_than_the_way_from_the_end(
    make_engine: MakeEngine, expected: Any, tokens: Tokens
) -> None:
    engine = make_engine()
    boundaries = list(range(50, 2500, 50))
    run(engine, tokens[:2500], 0, boundaries=boundaries)
    for at in (1200, 600, 2000):
        edited = np.concatenate([tokens[:at], tokens[2600:2620]])
        turn, _, first = run(engine, edited, 0)
        assert at - turn.n_cached <= 2500 - at + 50
        assert turn.n_cached > 0 or at < 1200
        assert_close(first, expected(edited))


def test_a_branch_leaves_the_other_as_it_was(make_engine: MakeEngine, expected: Any, tokens: Tokens) -> None:
    engine = make_engine(parallel=1)
    system = tokens[:40].tolist()
    first = system + tokens[100:400].tolist()
    second = system + tokens[500:800].tolist()
    turn, answer, _ = run(engine, first, 10, boundaries=[40])
    turn, _, logits = run(engine, second, 10, boundaries=[40])
    assert turn.n_cached == 40
    assert_close(logits, expected(second))
    longer = first + answer + tokens[800:820].tolist()
    turn, _, logits = run(engine, longer, 0)
    assert turn.n_cached == len(first + answer)
    assert_close(logits, expected(longer))


def test_the_same_prompt_again_and_a_shorter_one(make_engine: MakeEngine, expected: Any, tokens: Tokens) -> None:
    engine = make_engine()
    run(engine, tokens[:300], 5)
    turn, _, first = run(engine, tokens[:300], 0)
    assert turn.n_read == 1
    assert_close(first, expected(tokens[:300]))
    turn, _, first = run(engine, tokens[:290], 0)
    assert_close(first, expected(tokens[:290]))
    turn, _, first = run(engine, tokens[:1], 0)
    assert_close(first, expected(tokens[:1]))


# --- front ends that drop messages ------------------------------------------------------------------------------------


def test_dropped_messages_are_not_forgotten(make_engine: MakeEngine, expected: Any, tokens: Tokens) -> None:
    engine = make_engine()
    system, old, kept = tokens[:20].tolist(), tokens[100:400].tolist(), tokens[400:600].tolist()
    _, answer, _ = run(engine, system + old + kept, 10)
    stream = system + old + kept + answer
    shown = system + kept + answer
    for i in range(3):  # the next turns go on from there, with still more dropped at the last
        new = tokens[700 + 20 * i : 720 + 20 * i].tolist()
        if i == 2:
            shown = system + shown[120:]
        turn, answer, first = run(engine, shown + new, 10)
        assert turn.n_cached == len(shown)
        assert_close(first, expected(stream + new))
        stream += new + answer
        shown += new + answer
        assert turn.position == len(stream)
    assert engine.counters.shifted == 2


def test_a_shifted_conversation_can_be_regenerated_and_edited(
    make_engine: MakeEngine, expected: Any, tokens: Tokens
) -> None:
    engine = make_engine()
    system, old, kept = tokens[:20].tolist(), tokens[100:400].tolist(), tokens[400:600].tolist()
    _, answer, _ = run(engine, system + old + kept, 10)
    shown, new = system + kept + answer, tokens[700:760].tolist()
    for n_answer in (150, 0):
        turn, _, first = run(engine, shown + new, n_answer)
        assert_close(first, expected(system + old + kept + answer + new))
    assert turn.n_read == 1
    edited = shown + tokens[800:830].tolist()
    turn, _, first = run(engine, edited, 0)
    assert_close(first, expected(system + old + kept + answer + tokens[800:830].tolist()))


def test_dropped_messages_are_reread_if_asked_for(make_engine: MakeEngine, expected: Any, tokens: Tokens) -> None:
    engine = make_engine(on_trim="reread")
    system, old, kept = tokens[:20].tolist(), tokens[100:400].tolist(), tokens[400:600].tolist()
    run(engine, system + old + kept, 0)
    shorter = system + kept + tokens[700:720].tolist()
    turn, _, first = run(engine, shorter, 0)
    assert turn.n_cached <= len(system)
    assert_close(first, expected(shorter))


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
    reading: list[Progress] = []
    long = engine.begin(np.tile(tokens, 20), greedy(), on_progress=reading.append)
    while not reading:
        time.sleep(0.001)
    _, answer, _ = run(engine, tokens[:50], 20)
    assert len(answer) == 20
    assert long.n_read < 60_000  # still at it
    long.cancel()
    with pytest.raises(TurnCancelled):
        next(long.tokens())


def test_cancelling_stops_reading_and_keeps_what_was_read(
    make_engine: MakeEngine, expected: Any, tokens: Tokens
) -> None:
    engine = make_engine()
    text = np.tile(tokens, 4)
    seen = threading.Event()
    turn = engine.begin(text, greedy(), on_progress=lambda progress: seen.set() if progress.n_read > 500 else None)
    assert seen.wait(60)
    turn.cancel()
    with pytest.raises(TurnCancelled):
        next(turn.tokens())
    n_read = turn.n_read
    assert 500 < n_read < len(text)
    again, _, first = run(engine, text[: n_read + 10], 0)
    assert again.n_cached == n_read
    assert_close(first, expected(text[: n_read + 10]))


def test_those_who_wait_can_leave(make_engine: MakeEngine, tokens: Tokens) -> None:
    engine = make_engine(parallel=1)
    busy = engine.begin(tokens[:20], greedy())
    stream = busy.tokens()
    next(stream)
    waiting = engine.begin(tokens[:30], greedy())
    after = engine.begin(tokens[:40], greedy())
    assert engine.n_waiting == 2
    waiting.cancel()
    with pytest.raises(TurnCancelled):
        next(waiting.tokens())
    stream.close()
    with contextlib.closing(after.tokens()) as given:
        next(given)
    assert engine.n_waiting == engine.n_busy == 0


def test_prompt_logits_come_part_by_part(make_engine: MakeEngine, make_llama: MakeLlama, tokens: Tokens) -> None:
    engine = make_engine()
    turn = engine.begin(tokens[:300], greedy(), wants_prompt_logits=True)
    rows = np.concatenate([logits for _, logits in turn.prompt_parts()])
    llm = make_llama(logits_all=True, n_batch=300, **F32)
    llm.eval(tokens[:300])
    np.testing.assert_allclose(rows, llm.scores, atol=5e-4, rtol=0)


def test_wrong_requests(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match="prompt is empty"):
        engine.begin([], greedy())
    close(engine)
    with pytest.raises(RuntimeError, match="has been closed"):
        engine.begin([1], greedy())


# --- out of the context and back --------------------------------------------------------------------------------------


def test_conversations_take_turns_in_one_sequence(make_engine: MakeEngine, expected: Any, tokens: Tokens) -> None:
    engine = make_engine(parallel=1)
    histories = [tokens[i : i + 150 + i // 4].tolist() for i in range(0, 1000, 250)]
    for turn_number in range(3):
        for history in histories:
            turn, answer, first = run(engine, history, 12)
            if turn_number:
                assert turn.n_cached == len(history) - 7
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
            turn, answer, first = run(engine, history, 12)
            if n_parallel != 1:
                assert turn.n_cached == len(history) - 7
            assert_close(first, expected(history))
            history += answer + tokens[2000 + n_parallel : 2007 + n_parallel].tolist()
        close(engine)


def test_budgets_are_kept(make_engine: MakeEngine, expected: Any, tokens: Tokens, tmp_path: Path) -> None:
    probe = make_engine(parallel=1)
    run(probe, tokens[:300], 0)
    state_bytes = probe.call(lambda: probe.slots[0].sequence.save().data.nbytes)
    memory, disk = 3 * state_bytes, 8 * state_bytes
    engine = make_engine(parallel=1, folder=tmp_path, memory_budget=memory, disk_budget=disk)
    for i in range(0, 2000, 100):
        run(engine, tokens[i : i + 300], 5)
        assert engine.call(lambda: engine.store.memory_bytes) <= memory
    engine.close()
    on_disk = sum(file.stat().st_size for file in tmp_path.rglob("*.state"))
    assert 4 * state_bytes < on_disk <= disk + 20 * 200
    assert 3 <= len(engine.store.conversations) < 20
    again = make_engine(parallel=1, folder=tmp_path, memory_budget=memory, disk_budget=disk)
    turn, _, first = run(again, tokens[1900:2210], 0)  # the last one is still there
    assert turn.n_cached >= 299
    assert_close(first, expected(tokens[1900:2210]))


def test_a_damaged_file_is_read_again_from_the_text(
    make_engine: MakeEngine, expected: Any, tokens: Tokens, tmp_path: Path
) -> None:
    engine = make_engine(parallel=1, folder=tmp_path)
    _, answer, _ = run(engine, tokens[:300], 5)
    close(engine)
    for file in tmp_path.rglob("*.state"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    engine = make_engine(parallel=1, folder=tmp_path)
    history = tokens[:300].tolist() + answer + tokens[400:410].tolist()
    turn, _, first = run(engine, history, 0)
    assert turn.n_cached == 0
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
    turn, _, other = run(engine, tokens[:500], 0)  # the same tokens with other sinks are another stream
    assert turn.n_cached == 0
    assert np.abs(other - first).max() > 1e-2
