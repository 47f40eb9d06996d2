"""What llama.cpp and our library will do with a model, found out without reading its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lminf_edge.cli.common import CommandError
from lminf_edge.config import ATTENTIONS, Attention, is_quantized


def probe(path: str, kv_type: int, attention: Attention) -> tuple[str | None, Attention | None]:
    """Makes a small Λ cache for the model.

    Returns (None, what computes its attention), or (why it cannot have one, None) with a sentence. Raises CommandError
    if the file is damaged.
    """
    from lminf_edge import native

    library = native.load()
    from llama_cpp import llama_cpp as bindings

    window = library.default_params()
    window.n_local = 64
    window.attention = ATTENTIONS.index(attention)
    with _without_weights(path) as (model, reason):
        if reason:
            return reason, None
        # some models are only found out when their graph is built, so asking lminf_refusal is not enough
        with library.next_context(window):
            context, why = _context(model, kv_type)
            refusal = None if context else library.last_error() or why
        chosen = ATTENTIONS[library.params(context).attention] if context else None
        if context:
            bindings.llama_free(context)
    return refusal, chosen


def stock_refusal(path: str, kv_type: int, n_positions: int, shift: bool = False) -> str | None:
    """Why llama.cpp's own cache cannot hold a stream of so many tokens, in one sentence; None if it can.

    With `shift`, a context of so many tokens that is shifted when it is full. llama.cpp itself would abort, or go on as
    if nothing was wrong. Raises CommandError if the file is damaged.
    """
    from lminf_edge import native

    library = native.load()
    from llama_cpp import llama_cpp as bindings

    from lminf_edge.evaluate.reader import can_shift

    with _without_weights(path) as (model, reason):
        if reason:
            return reason
        ours = library.refusal(model) or ""
        if "not causal" in ours:
            return "its attention is not causal, so it does not predict the next token."
        n_ctx_train = bindings.llama_model_n_ctx_train(model)
        if "learned absolute positions" in ours and n_positions > n_ctx_train:
            return f"it adds learned absolute positions, and there are {n_ctx_train} of them."
        if not shift:
            return None
        context, why = _context(model, kv_type)
        if not context:
            return why
        able = can_shift(context)
        bindings.llama_free(context)
    return None if able else "llama.cpp cannot shift the cache of this model."


@contextlib.contextmanager
def _without_weights(path: str) -> Iterator[tuple[Any, str | None]]:
    """Yields (model, None), or (None, a sentence) for an architecture that llama.cpp does not know."""
    from llama_cpp import llama_cpp as bindings
    from llama_cpp._logger import set_verbose

    from lminf_edge import native

    set_verbose(False)
    params = bindings.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = bindings.LLAMA_LOAD_MODE_NONE
    with native.captured_errors() as errors:
        model = bindings.llama_model_load_from_file(path.encode("utf-8"), params)
        if not model:
            reason = native.load_failure(path, errors) or f"{path} cannot be loaded."
            if "unknown model architecture" not in reason:
                raise CommandError(reason)
            yield None, reason
            return
        try:
            yield model, None
        finally:
            bindings.llama_model_free(model)


def _context(model: Any, kv_type: int) -> tuple[Any, str]:
    """A small context, or none and a sentence that says why."""
    from llama_cpp import llama_cpp as bindings

    from lminf_edge import native

    params = bindings.llama_context_default_params()
    params.n_ctx = params.n_batch = 64
    params.type_k = params.type_v = kv_type
    params.flash_attn_type = int(is_quantized(kv_type))  # llama.cpp has quantized values only with flash attention
    with native.captured_errors() as errors:
        context = bindings.llama_init_from_model(model, params)
    return context, native.context_failure(errors) or "llama.cpp cannot make a context for this model."
