"""Probes what llama.cpp and our library will do with a model, without loading its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lminf_edge.cli.common import CommandError
from lminf_edge.config import ATTENTIONS, Attention, is_quantized
from lminf_edge.errors import UserError
from lminf_edge.native import Params


def probe(path: str, kv_type: int, attention: Attention) -> tuple[str | None, Attention | None]:
    """Makes a small Λ cache for the model.

    Returns (None, what computes its attention), or (why it cannot have one, None) with a sentence. Raises CommandError
    if the file is damaged.
    """
    from lminf_edge import native

    library = native.load()
    window = library.default_params()
    window.n_local = 64
    window.attention = ATTENTIONS.index(attention)
    try:
        # some models are only refused when their graph is built, so lminf_refusal is not enough
        with _without_weights(path) as model, _context(model, kv_type, window) as context:
            return None, ATTENTIONS[library.params(context).attention]
    except _Refused as error:
        return str(error), None


def stock_refusal(path: str, kv_type: int, n_positions: int, shift: bool = False) -> str | None:
    """Why llama.cpp's own cache cannot hold a stream of so many tokens, in one sentence; None if it can.

    With `shift`, a context of so many tokens that is shifted when it is full. llama.cpp itself would abort, or continue
    as if nothing was wrong. Raises CommandError if the file is damaged.
    """
    from lminf_edge import native

    library = native.load()
    from llama_cpp import llama_cpp as bindings

    from lminf_edge.evaluate.reader import can_shift

    try:
        with _without_weights(path) as model:
            ours = library.refusal(model) or ""
            if "not causal" in ours:
                return "its attention is not causal, so it does not predict the next token."
            n_ctx_train = bindings.llama_model_n_ctx_train(model)
            if "learned absolute positions" in ours and n_positions > n_ctx_train:
                return f"it adds learned absolute positions, and there are {n_ctx_train} of them."
            if not shift:
                return None
            with _context(model, kv_type) as context:
                able = can_shift(context)
    except _Refused as error:
        return str(error)
    return None if able else "llama.cpp cannot shift the cache of this model."


class _Refused(Exception):
    """Why the model cannot be used so, in one sentence."""


@contextlib.contextmanager
def _without_weights(path: str) -> Iterator[Any]:
    """A llama_model. Raises _Refused for an architecture that llama.cpp does not know, CommandError otherwise."""
    from llama_cpp import llama_cpp as bindings
    from llama_cpp._logger import set_verbose

    from lminf_edge.model import native_model

    set_verbose(False)
    try:
        model = native_model(path, no_alloc=True, load_mode=bindings.LLAMA_LOAD_MODE_NONE)
    except UserError as error:
        raise (_Refused if "unknown model architecture" in str(error) else CommandError)(str(error)) from None
    try:
        yield model
    finally:
        bindings.llama_model_free(model)


@contextlib.contextmanager
def _context(model: Any, kv_type: int, window: Params | None = None) -> Iterator[Any]:
    """A small llama_context. Raises _Refused."""
    from llama_cpp import llama_cpp as bindings

    from lminf_edge.model import native_context

    flash_attn_type = int(is_quantized(kv_type))  # llama.cpp has quantized values only with flash attention
    try:
        context = native_context(
            model, window, n_ctx=64, n_batch=64, type_k=kv_type, type_v=kv_type, flash_attn_type=flash_attn_type
        )
    except UserError as error:
        raise _Refused(str(error)) from None
    try:
        yield context
    finally:
        bindings.llama_free(context)
