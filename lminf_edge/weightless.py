"""A model without its weights: what llama.cpp and our library make of it, and what it would take, before it is loaded.

Only the vocabulary and the list of tensors are read: 15 ms for a small model, 0.5 s for 262,144 tokens of vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from llama_cpp import llama_cpp as bindings
from llama_cpp._logger import set_verbose

from lminf_edge import native
from lminf_edge.config import ATTENTIONS, Attention, Parts, Window, is_quantized
from lminf_edge.errors import UserError
from lminf_edge.evaluate.reader import can_shift
from lminf_edge.model import native_context, native_model
from lminf_edge.native import Support

STOCK_UBATCH = 512  # llama.cpp's default
PADDING = 256  # llama.cpp's contexts have a multiple of so many cells
MAX_STOCK = 1 << 17  # cells of a context that is made to see what it takes: sliding windows are smaller


@dataclass(frozen=True)
class Layout:
    """A context as it would be made."""

    attention: Attention | None  # what computes it; None: there is none
    parts: Parts
    n_cells: int  # of the window, of all sequences

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token of the window takes."""
        return self.parts.window_bytes // self.n_cells if self.n_cells else 0


class Weightless:
    """A model file without its weights. To be closed, or used in a `with` statement.

    Raises UserError, in one sentence, if llama.cpp cannot load the file.
    """

    def __init__(self, path: str) -> None:
        self._library = native.load()
        set_verbose(False)
        self._model: Any = None
        self._model = native_model(path, no_alloc=True, load_mode=bindings.LLAMA_LOAD_MODE_NONE, n_gpu_layers=0)
        self.is_constant = self._library.support(self._model) is Support.CONSTANT  # purely recurrent
        self.n_ctx_train = int(bindings.llama_model_n_ctx_train(self._model))
        self.n_swa = int(bindings.llama_model_n_swa(self._model))  # tokens of a sliding layer's window

    def __enter__(self) -> Weightless:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._model:
            bindings.llama_model_free(self._model)
            self._model = None

    @property
    def is_encoder(self) -> bool:
        """Whether it reads its whole input at once and predicts no token. Files need not say so; llama.cpp knows."""
        has_both = bindings.llama_model_has_encoder(self._model) and bindings.llama_model_has_decoder(self._model)
        return "whole input at once" in (self._library.refusal(self._model) or "") and not has_both

    def layout(self, window: Window, kv_type: int, n_ubatch: int = 64) -> Layout:
        """A context with a Λ cache of this window, or with the model's own memory if that is constant.

        Raises UserError, in one sentence, if the model cannot have it: some are only refused here, when their graph is
        built.
        """
        params = native.Params.of(window, n_seq_max=1)
        with self._context(params, max(n_ubatch, window.size), kv_type, n_ubatch) as context:
            parts = self._library.parts(context)
            if not self._library.enabled(context):
                return Layout(None, parts, 0)
            attention = ATTENTIONS[self._library.params(context).attention]
            return Layout(attention, parts, self._library.info(context).n_cells)

    def refusal(self, kv_type: int, attention: Attention = "auto") -> str | None:
        """Why the model cannot run with a Λ cache, in one sentence; None if it can or needs none."""
        try:
            # the smallest window, which models that select tokens have as well
            self.layout(Window(1, 1, 1, 64, "ceiling", 0, attention), kv_type)
        except UserError as error:
            return str(error)
        return None

    def stock_bytes(self, n_ctx: int, kv_type: int, n_ubatch: int = STOCK_UBATCH) -> int:
        """Bytes that llama.cpp's own cache takes for n_ctx tokens. Raises UserError if it cannot have this type."""
        n_ctx = max(-(-n_ctx // PADDING), 1) * PADDING
        if n_ctx > MAX_STOCK:  # even without memory for them, cells cost time and memory
            most, less = (self.stock_bytes(n, kv_type, n_ubatch) for n in (MAX_STOCK, MAX_STOCK - PADDING))
            return most + (n_ctx - MAX_STOCK) // PADDING * (most - less)
        with self._context(None, n_ctx, kv_type, n_ubatch) as context:
            return self._library.memory_bytes(context)

    def stock_refusal(self, kv_type: int, n_positions: int, shift: bool = False) -> str | None:
        """Why llama.cpp's own cache cannot hold a stream of so many tokens, in one sentence; None if it can.

        With `shift`, a context of so many tokens that is shifted when it is full. llama.cpp itself would abort, or
        continue as if nothing was wrong.
        """
        ours = self._library.refusal(self._model) or ""
        if "not causal" in ours:
            return "its attention is not causal, so it does not predict the next token."
        if "learned absolute positions" in ours and n_positions > self.n_ctx_train:
            return f"it adds learned absolute positions, and there are {self.n_ctx_train} of them."
        if not shift:
            return None
        try:
            with self._context(None, 64, kv_type, 64, swa_full=True) as context:
                able = can_shift(context)
        except UserError as error:
            return str(error)
        return None if able else "llama.cpp cannot shift the cache of this model."

    @contextlib.contextmanager
    def _context(
        self, lminf: native.Params | None, n_ctx: int, kv_type: int, n_ubatch: int, swa_full: bool = False
    ) -> Iterator[Any]:
        """A llama_context, with llama.cpp's own cache if `lminf` is None; swa_full: sliding layers have all cells."""
        context = native_context(
            self._model,
            lminf,
            n_ctx=n_ctx,
            n_batch=min(n_ctx, n_ubatch),
            n_ubatch=min(n_ctx, n_ubatch),
            type_k=kv_type,
            type_v=kv_type,
            flash_attn_type=int(is_quantized(kv_type)),  # llama.cpp has quantized values only with flash attention
            swa_full=swa_full,
        )
        try:
            yield context
        finally:
            bindings.llama_free(context)
