"""Unbounded streams in constant memory: llama.cpp with the Λ-shaped attention of LM-Infinite.

    from lminf_edge import Llama

    llm = Llama("model.gguf", lminf=True)

`Llama` is `llama_cpp.Llama` with one more argument. Importing this package makes llama_cpp load the library with the Λ
cache, so import it first; llama_cpp itself is loaded on the first access to `Llama`.

`patch()` does the same for packages that make a `llama_cpp.Llama` themselves; LMINF=1 in the environment needs no code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lminf_edge import native, startup
from lminf_edge.config import LMInfConfig, StreamInfo

if TYPE_CHECKING:
    from lminf_edge.cache.checkpoint import Checkpoint, CheckpointError
    from lminf_edge.llama import Llama
    from lminf_edge.patching import patch, unpatch

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LMInfConfig",
    "Llama",
    "StreamInfo",
    "__version__",
    "patch",
    "unpatch",
]

__version__ = "0.1.0"

native.prepare()


def __getattr__(name: str) -> Any:
    if name == "Llama":
        native.load()  # its errors say better what is wrong than llama_cpp's
        from lminf_edge.llama import Llama

        if startup.wanted():  # that has imported llama_cpp, before there was a class to put into it
            from lminf_edge import patching

            patching.patch_at_import()
        return Llama
    if name in ("Checkpoint", "CheckpointError"):
        from lminf_edge.cache import checkpoint

        return getattr(checkpoint, name)
    if name in ("patch", "unpatch"):
        from lminf_edge import patching

        return getattr(patching, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
