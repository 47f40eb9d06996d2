"""Several endless conversations with one model: decoded together, and kept when they are not in the context.

engine = load_engine("model.gguf", parallel=4)
Voice(engine).create_chat_completion(messages)  # one request, in the shape of a llama_cpp.Llama
engine.close()

The names are imported when they are asked for: Llama uses the sampler of this package, and the engine uses Llama.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lminf_edge.engine.engine import Engine
    from lminf_edge.engine.loading import load_engine
    from lminf_edge.engine.voice import Voice

__all__ = ["Engine", "Voice", "load_engine"]

_MODULES = {"Engine": "engine", "Voice": "voice", "load_engine": "loading"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
