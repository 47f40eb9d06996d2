"""Models that a Λ cache cannot serve are refused at load, by name and with the reason; llama.cpp itself runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
from native_context import NativeContext, _lib
from reference import tiny_models, unsupported_models

from lminf_edge import Llama

REASONS = {
    "gemma2": "sliding window of their own",
    "mamba": "it is recurrent",
    "jamba": "mixes attention with recurrent layers",
    "minicpm3": "joins a rotated and an unrotated part into one head",
    "gpt2": "learned absolute positions",
    "bert": "not causal",
    "qwen2vl": "several positions per token",
    "mistral3": "scales its queries by their absolute position",
    "maincoder": "changes its queries or keys between RoPE and attention",
}
FOUND_IN_THE_GRAPH = {"minicpm3", "mistral3", "maincoder"}


@pytest.mark.parametrize("name", list(unsupported_models.MODELS))
def test_a_model_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    path = unsupported_models.write(name, tmp_path)
    with pytest.raises(ValueError, match=REASONS[name]) as caught:
        NativeContext(path, 32, 4)
    message = str(caught.value)
    assert f"'{name}'" in message
    assert "\n" not in message
    # the refusal is ours: llama.cpp runs it
    with NativeContext(path, None) as context:
        assert not _lib.lminf_enabled(context.context)
        known_before = _lib.lminf_refusal(context.model)
        assert (known_before is None) == (name in FOUND_IN_THE_GRAPH)
        if name != "bert":
            assert context.feed(tiny_models.tokens(40)).shape[0] == 40
    # and so it is with the Python class
    with pytest.raises(ValueError, match=REASONS[name]):
        Llama(str(path), lminf=True, verbose=False)
    Llama(str(path), verbose=False, n_ctx=128).close()


@pytest.mark.parametrize("name", list(tiny_models.MODELS))
def test_nothing_speaks_against_the_others(tmp_path: Path, name: str) -> None:
    with NativeContext(tiny_models.write(name, tmp_path), 32, 4) as context:
        assert _lib.lminf_refusal(context.model) is None
