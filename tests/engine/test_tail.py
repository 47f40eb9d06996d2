"""Prefill "tail": of a long prompt only the sinks and the last windows are processed, exactly as the rule has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import assert_close, run
from conftest import F32, MakeEngine, MakeLlama
from reference.rule import Rule
from reference.transformer import Transformer

from lminf_edge import Checkpoint, Llama, LMInfConfig
from lminf_edge.cache.token_log import Tokens
from lminf_edge.engine.request import Request
from lminf_edge.errors import UserError

N_GLOBAL, N_LOCAL, N_TAIL = 4, 64, 2
TAIL = LMInfConfig(n_global=N_GLOBAL, n_local=N_LOCAL, prefill="tail", n_tail=N_TAIL)
LEAST = N_GLOBAL + N_TAIL * N_LOCAL  # tokens that are processed of any long prompt
SHORTEST = LEAST + N_LOCAL  # prompt of which some are skipped

Logits = Callable[..., Any]


@pytest.fixture
def by_the_rule(make_llama: MakeLlama) -> Logits:
    """Logits (n_vocab,) after a prompt of which `skipped`, stretches (start, end) of it, are not processed.

    By a stream that is told what to process and what to skip.
    """
    streams: dict[tuple[int, int], Llama] = {}

    def logits(
        prompt: Sequence[int] | Tokens, *skipped: tuple[int, int], n_global: int = N_GLOBAL, n_local: int = N_LOCAL
    ) -> Any:
        key = n_global, n_local
        if key not in streams:
            streams[key] = make_llama(lminf=LMInfConfig(n_global=n_global, n_local=n_local), **F32)
        llm, text = streams[key], np.asarray(prompt, dtype=np.int32)
        llm.reset()
        for start, end in skipped:
            llm.eval(text[llm.n_tokens : start])
            llm.slot.skip(text[start:end])
        llm.eval(text[llm.n_tokens :])
        return llm.scores[-1].copy()

    return logits


def skipped(n_prompt: int, n_known: int = N_GLOBAL) -> tuple[int, int]:
    return n_known, n_prompt - N_TAIL * N_LOCAL


# --- one prompt -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_prompt", [SHORTEST, SHORTEST + 1, 1000, 3000])
def test_a_cold_prompt_costs_its_sinks_and_its_last_windows(
    make_engine: MakeEngine, by_the_rule: Logits, expected: Any, tokens: Tokens, n_prompt: int
) -> None:
    engine = make_engine(lminf=TAIL)
    prompt = tokens[:n_prompt]
    stats, answer, first = run(engine, prompt, 9)
    assert (stats.n_cached, stats.n_prefilled, stats.n_skipped) == (0, LEAST, n_prompt - LEAST)
    assert stats.position == n_prompt + 9
    assert engine.counters.skipped_tokens == n_prompt - LEAST
    assert engine.slots[0].sequence.position == len(engine.slots[0]) == n_prompt + 9
    assert_close(first, by_the_rule(prompt, skipped(n_prompt)))
    text = prompt.tolist()
    for token in answer:
        assert token == int(by_the_rule(text, skipped(n_prompt)).argmax())
        text.append(token)
    assert np.abs(first - expected(prompt)).max() > 1e-2  # it is not as having processed all of it


@pytest.mark.parametrize(
    ("n_global", "skips"),
    [(N_GLOBAL, [skipped(700)]), (0, [(0, 600)]), (30, [(30, 400), (450, 620)]), (N_GLOBAL, [(60, 560)])],
)
def test_a_stream_that_skips_is_as_the_reference_has_it(
    nano_f32_path: str, by_the_rule: Logits, tokens: Tokens, n_global: int, skips: list[tuple[int, int]]
) -> None:
    processed = np.ones(700, dtype=bool)
    for start, end in skips:
        processed[start:end] = False
    positions = np.flatnonzero(processed)
    transformer = Transformer(nano_f32_path)
    hidden = transformer.hidden(tokens[positions], Rule(N_LOCAL, n_global), positions=positions)
    assert_close(by_the_rule(tokens[:700], *skips, n_global=n_global), transformer.head(hidden[-1:])[0])


@pytest.mark.parametrize("n_prompt", [1, N_GLOBAL, LEAST, SHORTEST - 1])
def test_a_prompt_that_is_not_much_longer_is_processed_in_full(
    make_engine: MakeEngine, expected: Any, tokens: Tokens, n_prompt: int
) -> None:
    engine = make_engine(lminf=TAIL)
    stats, _, first = run(engine, tokens[:n_prompt])
    assert (stats.n_prefilled, stats.n_skipped, stats.position) == (n_prompt, 0, n_prompt)
    assert_close(first, expected(tokens[:n_prompt]))


@pytest.mark.parametrize(("n_global", "n_local", "n_tail"), [(0, 64, 1), (1, 16, 3), (200, 32, 2), (5, 100, 1)])
def test_other_windows(
    make_engine: MakeEngine, by_the_rule: Logits, tokens: Tokens, n_global: int, n_local: int, n_tail: int
) -> None:
    engine = make_engine(lminf=LMInfConfig(n_global=n_global, n_local=n_local, prefill="tail", n_tail=n_tail))
    stats, _, first = run(engine, tokens[:900])
    assert stats.n_prefilled == n_global + n_tail * n_local
    assert stats.n_skipped == 900 - stats.n_prefilled
    resume = (n_global, 900 - n_tail * n_local)
    assert_close(first, by_the_rule(tokens[:900], resume, n_global=n_global, n_local=n_local))


def test_what_the_request_says_goes_before_what_the_engine_does(
    make_engine: MakeEngine, by_the_rule: Logits, expected: Any, tokens: Tokens
) -> None:
    engine = make_engine(lminf=TAIL)
    stats, _, first = run(engine, tokens[:600], prefill="full")
    assert (stats.n_prefilled, stats.n_skipped) == (600, 0)
    assert_close(first, expected(tokens[:600]))
    engine = make_engine()
    stats, _, first = run(engine, tokens[:600], prefill="tail")
    assert (stats.n_prefilled, stats.n_skipped) == (LEAST, 600 - LEAST)
    assert_close(first, by_the_rule(tokens[:600], skipped(600)))


def test_the_logits_of_a_prompt_are_those_of_all_of_it(make_engine: MakeEngine, tokens: Tokens) -> None:
    engine = make_engine(lminf=TAIL)
    run(engine, tokens[:600])
    request = Request(tokens[:600], wants_prompt_logits=True)
    engine.submit(request)
    assert sum(len(part.logits) for part in engine.prompt_logits(request)) == 600
    assert request.stats.n_skipped == request.stats.n_cached == 0


@pytest.mark.parametrize("n_sinks", [0, 30, 100])
def test_pinned_sinks_are_processed(make_engine: MakeEngine, by_the_rule: Logits, tokens: Tokens, n_sinks: int) -> None:
    engine = make_engine(lminf=TAIL, max_sinks=100)
    stats, _, first = run(engine, tokens[:900], n_sinks=n_sinks)
    assert stats.n_prefilled == n_sinks + N_TAIL * N_LOCAL
    assert_close(first, by_the_rule(tokens[:900], skipped(900, n_sinks), n_global=n_sinks))


def test_skipping_and_other_streams_share_their_batches(
    make_engine: MakeEngine, by_the_rule: Logits, expected: Any, tokens: Tokens
) -> None:
    engine = make_engine(lminf=TAIL)
    requests = [
        Request(tokens[start : start + n], max_tokens=1, wants_logits=True, prefill=prefill)
        for start, n, prefill in ((0, 1500, "tail"), (500, 700, "full"), (100, 1200, "tail"))
    ]
    for request in requests:
        engine.submit(request)
    for request in requests:
        [output] = list(engine.stream(request))
        n = len(request.prompt)
        tail = request.prefill == "tail"
        assert_close(output.logits, by_the_rule(request.prompt, skipped(n)) if tail else expected(request.prompt))


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_growing_conversation_skips_no_more(make_engine: MakeEngine, by_the_rule: Logits, tokens: Tokens) -> None:
    engine = make_engine(lminf=TAIL)
    history = tokens[:800].tolist()
    cold = skipped(800)
    for i, n_new in enumerate((0, 1, 15, 64, 128, N_TAIL * N_LOCAL + N_LOCAL - 1, 9)):
        history += tokens[800 + 100 * i : 800 + 100 * i + n_new].tolist()
        stats, answer, first = run(engine, history, 12)
        assert stats.n_cached == (len(history) - n_new if i else 0)
        assert stats.n_skipped == (0 if i else 800 - LEAST)
        assert stats.n_prefilled == (n_new if i else LEAST)
        assert stats.position == len(history) + 12
        assert_close(first, by_the_rule(history, cold))
        history += answer


def test_many_new_tokens_are_skipped_as_well(make_engine: MakeEngine, by_the_rule: Logits, tokens: Tokens) -> None:
    engine = make_engine(lminf=TAIL)
    history = tokens[:100].tolist()
    skips: list[tuple[int, int]] = []
    for i, n_new in enumerate((0, N_TAIL * N_LOCAL + N_LOCAL, 700, 20)):
        n_known = len(history)
        history += tokens[500 * i : 500 * i + n_new].tolist()
        stats, answer, first = run(engine, history, 7)
        assert stats.n_cached == (n_known if i else 0)
        if n_new > 20:
            skips.append(skipped(len(history), n_known))
            assert stats.n_skipped == n_new - N_TAIL * N_LOCAL
        assert stats.position == len(history) + 7
        assert_close(first, by_the_rule(history, *skips))
        history += answer
    assert engine.slots[0].n_skipped == sum(end - start for start, end in skips)


def test_regenerating_costs_one_token(make_engine: MakeEngine, by_the_rule: Logits, tokens: Tokens) -> None:
    engine = make_engine(lminf=TAIL)
    expected = by_the_rule(tokens[:700], skipped(700))
    for i, n_answer in enumerate((300, 10, 0, 200, 0)):  # beyond what can be rolled back, within it, nothing at all
        stats, _, first = run(engine, tokens[:700], n_answer)
        assert_close(first, expected)
        assert i == 0 or (stats.n_prefilled <= 1 and stats.n_skipped == 0)
    assert engine.counters.restored >= 1


@pytest.mark.parametrize("at", [2, N_GLOBAL, 300, 700 - N_TAIL * N_LOCAL - 1])
def test_an_edit_before_or_among_what_was_skipped_begins_anew(
    make_engine: MakeEngine, by_the_rule: Logits, tokens: Tokens, at: int
) -> None:
    engine = make_engine(lminf=TAIL)
    run(engine, tokens[:700], 5, boundaries=range(50, 700, 50))
    edited = tokens[:700].copy()
    edited[at] ^= 1
    stats, _, first = run(engine, edited)
    assert stats.n_cached <= N_GLOBAL
    assert stats.n_prefilled + stats.n_cached == LEAST
    assert_close(first, by_the_rule(edited, skipped(700)))


def test_an_edit_after_what_was_skipped_goes_back_to_there(
    make_engine: MakeEngine, by_the_rule: Logits, tokens: Tokens
) -> None:
    engine = make_engine(lminf=TAIL)
    run(engine, tokens[:700], 5, boundaries=[300, 600, 650])
    for at in (660, 610):
        edited = [*tokens[:at].tolist(), *tokens[1000:1030].tolist()]
        stats, _, first = run(engine, edited, boundaries=[300, 600, 650][: 3 - (at < 650)])
        assert stats.n_cached >= at - 50
        assert stats.n_skipped == 0
        assert_close(first, by_the_rule(edited, skipped(700)))


@pytest.mark.parametrize("memory_budget", [0, 1 << 30])
def test_displaced_and_restarted(
    make_engine: MakeEngine, by_the_rule: Logits, tokens: Tokens, tmp_path: Path, memory_budget: int
) -> None:
    histories = [tokens[i : i + 500 + i // 2].tolist() for i in (0, 400)]
    colds = [skipped(len(history)) for history in histories]
    for turn in range(4):
        if turn % 2 == 0:
            engine = make_engine(lminf=TAIL, parallel=1, folder=tmp_path, memory_budget=memory_budget)
        for history, cold in zip(histories, colds, strict=True):
            stats, answer, first = run(engine, history, 12, label="chat", n_system=3)
            assert (stats.n_skipped == 0) == (turn > 0)
            assert stats.n_cached == (len(history) - 7 if turn else 0)
            assert stats.position == len(history) + 12
            assert_close(first, by_the_rule(history, cold))
            history += answer + tokens[2000 + turn : 2007 + turn].tolist()
        if turn % 2:
            engine.close()


def test_a_cancelled_prefill_leaves_a_stream_that_is_what_it_says(
    make_engine: MakeEngine, by_the_rule: Logits, tokens: Tokens
) -> None:
    engine = make_engine(lminf=TAIL)
    scheduler = engine.scheduler
    for n_steps in range(1, 5):
        prompt = tokens[100 * n_steps : 100 * n_steps + 800]
        request = Request(prompt)
        scheduler.prepare(request)

        def work(request: Request = request, n_steps: int = n_steps) -> None:
            scheduler.submit(request)
            for _ in range(n_steps):
                scheduler.step()
            scheduler.cancel(request)

        engine.call(work)
        stats, _, first = run(engine, prompt)
        assert stats.n_prefilled <= LEAST
        assert_close(first, by_the_rule(prompt, skipped(800)))


# --- Llama ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def llm(make_llama: MakeLlama) -> Llama:
    return make_llama(lminf=TAIL, **F32)


def likeliest(llm: Llama, prompt: Sequence[int], n: int) -> list[int]:
    generator = llm.generate(prompt, temp=0.0)
    found = [next(generator) for _ in range(n)]
    generator.close()
    return found


def by_argmax(by_the_rule: Logits, prompt: Sequence[int], n: int, *skips: tuple[int, int]) -> list[int]:
    text = list(prompt)
    for _ in range(n):
        text.append(int(by_the_rule(text, *skips).argmax()))
    return text[len(prompt) :]


def test_llama_skips_what_it_may(llm: Llama, by_the_rule: Logits, tokens: Tokens) -> None:
    prompt = tokens[:1000].tolist()
    assert likeliest(llm, prompt, 6) == by_argmax(by_the_rule, prompt, 6, skipped(1000))
    info = llm.stream_info()
    assert (info.position, info.skipped) == (1005, 1000 - LEAST)
    assert llm.n_tokens == 1005
    assert llm.input_ids[:1000].tolist() == prompt
    assert_close(llm.scores[-1], by_the_rule(llm.input_ids, skipped(1000)))
    longer = llm.input_ids.tolist() + tokens[2000:2020].tolist()
    assert llm.reach(np.array(longer, dtype=np.int32)) == 0  # unless the request says that it may have skipped
    assert likeliest(llm, longer, 3) == by_argmax(by_the_rule, longer, 3, skipped(1000))
    assert llm.stream_info().skipped == 1000 - LEAST


def test_llama_completes_with_a_tail(make_llama: MakeLlama, llm: Llama, tokens: Tokens) -> None:
    prompt = tokens[:1000].tolist()
    answer = llm.create_completion(prompt, max_tokens=4, temperature=0.0)
    assert answer["usage"]["prompt_tokens"] == 1000
    assert llm.stream_info().skipped == 1000 - LEAST
    again = llm.create_completion(prompt, max_tokens=4, temperature=0.0)
    assert again["choices"] == answer["choices"]


def test_llama_processes_all_that_it_is_told_to(llm: Llama, expected: Any, tokens: Tokens) -> None:
    llm.eval(tokens[:1000])
    assert llm.stream_info().skipped == 0
    assert_close(llm.scores[-1], expected(tokens[:1000]))


def test_llama_goes_back_to_the_skip_and_not_across(llm: Llama, by_the_rule: Logits, tokens: Tokens) -> None:
    prompt = tokens[:1000].tolist()
    likeliest(llm, prompt, 1)
    for n_tokens in (700, N_GLOBAL, 2):
        with pytest.raises(UserError, match="cannot go back to"):
            llm.n_tokens = n_tokens
        assert llm.n_tokens == llm.stream_info().position == 1000
    llm.n_tokens = 980
    llm.eval([99])
    assert_close(llm.scores[-1], by_the_rule([*prompt[:980], 99], skipped(1000)))
    llm.n_tokens = 0
    assert llm.stream_info().skipped == 0


def test_llamas_checkpoints_remember_what_was_skipped(
    make_llama: MakeLlama, llm: Llama, by_the_rule: Logits, tokens: Tokens, tmp_path: Path
) -> None:
    prompt = tokens[:1000].tolist()
    likeliest(llm, prompt, 1)
    llm.checkpoint().save(tmp_path / "a.ckpt")
    checkpoint = Checkpoint.load(tmp_path / "a.ckpt")
    assert (checkpoint.position, checkpoint.n_skipped) == (1000, 1000 - LEAST)
    for config in (TAIL, LMInfConfig(n_global=N_GLOBAL, n_local=N_LOCAL)):
        other = make_llama(lminf=config, **F32)
        other.restore(checkpoint)
        assert other.stream_info().skipped == 1000 - LEAST
        other.eval([99])
        assert_close(other.scores[-1], by_the_rule([*prompt, 99], skipped(1000)))


def test_llama_asked_for_all_does_not_go_on_from_what_skipped(
    make_llama: MakeLlama, llm: Llama, expected: Any, tokens: Tokens
) -> None:
    prompt = tokens[:600].tolist()
    likeliest(llm, prompt, 1)
    full = make_llama(**F32)
    full.restore(llm.checkpoint())
    [token] = likeliest(full, [*prompt, 99], 1)
    assert full.stream_info().skipped == 0
    assert token == int(expected([*prompt, 99]).argmax())


def test_llama_keeps_checkpoints_of_skipped_streams_in_its_folder(
    make_llama: MakeLlama, by_the_rule: Logits, tokens: Tokens, tmp_path: Path
) -> None:
    prompt = tokens[:1000].tolist()
    first = make_llama(lminf=TAIL, checkpoint_folder=tmp_path, **F32)
    answer = likeliest(first, prompt, 5)
    first.close()
    again = make_llama(lminf=TAIL, checkpoint_folder=tmp_path, **F32)
    assert likeliest(again, prompt, 5) == answer
    assert again.scheduler.counters.prefilled_tokens <= 1
    assert again.stream_info().skipped == 1000 - LEAST
    again.close()
    full = make_llama(checkpoint_folder=tmp_path, **F32)
    likeliest(full, prompt, 1)
    assert full.scheduler.counters.prefilled_tokens == 1000


def test_a_llama_of_another_kind_leaves_the_folder_as_it_is(
    make_llama: MakeLlama, tokens: Tokens, tmp_path: Path
) -> None:
    prompt = tokens[:300].tolist()
    for config, n_expected in ((TAIL, 260), (LMInfConfig(n_global=4, n_local=80), 300), (TAIL, 0)):
        llm = make_llama(lminf=config, checkpoint_folder=tmp_path, **F32)
        likeliest(llm, prompt, 2)
        assert llm.scheduler.counters.prefilled_tokens in range(n_expected - 200, n_expected + 2)
        assert llm.scheduler.store.failures.n_damaged == 0
        llm.close()
