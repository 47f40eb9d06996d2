"""Checks the installation: library, backends, versions, embedded models, and a short run of one of them.

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
from collections.abc import Callable
from dataclasses import asdict, dataclass

import lminf_edge
from lminf_edge import native
from lminf_edge.cli.common import human_bytes, print_json
from lminf_edge.config import physical_memory
from lminf_edge.models import embedded_models

HELP = "check the installation"

REINSTALL = "reinstall lminf-edge (pip install --force-reinstall --no-deps .), or run make setup in a checkout"


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
        checks += [check() for check in (chat_library, backends, first_run)]
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
    """The installed llama_cpp must be the version whose structs the library was built for."""
    name = "llama-cpp-python"
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, False, "not installed", REINSTALL)
    wanted = next(
        (
            text.split("==")[1].split(";")[0].strip()
            for text in importlib.metadata.requires("lminf-edge") or ()
            if text.replace("_", "-").startswith(f"{name}==")
        ),
        found,
    )
    if found != wanted:
        return Check(name, False, found, f"the library is built for {wanted}: pip install {name}=={wanted}")
    return Check(name, True, found)


def library() -> Check:
    folder = native.library_folder()
    try:
        native.load()
    except ImportError as error:
        return Check("library", False, str(error), REINSTALL)
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


def backends() -> Check:
    """ggml's backends, and the CPU features it was compiled for."""
    from llama_cpp import llama_cpp as bindings

    lib = bindings._lib
    count: Callable[[], int] = lib.ggml_backend_dev_count
    get, name, description = lib.ggml_backend_dev_get, lib.ggml_backend_dev_name, lib.ggml_backend_dev_description
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    get.argtypes, get.restype = [ctypes.c_size_t], ctypes.c_void_p
    name.argtypes = description.argtypes = [ctypes.c_void_p]
    name.restype = description.restype = ctypes.c_char_p
    devices = [get(i) for i in range(count())]
    found = ", ".join(f"{name(device).decode()} ({description(device).decode().strip()})" for device in devices)
    features = bindings.llama_print_system_info().decode()
    advice = None
    if platform.machine() in ("x86_64", "AMD64") and "AVX2 = 1" not in features:
        advice = "compiled without AVX2, which is slow: build on this machine with -C cmake.define.GGML_NATIVE=ON"
    return Check("backends", bool(devices), found or "none", advice or (None if devices else REINSTALL))


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
