"""Sequences of one context: sinks of their own, and states that fit into any sequence of any context of their kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from conftest import MakeLlama
from llama_cpp import llama_cpp as bindings
from native_context import NativeContext, last_error

from lminf_edge import LMInfConfig
from lminf_edge.cache.sequence import Batch, Run
from lminf_edge.cache.token_log import Tokens
from lminf_edge.model import Model

ATTENTIONS = ("fused", "stock")


@contextmanager
def context(path: str, n_global: int, n_seq_max: int = 1, **kwargs: Any) -> Iterator[NativeContext]:
    with NativeContext(path, 64, n_global, n_seq_max=n_seq_max, n_ubatch=32, **kwargs) as made:
        yield made


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("n_sinks", [0, 3, 20])
def test_a_sequence_keeps_sinks_of_its_own(nano_f32_path: str, tokens: Tokens, n_sinks: int, attention: str) -> None:
    text = tokens[:400]
    with context(nano_f32_path, n_sinks, attention=attention) as alone:
        expected = alone.token_nll(text)
    with context(nano_f32_path, 20, n_seq_max=3, attention=attention) as several:
        assert several.set_sinks(n_sinks, seq_id=1)
        assert several.info(1).n_global == n_sinks
        assert several.info(0).n_global == 20
        got = several.token_nll(text, seq_id=1)
        assert several.info(1).n_sink == n_sinks
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_sequences_with_different_sinks_share_a_batch(nano_f32_path: str, tokens: Tokens, attention: str) -> None:
    texts = {0: (20, tokens[:300]), 1: (0, tokens[300:600]), 2: (5, tokens[600:900])}
    expected = {}
    for seq_id, (n_sinks, text) in texts.items():
        with context(nano_f32_path, n_sinks, attention=attention) as alone:
            expected[seq_id] = alone.feed(text)
    with context(nano_f32_path, 20, n_seq_max=3, attention=attention) as several:
        for seq_id, (n_sinks, _) in texts.items():
            assert several.set_sinks(n_sinks, seq_id)
        for i in range(0, 300, 10):
            rows = several.decode(*((seq_id, text[i : i + 10]) for seq_id, (_, text) in texts.items()))
            for seq_id in texts:
                got = rows[10 * seq_id : 10 * seq_id + 10]
                np.testing.assert_allclose(got, expected[seq_id][i : i + 10], atol=1e-3, rtol=0)


def test_sinks_are_chosen_before_the_first_token_and_within_the_limit(nano_f32_path: str, tokens: Tokens) -> None:
    with context(nano_f32_path, 8, n_seq_max=2) as native:
        assert not native.set_sinks(9)
        assert "0 to 8" in last_error()
        assert not native.set_sinks(-1)
        assert not native.set_sinks(3, seq_id=2)
        native.feed(tokens[:10])
        assert not native.set_sinks(3)
        assert native.info().n_global == 8
        assert native.set_sinks(3, seq_id=1)
        native.feed(tokens[:10], seq_id=1)
        assert native.rollback(0, seq_id=1)  # empty again: as many as the context has room for
        assert native.info(1).n_global == 8


@pytest.mark.parametrize(
    ("n_from", "seq_from", "n_to", "seq_to"), [(1, 0, 3, 1), (3, 2, 1, 0), (4, 1, 2, 1), (2, 0, 2, 1)]
)
def test_a_state_fits_into_another_sequence_of_another_context(
    nano_f32_path: str, tokens: Tokens, n_from: int, seq_from: int, n_to: int, seq_to: int
) -> None:
    with context(nano_f32_path, 8, n_seq_max=n_from) as source:
        source.feed(tokens[500:600], seq_id=n_from - 1 - seq_from)  # the neighbours are not empty
        assert source.rollback(0, seq_from)
        assert source.set_sinks(5, seq_from)
        source.feed(tokens[:300], seq_from)
        state = source.save(seq_from)
        expected = source.feed(tokens[300:340], seq_from)
    with context(nano_f32_path, 12, n_seq_max=n_to) as target:
        for seq_id in range(n_to):
            target.feed(tokens[900:1000], seq_id)
        assert target.load(state, seq_to)
        assert target.info(seq_to).stream_pos == 300
        assert target.info(seq_to).n_global == 5
        got = target.feed(tokens[300:340], seq_to)
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=0)


def test_a_state_with_more_sinks_than_there_is_room_for_is_refused(nano_f32_path: str, tokens: Tokens) -> None:
    with context(nano_f32_path, 8) as source:
        source.feed(tokens[:100])
        state = source.save()
    with context(nano_f32_path, 4) as target:
        target.feed(tokens[:50])
        assert not target.load(state)
        assert "more sinks than this context has room for" in last_error()
        assert target.info().stream_pos == 50


def test_a_damaged_state_leaves_the_sequence_empty_and_the_others_alone(nano_f32_path: str, tokens: Tokens) -> None:
    with context(nano_f32_path, 4, n_seq_max=2) as native:
        native.feed(tokens[:200], 0)
        native.feed(tokens[200:300], 1)
        state = native.save(1)
        assert not native.load(state[: len(state) // 2], 1)
        assert native.info(1).stream_pos == 0
        assert native.info(0).stream_pos == 200
        assert native.load(state, 1)
        assert native.info(1).stream_pos == 100


def test_runs_of_several_sequences(make_llama: MakeLlama, nano_f32_path: str, tokens: Tokens) -> None:
    settings: dict[str, Any] = {"verbose": False, "n_threads": 1, "n_threads_batch": 1}
    model = Model.load(nano_f32_path, LMInfConfig(n_global=4, n_local=64), n_seq_max=3, **settings)
    try:
        zero, one, two = model.sequences
        ends = model.batch.decode([Run(zero, tokens[:7]), Run(two, tokens[7:20], 0), Run(one, tokens[20:21])])
        assert ends == [6, 19, 20]
        assert [sequence.position for sequence in model.sequences] == [7, 1, 13]
        ends = model.batch.decode([Run(two, tokens[20:21])])
        assert ends == [0]
        alone = make_llama()
        alone.eval(tokens[7:21])
        got = np.ctypeslib.as_array(bindings.llama_get_logits_ith(zero.ctx, 0), shape=(model.n_vocab,))
        np.testing.assert_allclose(got, alone.scores[-1], atol=1e-4, rtol=0)
    finally:
        model.close()


def test_a_model_that_needs_logits_of_every_token(nano_f32_path: str, tokens: Tokens) -> None:
    """llama.cpp aborts where a micro-batch of Chameleon has none, and the beginning of a long prompt has none."""
    settings: dict[str, Any] = {"verbose": False, "n_threads": 1, "n_threads_batch": 1, "n_ubatch": 8}
    model = Model.load(nano_f32_path, LMInfConfig(n_global=4, n_local=64), **settings)
    try:
        [sequence] = model.sequences
        for keeps_all in (False, True):
            batch = Batch(model.llama._batch, keeps_all)
            batch.decode([Run(sequence, tokens[:30], 0)])
            found = [bool(bindings.llama_get_logits_ith(sequence.ctx, i)) for i in range(30)]
            assert found == [keeps_all] * 30
    finally:
        model.close()
