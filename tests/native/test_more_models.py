"""What a Λ cache serves beyond plain attention equals stock, in the window and at true distances, rebased or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from native_context import NativeContext
from reference import models, tiny_models

TOKENS = tiny_models.tokens(900)
SHORT = TOKENS[:60]

# ggml looks GELU up in a table of f16, which makes steps of the last bits
GELU = {"falcon", "starcoder2", "bloom", "gemma2", "gemma3", "gemma4"}


def tolerance(name: str) -> float:
    return 2e-3 if name in GELU else 1e-4


def logits(path: Path, *window: int | None, **options: object) -> np.ndarray:
    """Of SHORT, [n_tokens, n_vocab]."""
    with NativeContext(path, *window, **options) as context:  # type: ignore[arg-type]
        return context.feed(SHORT)


@pytest.mark.parametrize("attention", ["auto", "stock"])
@pytest.mark.parametrize("name", list(models.SERVED))
def test_inside_the_window_it_is_stock(tmp_path: Path, name: str, attention: str) -> None:
    path = models.write(name, tmp_path)
    assert np.abs(logits(path, 64, 4, attention=attention) - logits(path, None)).max() < tolerance(name)


@pytest.mark.parametrize("attention", ["auto", "stock"])
@pytest.mark.parametrize("name", list(models.SERVED))
def test_sinks_at_their_true_distance_are_stock(tmp_path: Path, name: str, attention: str) -> None:
    """Sinks and window together hold every token, so the second query sees what stock attention sees."""
    path = models.write(name, tmp_path)
    ours = logits(path, 8, 52, mode="true", attention=attention)
    assert np.abs(ours - logits(path, None)).max() < tolerance(name)


# llama4's chunks are moved as a whole, which takes a longer stream: see test_reference_kinds.py
@pytest.mark.parametrize("name", [name for name in models.SERVED if name != "llama4"])
def test_rebasing_changes_nothing(tmp_path: Path, name: str) -> None:
    path = models.write(name, tmp_path)
    with NativeContext(path, 32, 4, n_ubatch=16, pos_bound=4096) as context:
        expected = context.feed(TOKENS)
        assert context.info().n_rebase == 0
    with NativeContext(path, 32, 4, n_ubatch=16) as context:
        actual = context.feed(TOKENS)
        assert context.info().n_rebase >= 1
    assert np.abs(actual - expected).max() < 5 * tolerance(name)
    assert np.abs(actual - expected).mean() < tolerance(name) / 5
