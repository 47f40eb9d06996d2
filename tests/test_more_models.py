"""Architectures beyond those of the numpy reference: what is served equals stock, what is refused leaves no trace."""

from __future__ import annotations

from os import fsencode
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from native_context import NativeContext, _lib
from reference import more_models, more_unsupported_models, random_model, tiny_models, unsupported_models

TOKENS = tiny_models.tokens(900)
SHORT = TOKENS[:60]

# ggml looks GELU up in a table of f16, which makes steps of the last bits
GELU = {"falcon", "starcoder2", "bloom"}


def tolerance(name: str) -> float:
    return 2e-3 if name in GELU else 1e-4


def write(name: str, folder: Path) -> Path:
    return random_model.write(name, more_models.MODELS[name], folder)


def logits(path: Path, *window: int | None, **options: object) -> np.ndarray:
    """Of SHORT, [n_tokens, n_vocab]."""
    with NativeContext(path, *window, **options) as context:  # type: ignore[arg-type]
        return context.feed(SHORT)


def run_stock(path: Path) -> None:
    """One batch through an encoder if there is one, and through the model."""
    with NativeContext(path, None) as context:
        assert not _lib.lminf_enabled(context.context)
        tokens = (llama_cpp.llama_token * 8)(*SHORT[:8].tolist())
        batch = llama_cpp.llama_batch_get_one(tokens, len(tokens))
        if llama_cpp.llama_model_has_encoder(context.model):
            assert llama_cpp.llama_encode(context.context, batch) == 0
        assert llama_cpp.llama_decode(context.context, batch) == 0


@pytest.mark.parametrize("attention", ["fused", "stock"])
@pytest.mark.parametrize("name", list(more_models.MODELS))
def test_inside_the_window_it_is_stock(tmp_path: Path, name: str, attention: str) -> None:
    path = write(name, tmp_path)
    assert np.abs(logits(path, 64, 4, attention=attention) - logits(path, None)).max() < tolerance(name)


@pytest.mark.parametrize("attention", ["fused", "stock"])
@pytest.mark.parametrize("name", list(more_models.MODELS))
def test_sinks_at_their_true_distance_are_stock(tmp_path: Path, name: str, attention: str) -> None:
    """Sinks and window together hold every token, so the second query sees what stock attention sees."""
    path = write(name, tmp_path)
    ours = logits(path, 8, 52, mode="true", attention=attention)
    assert np.abs(ours - logits(path, None)).max() < tolerance(name)


@pytest.mark.parametrize("name", list(more_models.MODELS))
def test_rebasing_changes_nothing(tmp_path: Path, name: str) -> None:
    path = write(name, tmp_path)
    with NativeContext(path, 32, 4, n_ubatch=16, pos_bound=4096) as context:
        expected = context.feed(TOKENS)
        assert context.info().n_rebase == 0
    with NativeContext(path, 32, 4, n_ubatch=16, pos_bound=528) as context:
        actual = context.feed(TOKENS)
        assert context.info().n_rebase >= 1
    assert np.abs(actual - expected).max() < 5 * tolerance(name)
    assert np.abs(actual - expected).mean() < tolerance(name) / 5


@pytest.mark.parametrize("name", list(more_unsupported_models.MODELS))
def test_a_model_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    refused = more_unsupported_models.MODELS[name]
    path = random_model.write(name, refused.model, tmp_path)
    run_stock(path)  # so that the refusal is ours
    with pytest.raises(ValueError, match=refused.words) as caught:
        NativeContext(path, 32, 4)
    sentence = str(caught.value)
    assert sentence.startswith(f"models of architecture '{refused.model.arch}' cannot run with a Λ cache: ")
    assert "\n" not in sentence
    with NativeContext(path, None) as context:
        before = _lib.lminf_refusal(context.model)
    assert before == (None if refused.at_graph else sentence.encode())


@pytest.mark.parametrize("name", list(more_models.MODELS))
def test_nothing_speaks_against_what_is_served(tmp_path: Path, name: str) -> None:
    with NativeContext(write(name, tmp_path), None) as context:
        assert _lib.lminf_refusal(context.model) is None


def test_a_refusal_leaves_no_trace(tmp_path: Path) -> None:
    """Neither a refusal before the graph nor one while it is built reaches the contexts that come after it."""
    served = tiny_models.write("llama", tmp_path)
    expected, expected_stock = logits(served, 32, 4), logits(served, None)
    for name in ("gemma2", "maincoder", "gpt2", "minicpm3"):
        path = unsupported_models.write(name, tmp_path)
        with pytest.raises(ValueError, match=name):
            NativeContext(path, 32, 4)
        with NativeContext(served, None) as context:
            assert not _lib.lminf_enabled(context.context)
            np.testing.assert_array_equal(context.feed(SHORT), expected_stock)
        np.testing.assert_array_equal(logits(served, 32, 4), expected)


def test_a_vocabulary_alone_is_refused(tmp_path: Path) -> None:
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    path = tiny_models.write("llama", tmp_path)
    model = llama_cpp.llama_model_load_from_file(fsencode(path), params)
    refusal = _lib.lminf_refusal(model).decode()
    llama_cpp.llama_model_free(model)
    assert "'llama'" in refusal
    assert "only its vocabulary" in refusal
