"""ggml's backends where they are modules: loading them, which of the CPU's variants is taken, and what is of no use.

A wheel has the CPU's code for many generations of processors, each in a module of its own, and one for each kind of GPU
whose SDK was there when it was built. Other builds have the code for one CPU inside, and nothing is to be loaded.

LMINF_CPU_VARIANT forces a variant, for virtual machines that lie about their processor.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lminf_edge.errors import UserError

VARIABLE = "LMINF_CPU_VARIANT"


_silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


@dataclass(frozen=True)
class Variant:
    """The CPU's code for some processors."""

    name: str
    path: Path
    score: int  # 0: this processor cannot run it; the highest is taken


@dataclass(frozen=True)
class Unused:
    """A module that is there and of no use here."""

    name: str
    reason: str


def load(library: Any, folder: str) -> None:
    """Loads the modules in `folder`. Called once llama_cpp has loaded the library and before anything uses a backend.

    Raises UserError if LMINF_CPU_VARIANT names a variant that is not there or that this processor cannot run.
    """
    ggml = functions(library, folder)
    forced = os.environ.get(VARIABLE)
    path = _forced(forced, folder) if forced else None
    ggml.ggml_log_set(_silent, None)  # it tells of each module; what is missing is seen later, and told by doctor
    try:
        if path is None:
            ggml.ggml_backend_load_all_from_path(os.fsencode(folder))
            return
        ggml.ggml_backend_load.restype = ctypes.c_void_p
        # the best variant must not even be loaded, so each is named; the CPU last: what is loaded first is asked first
        for module in [*_modules(folder), path]:
            ggml.ggml_backend_load(os.fsencode(module))
    finally:
        ggml.ggml_log_set(None, None)  # as it was: llama_cpp sets its own later


def _forced(name: str, folder: str) -> Path:
    variants = {variant.name: variant for variant in find_variants(folder)}
    if not variants:
        raise UserError(f"{VARIABLE} is {name}, but this library is built for one CPU and has no variants: unset it.")
    if name not in variants:
        raise UserError(f"{VARIABLE} must be one of {', '.join(variants)}, not {name}.")
    if variants[name].score == 0:
        able = ", ".join(variant.name for variant in variants.values() if variant.score)
        raise UserError(f"{VARIABLE} is {name}, which this processor cannot run: choose from {able}.")
    return variants[name].path


def find_variants(folder: str | Path) -> list[Variant]:
    """The variants of the CPU's code, best first; none if there is only one."""
    found = []
    for path in _files(folder):
        _, is_variant, name = path.stem.partition("ggml-cpu-")
        if is_variant:
            found.append(Variant(name, path, ctypes.CDLL(str(path)).ggml_backend_score()))
    return sorted(found, key=lambda variant: (-variant.score, variant.name))


def taken(library: Any, folder: str | Path) -> Path | None:
    """The file whose code runs on the CPU."""
    return _file_at(_registry(functions(library, folder), b"CPU"))


def has_gpu(library: Any, folder: str | Path) -> bool:
    """Whether layers can be anywhere but on the CPU: other machines count as GPUs."""
    first_of = functions(library, folder).ggml_backend_dev_by_type
    first_of.argtypes, first_of.restype = [ctypes.c_int], ctypes.c_void_p
    return any(first_of(kind) for kind in (1, 2))  # a GPU with memory of its own, or without


def unused(library: Any, folder: str | Path) -> list[Unused]:
    """Modules for GPUs and the like that were not loaded or have no device, and why."""
    ggml = functions(library, folder)
    ggml.ggml_backend_reg_count.restype = ctypes.c_size_t
    ggml.ggml_backend_reg_get.argtypes, ggml.ggml_backend_reg_get.restype = [ctypes.c_size_t], ctypes.c_void_p
    n_devices = ggml.ggml_backend_reg_dev_count
    n_devices.argtypes, n_devices.restype = [ctypes.c_void_p], ctypes.c_size_t
    loaded = {}
    for i in range(ggml.ggml_backend_reg_count()):
        registry = ggml.ggml_backend_reg_get(i)
        path = _file_at(registry)
        loaded[path and path.name] = n_devices(registry)
    found = []
    for path in _modules(folder):
        name = path.stem.partition("ggml-")[2]
        if loaded.get(path.name) or (name == "rpc" and path.name in loaded):  # RPC's devices come with its servers
            continue
        reason = "it found no device that it can use"
        try:
            ctypes.CDLL(str(path))
        except OSError as error:
            reason = str(error).removeprefix(f"{path}: ")
        found.append(Unused(name, reason))
    return found


def _modules(folder: str | Path) -> list[Path]:
    """The files of backends other than the CPU's."""
    names = {path: path.stem.partition("ggml-")[2] for path in _files(folder)}
    return [path for path, name in names.items() if name and name != "base" and name.split("-")[0] != "cpu"]


def _files(folder: str | Path) -> list[Path]:
    suffix = ".dll" if sys.platform == "win32" else ".so"  # on a Mac as well
    return sorted(Path(folder).glob(f"*ggml-*{suffix}"))


def functions(library: Any, folder: str | Path) -> Any:
    """An object with the functions of ggml: on Windows a library does not show those of libraries it is linked to."""
    if sys.platform != "win32":
        return library
    return _Several([ctypes.CDLL(str(Path(folder) / name)) for name in ("ggml.dll", "ggml-base.dll")])


class _Several:
    """Looks a function up in several libraries."""

    def __init__(self, libraries: list[Any]) -> None:
        self._libraries = libraries

    def __getattr__(self, name: str) -> Any:
        for library in self._libraries:
            if hasattr(library, name):
                return getattr(library, name)
        raise AttributeError(name)


def _registry(ggml: Any, name: bytes) -> int | None:
    ggml.ggml_backend_reg_by_name.argtypes, ggml.ggml_backend_reg_by_name.restype = [ctypes.c_char_p], ctypes.c_void_p
    found: int | None = ggml.ggml_backend_reg_by_name(name)
    return found


class _Symbol(ctypes.Structure):
    """Dl_info of dlfcn.h"""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _file_at(address: int | None) -> Path | None:
    """The library that an address lies in."""
    if address is None:
        return None
    if sys.platform == "win32":
        kernel = ctypes.WinDLL("kernel32")
        handle, path = ctypes.c_void_p(), ctypes.create_unicode_buffer(32768)
        kernel.GetModuleHandleExW(0x4 | 0x2, ctypes.c_void_p(address), ctypes.byref(handle))  # of an address, unchanged
        kernel.GetModuleFileNameW(handle, path, len(path))
        return Path(path.value)
    symbol = _Symbol()
    if not ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(symbol)):
        return None
    return Path(os.fsdecode(symbol.file))
