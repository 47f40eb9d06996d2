"""The scheduler without a thread: steps made by hand, over an engine's own slots and store."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from conftest import MakeLlama

from lminf_edge import LMInfConfig
from lminf_edge.cache.store import CheckpointStore
from lminf_edge.cache.token_log import Tokens, as_tokens
from lminf_edge.engine.params import SamplingParams
from lminf_edge.engine.request import End, Output, Phase, Request, RequestCancelled
from lminf_edge.engine.scheduler import Scheduler
from lminf_edge.errors import UserError
from lminf_edge.model import Model

GREEDY = SamplingParams(temperature=0.0)
# with everything in f32, another order of additions is all that can differ
SETTINGS: dict[str, Any] = {"verbose": False, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0}

MakeScheduler = Callable[..., Scheduler]


@pytest.fixture
def make_scheduler(nano_f32_path: str) -> Iterator[MakeScheduler]:
    """Schedulers of two slots with a window of 64 + 4 tokens, unless told otherwise."""
    made: list[Scheduler] = []

    def make(n_slots: int = 2, lminf: LMInfConfig | None = None, **kwargs: Any) -> Scheduler:
        model = Model.load(nano_f32_path, lminf or LMInfConfig(n_global=4, n_local=64), None, n_slots, **SETTINGS)
        made.append(Scheduler(model, CheckpointStore(model.identity), **kwargs))
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close()
        scheduler.model.close()


def ask(scheduler: Scheduler, prompt: Sequence[int] | Tokens, max_tokens: int = 8, **kwargs: Any) -> Request:
    request = Request(as_tokens(prompt), GREEDY, max_tokens=max_tokens, ignore_eog=True, **kwargs)
    scheduler.prepare(request)
    scheduler.submit(request)
    return request


def taken(request: Request) -> list[int]:
    """The tokens that have come so far; asks for one more. Raises what went wrong."""
    tokens = []
    request.n_asked = request.stats.n_generated + 1
    try:
        while True:
            output = request.outputs.get_nowait()
            if isinstance(output, BaseException):
                raise output
            if isinstance(output, Output):
                tokens.append(output.token)
    except queue.Empty:
        return tokens


def run(scheduler: Scheduler, *requests: Request) -> list[list[int]]:
    """Steps until all requests have ended, and finishes each when it has."""
    tokens: list[list[int]] = [[] for _ in requests]
    unfinished = list(range(len(requests)))
    while unfinished:
        for i in unfinished:
            tokens[i] += taken(requests[i])
        for i in [i for i in unfinished if requests[i].phase is Phase.FINISHED]:
            tokens[i] += taken(requests[i])
            scheduler.finish(requests[i], len(tokens[i]))
            unfinished.remove(i)
        assert scheduler.has_work() or not unfinished
        scheduler.step()
    return tokens


@pytest.fixture
def alone(make_llama: MakeLlama) -> Callable[[Sequence[int] | Tokens, int], list[int]]:
    """The likeliest tokens after a prompt, by a stream of its own."""
    llm = make_llama(type_k=0, type_v=0)

    def tokens(prompt: Sequence[int] | Tokens, n: int) -> list[int]:
        llm.reset()
        llm.eval(as_tokens(prompt))
        found = []
        for _ in range(n):
            found.append(int(llm.scores[-1].argmax()))
            llm.eval([found[-1]])
        return found

    return tokens


def test_one_request(make_scheduler: MakeScheduler, alone: Any, tokens: Tokens) -> None:
    scheduler = make_scheduler()
    request = ask(scheduler, tokens[:300], 12)
    assert (request.phase, scheduler.n_waiting, scheduler.n_busy) == (Phase.WAITING, 1, 0)
    scheduler.step()
    assert (request.phase, scheduler.n_waiting, scheduler.n_busy) == (Phase.PREFILL, 0, 1)
    [got] = run(scheduler, request)
    assert got == alone(tokens[:300], 12)
    stats = request.stats
    assert (stats.n_cached, stats.n_prefilled, stats.n_skipped, stats.n_generated) == (0, 300, 0, 12)
    assert stats.position == 311  # the last token is not processed before it is needed
    assert request.finish_reason == "length"
    assert not scheduler.has_work()


def test_a_step_serves_all(make_scheduler: MakeScheduler, alone: Any, tokens: Tokens) -> None:
    scheduler = make_scheduler(n_slots=3)
    prompts = [tokens[i : i + 100 + i // 5] for i in range(0, 1500, 300)]  # more than there are slots
    got = run(scheduler, *(ask(scheduler, prompt) for prompt in prompts))
    assert got == [alone(prompt, 8) for prompt in prompts]
    assert scheduler.counters.batches < 8 * len(prompts) + 20


def test_what_is_generated_ahead_is_taken_back(make_scheduler: MakeScheduler, alone: Any, tokens: Tokens) -> None:
    scheduler = make_scheduler(n_ahead=8)
    request = ask(scheduler, tokens[:200], 100)
    for _ in range(30):
        scheduler.step()
    assert not scheduler.has_work()
    got = taken(request)
    assert len(got) == 9  # eight ahead of the one that is due
    [slot] = [slot for slot in scheduler.slots if slot.request is request]
    assert len(slot) == 208
    scheduler.finish(request, 3)
    assert len(slot) == 202
    assert slot.sequence.position == 202
    assert scheduler.counters.wasted_tokens == 6
    longer = [*tokens[:200], *got[:2], *tokens[300:310]]
    again = ask(scheduler, longer)
    assert run(scheduler, again) == [alone(longer, 8)]
    assert again.stats.n_cached == 202


def test_an_end_token_ends_it(make_scheduler: MakeScheduler, tokens: Tokens) -> None:
    scheduler = make_scheduler()
    end = next(iter(scheduler.model.eog_tokens))
    request = Request(tokens[:20], SamplingParams(temperature=0.0, logit_bias={end: 1000.0}))
    scheduler.prepare(request)
    scheduler.submit(request)
    assert run(scheduler, request) == [[end]]
    assert request.finish_reason == "stop"


def test_drafts_come_in_one_batch(make_scheduler: MakeScheduler, alone: Any, tokens: Tokens) -> None:
    expected = alone(tokens[:100], 40)
    n_asked = 0

    def draft(recent: Tokens) -> list[int]:
        nonlocal n_asked
        n_asked += 1
        text = [*tokens[:100], *expected]
        end = next(i for i in range(100, len(text) + 1) if text[:i][-30:] == recent[-30:].tolist())
        found = text[end : end + 6]
        if n_asked % 3 == 0 and len(found) > 2:
            found[2] += 1  # a wrong one, and all after it
        return found

    scheduler = make_scheduler()
    plain = ask(scheduler, tokens[:100], 40)
    before = scheduler.counters.batches
    assert run(scheduler, plain) == [expected]
    n_plain = scheduler.counters.batches - before
    scheduler = make_scheduler()
    assert run(scheduler, ask(scheduler, tokens[:100], 40, draft_model=draft)) == [expected]
    assert scheduler.counters.batches < n_plain / 2


def test_a_batch_that_fails_fails_the_one_at_fault(
    make_scheduler: MakeScheduler, alone: Any, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make_scheduler()
    good, bad = ask(scheduler, tokens[:150]), ask(scheduler, tokens[400:550])
    decode = scheduler.model.batch.decode

    def failing(runs: Any) -> Any:
        if any(run.sequence is scheduler.slots[1].sequence and run.sequence.position > 60 for run in runs):
            raise RuntimeError("this sequence is broken")
        return decode(runs)

    monkeypatch.setattr(scheduler.model.batch, "decode", failing)
    while bad.phase is not Phase.FINISHED:
        scheduler.step()
    with pytest.raises(RuntimeError, match="is broken"):
        taken(bad)
    assert scheduler.counters.failed == 1
    assert run(scheduler, good) == [alone(tokens[:150], 8)]


@pytest.mark.parametrize("is_processed", [True, False])
def test_a_batch_that_fails_costs_new_streams_nothing(
    make_scheduler: MakeScheduler,
    make_llama: MakeLlama,
    tokens: Tokens,
    monkeypatch: pytest.MonkeyPatch,
    is_processed: bool,
) -> None:
    """What goes back to its very beginning is still this request's stream, with its number of sinks."""
    scheduler = make_scheduler(lminf=LMInfConfig(n_global=20, n_local=64))
    requests = [ask(scheduler, tokens[i : i + 200], n_sinks=4) for i in (0, 400)]
    decode = scheduler.model.batch.decode

    def failing(runs: Any) -> Any:
        if len(runs) == 1:
            return decode(runs)
        if is_processed:
            decode(runs)
        raise RuntimeError("not together")

    monkeypatch.setattr(scheduler.model.batch, "decode", failing)
    scheduler.step()
    monkeypatch.undo()
    got = run(scheduler, *requests)
    assert scheduler.counters.failed == 0
    llm = make_llama(type_k=0, type_v=0)
    for request, answer in zip(requests, got, strict=True):
        llm.reset()
        llm.eval(request.prompt)
        for token in answer:
            assert token == int(llm.scores[-1].argmax())
            llm.eval([token])


@pytest.mark.parametrize("n_slack", [0, 1])
def test_a_stream_that_was_saved_where_it_goes_on(
    make_scheduler: MakeScheduler,
    alone: Any,
    tokens: Tokens,
    monkeypatch: pytest.MonkeyPatch,
    n_slack: int,
) -> None:
    """The checkpoint before the prompt's last token is there already."""
    scheduler = make_scheduler(n_slots=1, lminf=LMInfConfig(n_global=4, n_local=64, n_slack=n_slack))
    monkeypatch.setattr("lminf_edge.engine.scheduler.SAVE_AFTER", 0.0)
    prompt = tokens[:200]
    [answer] = run(scheduler, ask(scheduler, prompt))
    scheduler.step()
    assert scheduler.slots[0].is_saved
    for _ in range(2):
        history = [*prompt, *answer]  # of which the last is not processed
        request = ask(scheduler, history)
        assert run(scheduler, request) == [alone(history, 8)]
        assert request.stats.n_cached == len(history) - 1


def test_a_checkpoint_that_cannot_be_made_costs_nothing_else(
    make_scheduler: MakeScheduler, alone: Any, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make_scheduler(n_slots=1)

    def fail() -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(scheduler.slots[0].sequence, "save", fail)
    for start in (0, 500, 1000):
        prompt = tokens[start : start + 300]
        assert run(scheduler, ask(scheduler, prompt, boundaries=[100, 200])) == [alone(prompt, 8)]
    assert scheduler.counters.checkpoint_failures > 0
    assert scheduler.counters.failed == 0


def test_a_saved_stream_goes_on_by_one_token_without_slack(
    make_scheduler: MakeScheduler, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lminf_edge.engine.scheduler.SAVE_AFTER", 0.0)
    scheduler = make_scheduler(1, LMInfConfig(n_global=4, n_local=64, n_slack=0))
    history = tokens[:200].tolist()
    for _ in range(3):
        request = ask(scheduler, history)
        [answer] = run(scheduler, request)
        assert request.stats.n_cached in (0, len(history) - 1)
        scheduler.step()  # it is idle, and is saved
        history += answer
    assert scheduler.counters.cached_tokens > 0


def test_a_named_conversation_goes_on_after_others_of_its_name(make_scheduler: MakeScheduler, tokens: Tokens) -> None:
    scheduler = make_scheduler(n_slots=4, lminf=LMInfConfig(n_global=4, n_local=256))
    system, first, second, last, title = tokens[:8], tokens[10:30], tokens[40:60], tokens[70:80], tokens[100:150]
    begin = tokens[9:10]  # of every message
    messages = [as_tokens([*begin, *(part[part != begin[0]])]) for part in (first, second, last)]
    history = np.concatenate([system, *messages[:2]])
    settings = {"n_system": len(system), "owner": "me", "label": "chat"}
    [answer] = run(scheduler, ask(scheduler, history, 4, **settings))
    run(scheduler, ask(scheduler, np.concatenate([system[:4], title]), 4, **settings))
    trimmed = np.concatenate([system, messages[1], as_tokens(answer), messages[2]])
    request = ask(scheduler, trimmed, 4, **settings)
    run(scheduler, request)
    assert request.stats.n_cached == len(system) + len(messages[1]) + len(answer) - 1
    assert scheduler.counters.trimmed == 1
    for other, n_most in (({"label": "another"}, len(system)), ({"owner": "you"}, 0)):
        request = ask(scheduler, trimmed, 4, **{**settings, **other})
        run(scheduler, request)
        assert request.stats.n_cached <= n_most
    assert scheduler.counters.trimmed == 1


def test_cancelled_while_it_waits_and_while_it_works(make_scheduler: MakeScheduler, tokens: Tokens) -> None:
    scheduler = make_scheduler(n_slots=1)
    working, waiting = ask(scheduler, tokens[:500]), ask(scheduler, tokens[:20])
    scheduler.step()
    scheduler.cancel(waiting)
    with pytest.raises(RequestCancelled):
        taken(waiting)
    scheduler.cancel(working)
    with pytest.raises(RequestCancelled):
        taken(working)
    assert scheduler.n_busy == scheduler.n_waiting == 0
    after = ask(scheduler, tokens[:500])
    run(scheduler, after)
    assert after.stats.n_cached > 0  # what was processed is kept


def test_a_request_is_finished_while_python_ends(
    make_scheduler: MakeScheduler, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An abandoned generator ends then, and arrays have no text any more."""

    def fail(_: Request) -> str:
        raise ImportError("sys.meta_path is None, Python is likely shutting down")

    monkeypatch.setattr(Request, "__repr__", fail)
    scheduler = make_scheduler()
    request = ask(scheduler, tokens[:20])
    scheduler.step()
    scheduler.finish(request, 1)
    assert scheduler.n_busy == 0


def test_the_prompts_logits(make_scheduler: MakeScheduler, make_llama: MakeLlama, tokens: Tokens) -> None:
    scheduler = make_scheduler()
    request = Request(tokens[:300], wants_prompt_logits=True)
    scheduler.prepare(request)
    scheduler.submit(request)
    rows = []
    while True:
        scheduler.step()
        part = request.outputs.get_nowait()
        if part is End.END:
            break
        rows.append(part.logits)  # type: ignore[union-attr]
    scheduler.finish(request)
    llm = make_llama(logits_all=True, n_batch=300, type_k=0, type_v=0)
    llm.eval(tokens[:300])
    np.testing.assert_allclose(np.concatenate(rows), np.asarray(llm.scores), atol=5e-4, rtol=0)


@pytest.mark.parametrize("prompt", [[], [-1], [99_999]])
def test_prompts_that_cannot_be(make_scheduler: MakeScheduler, prompt: list[int]) -> None:
    scheduler = make_scheduler()
    with pytest.raises(UserError, match="prompt"):
        scheduler.prepare(Request(as_tokens(prompt)))
