"""The class that llama_cpp.Llama becomes, see lminf_edge.patching."""

from __future__ import annotations

import inspect
import os
import warnings
from typing import Any

from lminf_edge.config import LMInfConfig
from lminf_edge.errors import UserError
from lminf_edge.gguf_header import read_header
from lminf_edge.llama import STOCK, Llama, with_signature
from lminf_edge.model import training_length
from lminf_edge.models import find_model


class _InPlaceOfStock(type):
    """Keeps isinstance and issubclass working while the name llama_cpp.Llama means PatchedLlama."""

    def __instancecheck__(cls, instance: object) -> bool:
        return type.__instancecheck__(STOCK if cls is PatchedLlama else cls, instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return type.__subclasscheck__(STOCK if cls is PatchedLlama else cls, subclass)


class PatchedLlama(Llama, metaclass=_InPlaceOfStock):
    """Llama with lminf on, or off if the model cannot have a Λ cache."""

    config = LMInfConfig()
    window: int | None = None

    @with_signature(inspect.signature(Llama.__init__))
    def __init__(
        self,
        model_path: str | bytes | os.PathLike[str],
        *,
        lminf: bool | LMInfConfig | None = None,
        n_ctx: int | None = None,
        **kwargs: Any,
    ) -> None:
        if lminf is not None:
            super().__init__(model_path, lminf=lminf, n_ctx=n_ctx, **kwargs)
            return
        try:
            window = self._window_for(model_path, n_ctx, kwargs)
            super().__init__(model_path, lminf=self.config, n_ctx=window, **kwargs)
        except UserError as error:
            self._stack.close()
            super().__init__(model_path, n_ctx=n_ctx, **kwargs)  # if the file itself is bad, this says so
            warnings.warn(f"llama_cpp.Llama without a Λ cache: {error}", stacklevel=2)

    def _window_for(self, model_path: Any, n_ctx: int | None, kwargs: dict[str, Any]) -> int | None:
        """The n_ctx for Llama: what the program asks for, at most the training length and what the model selects."""
        if self.config.n_local is not None:
            return None
        asked = n_ctx if self.window is None else self.window
        if asked is None or self.window is not None:
            return asked
        header, overrides = read_header(find_model(model_path)), kwargs.get("kv_overrides") or {}
        n_most = header.most_local(self.config.n_global, self.config.n_recall, overrides)
        longest = min(training_length(header, overrides), self.config.n_global + n_most)
        return min(asked, longest) or longest
