"""Checks the installation: library, backends, versions, embedded models, and a short run of one of them.

A wheel has the CPU's code in variants, of which the one with the highest score is taken. LMINF_CPU_VARIANT=NAME forces
another, for virtual machines that lie about their processor.

Exit status 1 if something is wrong; the advice is printed beside it.

--json prints
  ok       nothing is wrong
  checks   [{"name": ..., "ok": true or false, "found": ..., "advice": a sentence or null}, ...]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import os
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lminf_edge
from lminf_edge import backends as backends_of_ggml
from lminf_edge import native, startup
from lminf_edge.cli.common import human_bytes, print_json
from lminf_edge.config import physical_memory
from lminf_edge.errors import UserError
from lminf_edge.models import embedded_models

HELP = "check the installation"

REINSTALL = "reinstall lminf-edge (pip install --force-reinstall --no-deps), or run make setup in a checkout"
BINDINGS = "llama-cpp-python"


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    found: str
    advice: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # nothing but --json


def run(args: argparse.Namespace) -> int:
    checks = [check() for check in (machine, package, bindings, library)]
    if checks[-1].ok:  # without a library there is nothing more to see
        checks += [check() for check in (chat_library, cpu, backends, first_run)]
    ok = all(check.ok for check in checks)
    if args.json:
        print_json({"ok": ok, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            print(f"{'ok   ' if check.ok else 'WRONG'}  {check.name:<12} {check.found}")
            if check.advice:
                print(f"{'':20}-> {check.advice}")
        print("nothing is wrong" if ok else "something is wrong: see the arrows")
    return 0 if ok else 1


def machine() -> Check:
    memory = physical_memory()
    found = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return Check("machine", True, found + (f", {human_bytes(memory)} of memory" if memory else ""))


def package() -> Check:
    return Check("lminf-edge", True, f"{lminf_edge.__version__} in {os.path.dirname(lminf_edge.__file__)}")


def bindings() -> Check:
    """The package brings the version whose structs the library was built for."""
    copy = startup.copy_of_llama_cpp()
    if copy is None:
        return Check(BINDINGS, False, "our copy of it is missing", REINSTALL)
    found = re.search(r'__version__ = "(.+)"', Path(copy, "__init__.py").read_text(encoding="utf-8"))
    version = found[1] if found else "of an unknown version"
    try:
        other = importlib.metadata.version(BINDINGS)
    except importlib.metadata.PackageNotFoundError:
        return Check(BINDINGS, True, f"{version}, our copy of it")
    return Check(BINDINGS, True, f"{version}, our copy of it; {other} is installed, for programs without lminf_edge")


def library() -> Check:
    folder = native.library_folder()
    try:
        native.load()
    except ImportError as error:
        return Check("library", False, str(error), REINSTALL)
    except UserError as error:
        return Check("library", False, str(error))
    return Check("library", True, str(folder))


def chat_library() -> Check:
    from lminf_edge.text import library as chat

    name = "chat library"
    try:
        templates = chat.load().open(None, "{{ messages[0].content }}", "", "")
    except (ImportError, chat.ChatError) as error:
        return Check(name, False, str(error), REINSTALL)
    chat.load().free(templates)
    return Check(name, True, "templates, tools and thoughts as in llama.cpp")


def _loaded() -> tuple[Any, Path]:
    from llama_cpp import llama_cpp as bindings

    folder = native.library_folder()
    assert folder is not None
    return bindings._lib, folder


def cpu() -> Check:
    """The variant of the CPU's code that was taken, and the others."""
    lib, folder = _loaded()
    variants = backends_of_ggml.find_variants(folder)
    if not variants:
        return Check("CPU variant", True, "one, chosen when it was compiled")
    path = backends_of_ggml.taken(lib, folder)
    taken = next((each for each in variants if path is not None and each.path.name == path.name), None)
    if taken is None:
        return Check("CPU variant", False, "none was loaded", REINSTALL)
    forced = f", forced by {backends_of_ggml.VARIABLE}" if os.environ.get(backends_of_ggml.VARIABLE) else ""
    able = [f"{each.name} {each.score}" for each in variants if each.score and each is not taken]
    unable = [each.name for each in variants if not each.score]
    found = f"{taken.name}, score {taken.score}{forced}; others: {', '.join(able) or 'none'}"
    return Check("CPU variant", True, found + (f"; not for this processor: {', '.join(unable)}" if unable else ""))


def backends() -> Check:
    """ggml's backends, the CPU features it was compiled for, and modules that are not used."""
    from llama_cpp import llama_cpp as bindings

    lib, folder = _loaded()
    ggml = backends_of_ggml.functions(lib, folder)
    count: Callable[[], int] = ggml.ggml_backend_dev_count
    get, name, description = ggml.ggml_backend_dev_get, ggml.ggml_backend_dev_name, ggml.ggml_backend_dev_description
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    get.argtypes, get.restype = [ctypes.c_size_t], ctypes.c_void_p
    name.argtypes = description.argtypes = [ctypes.c_void_p]
    name.restype = description.restype = ctypes.c_char_p
    devices = [get(i) for i in range(count())]
    found = ", ".join(f"{name(device).decode()} ({description(device).decode().strip()})" for device in devices)
    if not devices:
        return Check("backends", False, "none", REINSTALL)
    is_one = hasattr(lib, "ggml_backend_cpu_reg")  # and no modules
    unused = [] if is_one else backends_of_ggml.unused(lib, folder)
    found += "".join(f"; {each.name} is not used: {each.reason}" for each in unused)
    advice = None
    if unused:
        advice = "where that hardware is here, install its driver and libraries; without them, the CPU computes"
    elif is_one and platform.machine() in ("x86_64", "AMD64"):
        features = bindings.llama_print_system_info().decode()
        if "AVX2 = 1" not in features:
            advice = "compiled without AVX2, which is slow: build on this machine with -C cmake.define.GGML_NATIVE=ON"
    return Check("backends", True, found, advice)


def first_run() -> Check:
    """Runs the smallest embedded model over a stream of three windows."""
    models = embedded_models()
    if not models:
        return Check("models", False, "no embedded model", REINSTALL)
    name = min(models, key=lambda model: models[model].stat().st_size)
    import numpy as np

    from lminf_edge import Llama, LMInfConfig
    from lminf_edge.evaluate import token_nll

    try:
        with contextlib.closing(Llama(name, lminf=LMInfConfig(n_global=4, n_local=60), verbose=False)) as llm:
            nll = token_nll(llm, llm.tokenize(b"The sea was calm, and the ship went on. " * 20))
            info = llm.stream_info()
    except (ValueError, RuntimeError, MemoryError) as error:
        return Check("first run", False, str(error), REINSTALL)
    found = (
        f"{name}: {info.position} tokens, {info.evicted} of them evicted, KV cache {human_bytes(info.kv_bytes)}, "
        f"{info.attention} attention"
    )
    ok = bool(np.isfinite(nll).all()) and info.evicted > 0
    return Check("first run", ok, found, None if ok else REINSTALL)
