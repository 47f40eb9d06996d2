"""Measuring a model on a stream.

The functions are imported on first access: the names of policies need no library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lminf_edge.evaluate.divergence import divergence_blocks
    from lminf_edge.evaluate.nll import nll_blocks, token_nll
    from lminf_edge.evaluate.reader import Reader, reader_of

__all__ = ["Reader", "divergence_blocks", "nll_blocks", "reader_of", "token_nll"]

_MODULES = {
    "Reader": "reader",
    "divergence_blocks": "divergence",
    "nll_blocks": "nll",
    "reader_of": "reader",
    "token_nll": "nll",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
