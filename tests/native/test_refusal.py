"""What a Λ cache cannot serve is refused, by name and with the reason, and leaves no trace; llama.cpp runs it."""

from __future__ import annotations

import ctypes
from os import fsencode
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from native_context import NativeContext, _lib
from reference import models, more_models, tiny_models, unsupported_models

from lminf_edge import Llama

TOKENS = tiny_models.tokens(60)


def run_stock(path: Path) -> None:
    """One batch through an encoder if there is one, and through the model."""
    with NativeContext(path, None) as context:
        assert not _lib.lminf_enabled(context.context)
        tokens = (llama_cpp.llama_token * 8)(*TOKENS[:8].tolist())
        batch = llama_cpp.llama_batch_get_one(tokens, len(tokens))
        if llama_cpp.llama_model_has_encoder(context.model):
            assert llama_cpp.llama_encode(context.context, batch) == 0
        assert llama_cpp.llama_decode(context.context, batch) == 0


@pytest.mark.parametrize("name", list(unsupported_models.MODELS))
def test_a_model_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    refused = unsupported_models.MODELS[name]
    path = models.write(name, tmp_path)
    run_stock(path)  # so that the refusal is ours
    with pytest.raises(ValueError, match=refused.words) as caught:
        NativeContext(path, 32, 4)
    sentence = str(caught.value)
    assert sentence.startswith(f"models of architecture '{refused.model.arch}' cannot run with a Λ cache: ")
    assert "\n" not in sentence
    with NativeContext(path, None) as context:
        before = _lib.lminf_refusal(context.model)
    assert before == (None if refused.at_graph else sentence.encode())
    # and so it is with the Python class
    with pytest.raises(ValueError, match=refused.words):
        Llama(str(path), lminf=True, verbose=False)
    Llama(str(path), verbose=False, n_ctx=128).close()


@pytest.mark.parametrize("name", [*tiny_models.MODELS, *models.SERVED])
def test_nothing_speaks_against_the_others(tmp_path: Path, name: str) -> None:
    with NativeContext(models.write(name, tmp_path), 32, 4) as context:
        assert _lib.lminf_refusal(context.model) is None


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen35", "jamba", "mamba", "gpt2", "bert", "maincoder"])
def test_what_a_model_needs(tmp_path: Path, name: str) -> None:
    """0: it is refused, 1: it runs as far as is known before its graph is built, 2: its memory is constant already."""
    path = models.write(name, tmp_path)
    needs = 2 if name in more_models.CONSTANT else int(name not in ("gpt2", "bert"))
    with NativeContext(path, None) as context:
        assert _lib.lminf_support(ctypes.c_void_p(context.model)) == needs


def logits(path: Path, *window: int | None) -> np.ndarray:
    """Of TOKENS, [n_tokens, n_vocab]."""
    with NativeContext(path, *window) as context:
        return context.feed(TOKENS)


def test_a_model_that_is_constant_already_runs_as_it_is(tmp_path: Path) -> None:
    path = models.write("mamba", tmp_path)
    with NativeContext(path, 32, 4) as context:
        assert not _lib.lminf_enabled(context.context)
        assert _lib.lminf_refusal(context.model) is None
    np.testing.assert_array_equal(logits(path, 32, 4), logits(path, None))


def test_a_refusal_leaves_no_trace(tmp_path: Path) -> None:
    """Neither a refusal before the graph nor one while it is built reaches the contexts that come after it."""
    served = models.write("llama", tmp_path)
    expected, expected_stock = logits(served, 32, 4), logits(served, None)
    for name in ("gpt2", "maincoder", "bert", "hunyuan-moe"):
        path = models.write(name, tmp_path)
        with pytest.raises(ValueError, match=name):
            NativeContext(path, 32, 4)
        with NativeContext(served, None) as context:
            assert not _lib.lminf_enabled(context.context)
            np.testing.assert_array_equal(context.feed(TOKENS), expected_stock)
        np.testing.assert_array_equal(logits(served, 32, 4), expected)


def test_a_vocabulary_alone_is_refused(tmp_path: Path) -> None:
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    path = models.write("llama", tmp_path)
    model = llama_cpp.llama_model_load_from_file(fsencode(path), params)
    refusal = _lib.lminf_refusal(model).decode()
    llama_cpp.llama_model_free(model)
    assert "'llama'" in refusal
    assert "only its vocabulary" in refusal
