"""What happens when llama_cpp is imported: which one, with which library, and with LMINF=1 with our Llama.

A copy of this file runs at every start of Python (CMakeLists.txt installs it beside a .pth file), so it imports
nothing of this package and as little as possible. It acts when llama_cpp is imported and not before.

The package brings a copy of llama_cpp of the version that its library is built for. A process has one llama_cpp:

- Once lminf_edge has been imported, or with LMINF=1, it is the copy, with our library. With LMINF=1 it is patched, see
  lminf_edge.patching.
- Otherwise it is the installed one, with its own library or that of LLAMA_CPP_LIB_PATH, as if we were not there. Where
  none is installed, or one without any library, it is the copy.

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
    override = os.environ.get("LMINF_LIB_PATH")
    if override:
        return override
    for place in _places():
        folder = os.path.join(place, "lib")
        if _has_library(folder):
            return folder
    return os.environ.get("LLAMA_CPP_LIB_PATH")


def copy_of_llama_cpp() -> str | None:
    """The folder of our copy of llama_cpp, None if there is none."""
    for place in _places():
        folder = os.path.join(place, "_vendor", "llama_cpp")
        if os.path.exists(os.path.join(folder, "__init__.py")):
            return folder
    return None


def _places() -> list[str]:
    import importlib.util

    spec = importlib.util.find_spec("lminf_edge")
    return list((spec.submodule_search_locations if spec else None) or ())


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
        self._finding = True
        try:
            spec = self._find(name)
        finally:
            self._finding = False
        if spec is not None and spec.loader is not None:
            run: Callable[[ModuleType], None] = spec.loader.exec_module
            around = self._run_package if name == "llama_cpp" else self._run_bindings
            spec.loader.exec_module = lambda module: around(run, module)  # type: ignore[method-assign]
        return spec

    def _find(self, name: str) -> ModuleSpec | None:
        import importlib.util

        copy = copy_of_llama_cpp() if name == "llama_cpp" else None
        if copy is None:
            return importlib.util.find_spec(name)
        if not self.ours_in_any_case and not wanted():
            installed = importlib.util.find_spec(name)
            places = (installed.submodule_search_locations if installed else None) or ()
            if any(_has_library(os.path.join(place, "lib")) for place in places):
                return installed
            if installed is not None and "LLAMA_CPP_LIB_PATH" in os.environ:
                return installed
        path = os.path.join(copy, "__init__.py")
        return importlib.util.spec_from_file_location(name, path, submodule_search_locations=[copy])

    def _run_package(self, run: Callable[[ModuleType], None], module: ModuleType) -> None:
        run(module)
        if wanted():
            import importlib

            importlib.import_module("lminf_edge.patching").patch_at_import()

    def _run_bindings(self, run: Callable[[ModuleType], None], module: ModuleType) -> None:
        before = os.environ.get("LLAMA_CPP_LIB_PATH")
        is_copy = os.path.dirname(module.__file__ or "") == copy_of_llama_cpp()
        folder = None
        if is_copy and (self.ours_in_any_case or wanted() or before is None):
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
        if is_copy and _loads_backends(module):
            import importlib

            importlib.import_module("lminf_edge.backends").load(module._lib, folder or before)


def _loads_backends(module: ModuleType) -> bool:
    """Whether it has our library, with the CPU's code in modules: those are loaded before anything asks for them."""
    library = module._lib
    is_one = hasattr(library, "ggml_backend_cpu_reg")  # the CPU's code is a part of it
    return hasattr(library, "lminf_set_next") and (not is_one or "LMINF_CPU_VARIANT" in os.environ)


def install() -> Any:
    """Puts the finder in place, if it is not yet; returns it."""
    for finder in sys.meta_path:
        if getattr(finder, "is_lminf_edge", False):
            return finder
    sys.meta_path.insert(0, Finder())
    return sys.meta_path[0]


if __name__ == "_lminf_edge_startup":  # the copy
    install()
