"""Recall against the rule in float64: what is chosen, what it costs in loss token by token, and what changes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from native_context import F32, Q4_0, Q8_0, NativeContext
from reference.rule import Recall, Rule
from reference.transformer import Transformer

from lminf_edge import native

Tokens = npt.NDArray[np.int32]

PAPER, EXACT = 1, 1  # enum lminf_recall_rule, lminf_recall_index
EXACTLY: dict[str, int] = {"archive_type_k": F32, "archive_type_v": F32, "recall_index": EXACT}


@pytest.fixture(scope="module")
def text(tokens: Any) -> Tokens:
    return np.array(tokens[:900], dtype=np.int32)


@pytest.fixture(scope="module")
def transformer(nano_f32_path: str) -> Transformer:
    return Transformer(nano_f32_path)


def check(actual: npt.NDArray[np.float64], expected: npt.NDArray[np.float64], max_mean: float = 5e-5) -> None:
    difference = np.abs(actual - expected)
    assert np.isfinite(difference).all()
    assert difference.max() < 1e-3
    assert difference.mean() < max_mean


@pytest.mark.parametrize("attention", ["fused", "stock"])
@pytest.mark.parametrize(
    ("n_global", "n_local", "recall"),
    [
        (4, 60, Recall(16, 60, 32)),
        (4, 60, Recall(16, 60, 100)),
        (4, 60, Recall(7, 200, 33)),
        (4, 40, Recall(5, 40, 16, since=3)),
        (0, 40, Recall(8, 40, 16)),
        (10, 64, Recall(64, 33, 64)),
        (4, 60, Recall(4096, 60, 64)),
    ],
)
def test_the_rule_in_float64(
    nano_f32_path: str, transformer: Transformer, text: Tokens, n_global: int, n_local: int, recall: Recall, attention: str
) -> None:
    expected = transformer.token_nll(text, Rule(n_local, n_global, recall=recall))
    without = transformer.token_nll(text, Rule(n_local, n_global))
    settings = {"n_recall": recall.n, "recall_distance": recall.distance, "recall_from": recall.since}
    with NativeContext(
        nano_f32_path, n_local, n_global, n_ubatch=recall.n_batch, attention=attention, **EXACTLY, **settings
    ) as context:
        whole = (len(text) - 1) // recall.n_batch * recall.n_batch  # the reference's last micro-batch has one token more
        check(context.token_nll(text)[:whole], expected[:whole])
    assert np.abs(without - expected).max() > 0.05


def test_token_by_token(nano_f32_path: str, transformer: Transformer, text: Tokens) -> None:
    few = text[:300]
    expected = transformer.token_nll(few, Rule(40, 4, recall=Recall(16, 40, 1)))
    with NativeContext(nano_f32_path, 40, 4, n_ubatch=1, n_recall=16, **EXACTLY) as context:
        check(context.token_nll(few), expected)


@pytest.mark.parametrize("n_batch", [1, 50])
@pytest.mark.parametrize(("n", "distance"), [(5, 40), (2, 20)])
def test_the_papers_rule(
    nano_f32_path: str, transformer: Transformer, text: Tokens, n: int, distance: int, n_batch: int
) -> None:
    few = text[:300]
    expected = transformer.token_nll(few, Rule(40, 4, recall=Recall(n, distance, n_batch, since=2, paper=True)))
    settings = {"recall_distance": distance, "recall_from": 2, "recall_rule": PAPER}
    with NativeContext(nano_f32_path, 40, 4, n_ubatch=n_batch, n_recall=n, **EXACTLY, **settings) as context:
        whole = (len(few) - 1) // n_batch * n_batch
        check(context.token_nll(few)[:whole], expected[:whole])
