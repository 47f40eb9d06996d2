"""Puts our Llama in the place of llama_cpp.Llama, for programs that do not know this package."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import fields
from typing import Any

from lminf_edge import native
from lminf_edge.config import LMInfConfig, whole_number
from lminf_edge.errors import UserError

_TEXTS = (
    *("sink_mode", "attention", "prefill", "recall_rule", "recall_index"),
    *("archive", "archive_type_k", "archive_type_v"),
)
_PARAMETERS = (*(field.name for field in fields(LMInfConfig)), "n_ctx")


def patch(**parameters: Any) -> None:
    """Replaces `llama_cpp.Llama` by ours, with lminf on, until `unpatch`.

    `parameters` are those of LMInfConfig and n_ctx, the attention window. Omitted ones come from the
    environment (LMINF_N_GLOBAL, LMINF_N_LOCAL, LMINF_MAX_DISTANCE, LMINF_N_SLACK, LMINF_N_CTX, ...), and the window
    from the n_ctx that the program asks for, cut to the model's training length and what it selects.

    A model that cannot have a Λ cache is loaded as llama_cpp would load it, with a warning. Modules that imported
    the name before (`from llama_cpp import Llama`) keep the stock class.

    Raises ValueError for invalid parameters, ImportError if llama_cpp runs another library.
    """
    settings = {**_from_environment(), **parameters}
    unknown = sorted(settings.keys() - set(_PARAMETERS))
    if unknown:
        raise UserError(f"There is no parameter {unknown[0]}: give one of {', '.join(_PARAMETERS)}.")
    n_ctx = settings.pop("n_ctx", None)
    if n_ctx is not None:
        n_ctx = whole_number("n_ctx", n_ctx, 1)
    config = LMInfConfig(**settings)
    if n_ctx is not None and config.n_local is not None:
        raise UserError("Give only one of n_ctx, which is n_global + n_local, and n_local.")
    native.load()

    import lminf_edge.llama  # noqa: F401 (on its own: with LMINF=1 it comes back here)
    from lminf_edge.patched import PatchedLlama

    PatchedLlama.config, PatchedLlama.window = config, n_ctx
    _replace(PatchedLlama)


def unpatch() -> None:
    """Restores `llama_cpp.Llama`; models made in between stay what they are."""
    if "lminf_edge.patched" in sys.modules:
        from lminf_edge.llama import STOCK

        _replace(STOCK)


def _replace(cls: type) -> None:
    for name in ("llama_cpp", "llama_cpp.llama"):
        module: Any = sys.modules[name]
        module.Llama = cls


def patch_at_import() -> None:
    """Applies LMINF=1 once llama_cpp has been imported."""
    ours = sys.modules.get("lminf_edge.llama")
    if ours is not None and not hasattr(ours, "Llama"):
        return  # it is importing llama_cpp, and calls this again at its end
    try:
        native.load()
    except ImportError as error:
        warnings.warn(f"LMINF=1 has no effect: {error}", stacklevel=2)
    else:
        patch()


def _from_environment() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _PARAMETERS:
        variable = f"LMINF_{name.upper()}"
        text = os.environ.get(variable)
        if text is None or text == "":
            continue
        if name not in _TEXTS:
            try:
                found[name] = int(text)
            except ValueError:
                raise UserError(f"{variable} must be a whole number, not {text!r}.") from None
        else:
            found[name] = text
    return found
