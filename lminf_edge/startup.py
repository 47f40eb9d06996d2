"""What happens when llama_cpp is imported: it gets our library, and with LMINF=1 our Llama.

A copy of this file runs at every start of Python (CMakeLists.txt installs it beside a .pth file), so it imports
nothing of this package and as little as possible. It acts when llama_cpp is imported and not before.

- A plain `import llama_cpp` loads our library if llama_cpp has none of its own and LLAMA_CPP_LIB_PATH is not set.
- Once lminf_edge has been imported, or with LMINF=1, it loads our library in any case.
- With LMINF=1 it is patched, see lminf_edge.patching.

The variable LLAMA_CPP_LIB_PATH, by which llama_cpp is told, is only set while it reads it.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

LIBRARY_NAMES = ("libllama.so", "libllama.dylib", "llama.dll", "libllama.dll")


def library_folder() -> str | None:
    """The folder of the patched library, None if there is none.

    That is LMINF_LIB_PATH if set, else the package's own lib folder (an editable install has the package in two
    places, the sources in one and the library in the other), else LLAMA_CPP_LIB_PATH if set.
    """
    import importlib.util

    override = os.environ.get("LMINF_LIB_PATH")
    if override:
        return override
    spec = importlib.util.find_spec("lminf_edge")
    for place in (spec.submodule_search_locations if spec else None) or ():
        folder = os.path.join(place, "lib")
        if _has_library(folder):
            return folder
    return os.environ.get("LLAMA_CPP_LIB_PATH")


def wanted() -> bool:
    """Whether programs that know nothing of this package shall use it."""
    return os.environ.get("LMINF") == "1"


def _has_library(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for name in LIBRARY_NAMES)


class Finder:
    """A finder of modules that finds llama_cpp as the others do and adds to what happens when it is run."""

    is_lminf_edge = True  # so that a copy of this class is known as one

    def __init__(self) -> None:
        self.ours_in_any_case = False
        self._finding = False

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if self._finding or name not in ("llama_cpp", "llama_cpp.llama_cpp"):
            return None
        import importlib.util

        self._finding = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._finding = False
        if spec is not None and spec.loader is not None:
            run: Callable[[ModuleType], None] = spec.loader.exec_module
            around = self._run_package if name == "llama_cpp" else self._run_bindings
            spec.loader.exec_module = lambda module: around(run, module)  # type: ignore[method-assign]
        return spec

    def _run_package(self, run: Callable[[ModuleType], None], module: ModuleType) -> None:
        run(module)
        if wanted():
            import importlib

            importlib.import_module("lminf_edge.patching").patch_at_import()

    def _run_bindings(self, run: Callable[[ModuleType], None], module: ModuleType) -> None:
        before = os.environ.get("LLAMA_CPP_LIB_PATH")
        own = os.path.join(os.path.dirname(module.__file__ or ""), "lib")
        folder = None
        if self.ours_in_any_case or wanted() or (before is None and not _has_library(own)):
            folder = library_folder()
        if folder is not None:
            os.environ["LLAMA_CPP_LIB_PATH"] = folder
        try:
            run(module)
        finally:
            if before is not None:
                os.environ["LLAMA_CPP_LIB_PATH"] = before
            elif folder is not None:
                os.environ.pop("LLAMA_CPP_LIB_PATH", None)


def install() -> Any:
    """Puts the finder in place, if it is not yet; returns it."""
    for finder in sys.meta_path:
        if getattr(finder, "is_lminf_edge", False):
            return finder
    sys.meta_path.insert(0, Finder())
    return sys.meta_path[0]


if __name__ == "_lminf_edge_startup":  # the copy
    install()
