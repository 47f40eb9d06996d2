"""The stream behind Llama: past the window, back again, and through errors and interrupts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from conftest import MakeLlama
from llama_cpp import llama_cpp as bindings
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding

from lminf_edge import Llama, LMInfConfig
from lminf_edge.cache.sequence import Run
from lminf_edge.cache.token_log import Tokens

F32 = {"type_k": 0, "type_v": 0}


class Work:
    """Counts the tokens a model processes."""

    def __init__(self, llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n_tokens = 0
        batch = llm.scheduler.model.batch
        decode = batch.decode

        def counted(runs: Sequence[Run]) -> list[int]:
            self.n_tokens += sum(len(run.tokens) for run in runs)
            return decode(runs)

        monkeypatch.setattr(batch, "decode", counted)

    def take(self) -> int:
        n_tokens, self.n_tokens = self.n_tokens, 0
        return n_tokens


def greedy(llm: Llama, prompt: Sequence[int] | Tokens, n_tokens: int, **kwargs: Any) -> list[int]:
    generated = llm.generate(prompt, temp=0.0, **kwargs)
    try:
        return [next(generated) for _ in range(n_tokens)]
    finally:
        generated.close()


def assert_agrees(llm: Llama) -> None:
    """History and cache hold the same number of tokens."""
    assert llm.n_tokens == len(llm.input_ids) == len(llm.slot) == llm.stream_info().position


# --- forward ----------------------------------------------------------------------------------------------------------


def test_figures(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama()
    assert llm.n_ctx() == 68
    start = llm.stream_info()
    assert (start.position, start.evicted, start.sink_cells, start.window_cells) == (0, 0, 0, 0)
    llm.eval(tokens[:50])
    info = llm.stream_info()
    assert (info.position, info.evicted, info.window_cells) == (50, 0, 50)
    llm.eval(tokens[50:2000])
    info = llm.stream_info()
    assert info.position == 2000
    assert info.sink_cells == 4
    assert info.evicted == 2000 - 63 - 4  # the next query sees itself, 63 more and the sinks
    assert info.kv_bytes == start.kv_bytes
    assert 64 <= info.window_cells <= llm.slot.sequence.info().n_cells
    assert_agrees(llm)
    with pytest.raises(AttributeError):
        info.position = 0  # type: ignore[misc]


def test_a_long_prompt_and_a_long_answer_pass_the_window(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama()
    response = llm.create_completion(tokens[:700].tolist(), max_tokens=300, temperature=0.0)
    assert response["usage"] == {"prompt_tokens": 700, "completion_tokens": 300, "total_tokens": 1000}
    assert response["choices"][0]["finish_reason"] == "length"
    assert llm.stream_info().position == 999  # the last token is not processed before it is needed
    assert_agrees(llm)


def test_batches_do_not_matter(make_llama: MakeLlama, tokens: Tokens) -> None:
    logits = []
    for n_batch, n_ubatch in ((512, 64), (64, 64), (37, 16), (1, 1)):
        llm = make_llama(n_batch=n_batch, n_ubatch=n_ubatch, **F32)
        llm.eval(tokens[:400])
        logits.append(llm.scores[-1])
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], atol=1e-4)


def test_positions_stay_bounded(make_llama: MakeLlama, tokens: Tokens) -> None:
    bounded = make_llama(lminf=LMInfConfig(n_global=4, n_local=64, pos_bound=1024), **F32)
    free = make_llama(**F32)
    for llm in (bounded, free):
        llm.eval(tokens[:2500])
    info = bounded.stream_info()
    assert info.rebases > 0
    assert info.max_graph_position < 1024
    np.testing.assert_allclose(bounded.scores, free.scores, atol=1e-4)


def test_far_positions(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama(lminf=LMInfConfig(n_global=0, n_local=64), **F32)
    llm.eval(tokens[:300])
    near = llm.scores
    llm.reset()
    llm.slot.sequence.begin_at(2**40)
    llm.slot.n_dropped = 2**40
    llm.eval(tokens[:300])
    assert llm.stream_info().position == 2**40 + 300
    assert llm.n_tokens == 300
    assert llm.stream_info().max_graph_position < 2**24
    np.testing.assert_allclose(llm.scores, near, atol=1e-4)
    # and back from there
    llm.n_tokens = 280
    assert llm.stream_info().position == 2**40 + 280
    checkpoint = llm.checkpoint()
    llm.reset()
    assert llm.stream_info().position == 0
    llm.restore(checkpoint)
    assert llm.stream_info().position == 2**40 + 280
    llm.eval(tokens[280:300])
    np.testing.assert_allclose(llm.scores, near, atol=1e-4)


def test_memory_of_a_long_answer_is_four_bytes_a_token_at_most(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama()
    llm.eval(tokens)
    arrays = [value for value in vars(llm).values() if isinstance(value, np.ndarray)]
    assert arrays == []
    assert llm.input_ids.nbytes == 4 * len(tokens)
    assert llm.scores.shape == (1, llm.n_vocab())
    assert len(llm.eval_tokens) == llm.n_ctx()
    assert list(llm.eval_tokens) == tokens[-llm.n_ctx() :].tolist()
    assert len(llm.eval_logits) == 1


def test_scores_with_logits_all_are_those_of_the_stream(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama(logits_all=True, n_batch=32)
    llm.eval(tokens[:80])
    assert llm.scores.shape == (80, llm.n_vocab())
    assert llm._scores.shape == (80, llm.n_vocab())


def test_sent_tokens_are_processed(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama(**F32)
    generated = llm.generate(tokens[:100], temp=0.0)
    first = next(generated)
    second = generated.send(tokens[100:110].tolist())
    assert llm.input_ids.tolist() == [*tokens[:100], first, *tokens[100:110]]
    generated.close()
    assert greedy(make_llama(**F32), llm.input_ids, 1) == [second]


# --- back -------------------------------------------------------------------------------------------------------------


def test_a_prompt_that_goes_on_costs_its_new_tokens(
    make_llama: MakeLlama, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llama()
    work = Work(llm, monkeypatch)
    answer = greedy(llm, tokens[:2000], 30)
    assert work.take() == 2000 + 29
    greedy(llm, [*tokens[:2000], *answer, *tokens[2000:2007]], 1)
    assert work.take() == 1 + 7  # the last token of the answer had not been processed
    assert_agrees(llm)


def test_the_same_prompt_again_costs_nothing_while_its_logits_are_at_hand(
    make_llama: MakeLlama, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llama()
    first = greedy(llm, tokens[:300], 1)
    work = Work(llm, monkeypatch)
    assert greedy(llm, tokens[:300], 1) == first
    assert work.take() == 0


@pytest.mark.parametrize("n_answer", [10, 200])
def test_regenerating_costs_one_token(
    make_llama: MakeLlama, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, n_answer: int
) -> None:
    """Within the slack by taking tokens back, beyond it from a checkpoint that was made on the way."""
    llm = make_llama(**F32)
    first = greedy(llm, tokens[:1000], n_answer)
    work = Work(llm, monkeypatch)
    for _ in range(3):
        assert greedy(llm, tokens[:1000], n_answer) == first
        assert work.take() <= n_answer
    assert_agrees(llm)
    assert (llm.stream_info().checkpoint_bytes > 0) == (n_answer > 64)


def test_short_answers_need_no_checkpoint(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama()
    greedy(llm, tokens[:1000], 60)
    greedy(llm, tokens[:20], 40)
    greedy(llm, tokens[:20], 60)
    assert llm.stream_info().checkpoint_bytes == 0


def test_turning_off_inside_the_slack_rolls_back(
    make_llama: MakeLlama, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llama(**F32)
    llm.eval(tokens[:1000])
    work = Work(llm, monkeypatch)
    prompt = [*tokens[:950], *tokens[2000:2010]]
    got = greedy(llm, prompt, 5)
    assert work.take() == 10 + 4
    assert got == greedy(make_llama(**F32), prompt, 5)
    assert_agrees(llm)


def test_turning_off_earlier_goes_back_to_a_checkpoint_or_starts_again(
    make_llama: MakeLlama, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llama(**F32)
    work = Work(llm, monkeypatch)
    greedy(llm, tokens[:500], 1)  # asks to be able to come back here
    greedy(llm, tokens[:1500], 1)
    work.take()

    edited = [*tokens[:800], *tokens[2000:2300]]
    got = greedy(llm, edited, 3)
    assert 300 + 300 <= work.take() <= 300 + 300 + 64 + 3
    assert got == greedy(make_llama(**F32), edited, 3)

    other = tokens[2000:2300]
    got = greedy(llm, other, 3)
    assert work.take() == 300 + 2
    assert got == greedy(make_llama(**F32), other, 3)
    assert_agrees(llm)


def test_checkpoints_are_bounded(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama(lminf=LMInfConfig(n_global=4, n_local=64, n_checkpoints=2))
    for end in range(300, 1500, 150):
        greedy(llm, tokens[:end], 1)
    checkpoints = llm.scheduler.store.checkpoints
    assert len(checkpoints) == 2
    assert llm.stream_info().checkpoint_bytes == sum(each.state.nbytes for each in checkpoints)
    none = make_llama(lminf=LMInfConfig(n_global=4, n_local=64, n_checkpoints=0))
    greedy(none, tokens[:300], 1)
    greedy(none, tokens[:900], 1)
    assert none.stream_info().checkpoint_bytes == 0


def test_no_slack(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama(lminf=LMInfConfig(n_global=4, n_local=64, n_slack=0), **F32)
    first = greedy(llm, tokens[:300], 20)
    assert greedy(llm, tokens[:300], 20) == first
    assert_agrees(llm)


def test_setting_n_tokens(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama(**F32)
    llm.eval(tokens[:1000])
    llm.n_tokens = 990
    assert_agrees(llm)
    assert llm.n_tokens == 990
    llm.n_tokens = 100  # long out of reach: processed again
    assert_agrees(llm)
    assert llm.input_ids.tolist() == tokens[:100].tolist()


def test_reset(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama(**F32)
    llm.eval(tokens[:100])
    first = llm.scores
    llm.eval(tokens[100:600])
    llm.reset()
    assert llm.stream_info().position == llm.n_tokens == 0
    llm.eval(tokens[:100])
    np.testing.assert_allclose(llm.scores, first, atol=1e-5)


# --- drafts -----------------------------------------------------------------------------------------------------------


class Oracle(LlamaDraftModel):
    """Drafts what the model will say, with every n-th token wrong."""

    def __init__(self, prompt: Tokens, answer: list[int], wrong_every: int) -> None:
        self.text = [*prompt, *answer]
        self.wrong_every = wrong_every
        self.n_calls = 0
        self.end = len(prompt)

    def __call__(self, input_ids: Tokens, /, **kwargs: Any) -> Tokens:
        self.n_calls += 1
        # the stream may be longer than what is shown: find the place by its last tokens, after where it was before
        tail = input_ids[-16:].tolist()
        self.end = next(i for i in range(self.end, len(self.text) + 1) if self.text[i - 16 : i] == tail)
        drafts = np.array(self.text[self.end : self.end + 8], dtype=np.int32)
        drafts[self.wrong_every - 1 :: self.wrong_every] += 1
        return drafts


@pytest.mark.parametrize("wrong_every", [1, 3, 100])
def test_drafts_change_nothing_but_the_number_of_batches(
    make_llama: MakeLlama, tokens: Tokens, wrong_every: int
) -> None:
    prompt = tokens[:200]
    expected = greedy(make_llama(**F32), prompt, 150)
    oracle = Oracle(prompt, expected, wrong_every)
    llm = make_llama(draft_model=oracle, **F32)
    assert greedy(llm, prompt, 150) == expected
    assert oracle.n_calls < {1: 151, 3: 60, 100: 20}[wrong_every]
    assert llm.n_tokens == 200 + 149
    assert llm.input_ids.tolist() == [*prompt, *expected[:149]]
    assert_agrees(llm)


def test_prompt_lookup_drafts_in_a_completion(make_llama: MakeLlama, tokens: Tokens) -> None:
    prompt = tokens[:300].tolist()
    settings: dict[str, Any] = {"max_tokens": 120, "temperature": 0.0, "logprobs": 1}
    expected: Any = make_llama(**F32).create_completion(prompt, **settings)
    response: Any = make_llama(draft_model=LlamaPromptLookupDecoding(), **F32).create_completion(prompt, **settings)
    assert response["choices"][0]["text"] == expected["choices"][0]["text"]
    np.testing.assert_allclose(
        response["choices"][0]["logprobs"]["token_logprobs"],
        expected["choices"][0]["logprobs"]["token_logprobs"],
        atol=1e-4,
    )


# --- errors and interrupts --------------------------------------------------------------------------------------------


def test_a_bad_token_is_an_error_and_nothing_is_lost(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama(n_batch=64, **F32)
    llm.eval(tokens[:192])
    with pytest.raises(ValueError, match="not in the vocabulary"):
        llm.eval([*tokens[:200], llm.n_vocab() + 7])
    assert llm.input_ids.tolist() == tokens[:192].tolist()
    assert_agrees(llm)
    assert greedy(llm, tokens[:300], 5) == greedy(make_llama(**F32), tokens[:300], 5)


@pytest.mark.parametrize("processed", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_leaves_a_usable_stream(
    make_llama: MakeLlama,
    tokens: Tokens,
    monkeypatch: pytest.MonkeyPatch,
    processed: bool,
    error: type[BaseException],
) -> None:
    llm = make_llama(n_batch=64, **F32)
    decode = bindings.llama_decode
    batches = 0

    def interrupted(*args: Any) -> int:
        nonlocal batches
        batches += 1
        if batches == 4:
            if processed:
                decode(*args)
            raise error
        return int(decode(*args))

    monkeypatch.setattr(bindings, "llama_decode", interrupted)
    with pytest.raises(error):
        llm.eval(tokens[:600])
    assert llm.n_tokens == (256 if processed else 192)
    assert_agrees(llm)
    assert greedy(llm, tokens[:600], 5) == greedy(make_llama(**F32), tokens[:600], 5)
    assert batches > 5


def test_a_batch_that_fails_half_way_is_half_in_the_history(
    make_llama: MakeLlama, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llama(**F32)
    llm.eval(tokens[:100])
    decode = bindings.llama_decode

    def half(ctx: Any, batch: Any) -> int:
        batch.n_tokens //= 2
        assert decode(ctx, batch) == 0
        return 2

    with monkeypatch.context() as patch:
        patch.setattr(bindings, "llama_decode", half)
        with pytest.raises(RuntimeError, match="returned 2"):
            llm.eval(tokens[100:200])
    assert llm.input_ids.tolist() == tokens[:150].tolist()
    assert_agrees(llm)
    with pytest.raises(RuntimeError, match="no logits"):
        llm.sample()
    assert greedy(llm, tokens[:300], 5) == greedy(make_llama(**F32), tokens[:300], 5)


def test_someone_else_clears_the_cache(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama(**F32)
    llm.eval(tokens[:500])
    llm._ctx.kv_cache_clear()
    assert greedy(llm, tokens[:300], 5) == greedy(make_llama(**F32), tokens[:300], 5)
    assert_agrees(llm)


def test_nothing_to_sample_from(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama()
    with pytest.raises(RuntimeError, match="no logits"):
        llm.sample()
    with pytest.raises(ValueError, match="prompt is empty"):
        next(llm.generate([]))
    llm.eval(tokens[:10])
    llm.restore(llm.checkpoint())
    with pytest.raises(RuntimeError, match="no logits"):
        llm.sample()


def test_closed(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama()
    llm.close()
    for use in (lambda: llm.eval(tokens[:10]), llm.stream_info, llm.checkpoint, llm.reset):
        with pytest.raises(RuntimeError, match="closed"):
            use()
