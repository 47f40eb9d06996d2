#!/usr/bin/env python3
"""Builds and runs the tests of the native half that are programs, on everything that is here or has a stand-in.

    test_kernels.py [--require] [NAME]...

    device      on ggml's own devices, by ggml: the CPU, and a GPU if llama.cpp was built for one
    cpu         the CPU kernels compiled for plain C, AVX2 and AVX-512, with and without VNNI (on ARM NEON), and recall
    sanitize    those for plain C and AVX2 again, and recall, under AddressSanitizer and UndefinedBehaviorSanitizer
    library     the whole library and the chat library under both, in Python: random operations, changed states, other
                batches than text, recall and archives, templates; takes long, so it is only run where it is asked for
    neon        cross-compiled for ARM, under qemu-user
    cuda        the CUDA kernels as C++ on the CPU
    nvcc        the CUDA kernels compiled by nvcc for compute capability 7.5, 8.0, 8.9 and 9.0
    metal       the Metal kernels as C++ on the CPU, compiled by clang, which checks their address spaces as well
    upstream    llama.cpp's test-backend-ops for the operations near ours, on the patched library
    chat        llama.cpp's tests of its chat library: templates, parsers, grammars, schemas, on the patched one

What cannot run here is skipped and says so; with --require that is a failure. Build folders are kept in build/.
Standard library only, beside the cmake and ninja that make setup installs.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".venv" / "bin"
IS_X86 = platform.machine() in ("x86_64", "AMD64")

# the operations the stock path is made of, and flash attention; of that the heads, masks and types that models have
# most, as all of it takes an hour on two cores
UPSTREAM_OPS = "SOFT_MAX,ROPE,CONCAT,SET_ROWS"
UPSTREAM_FLASH = r"hsk=(64|128),hsv=(64|128),nh=4,nr23=.(1|4),1.,kv=(113|512),.*mask=1.*type_(K|KV)=(f16|q8_0|q4_0)"

UPSTREAM_CHAT = (
    *("test-chat", "test-chat-auto-parser", "test-chat-peg-parser", "test-chat-template", "test-grammar-integration"),
    *("test-grammar-parser", "test-jinja", "test-json-schema", "test-json-schema-to-grammar", "test-llama-grammar"),
    *("test-peg-parser", "test-reasoning-budget"),
)

# of the suite, what goes through most of native/ with the least work of the model: every kind of memory, states and
# files that were changed, recall and its archives
LIBRARY_TESTS = (
    *(
        f"tests/native/test_operations.py::test_any_order_of_operations[{kind}]"
        for kind in ("llama-0", "gemma3-0", "deepseek2-0", "qwen35-8")
    ),
    *(
        f"tests/native/test_native.py::test_a_changed_state_is_refused_or_can_be_continued[{name}]"
        for name in ("gemma3", "qwen35", "deepseek2")  # llama's parts are some of these, and each takes minutes
    ),
    "tests/native/test_text_only.py",
    *(
        f"tests/native/test_recall.py::{name}"
        for name in (
            "test_sketches_find_nearly_the_same",
            "test_branches_share_what_they_have_in_common",
            "test_another_context_gets_a_copy",
            "test_an_archive_smaller_than_a_batch",
            "test_a_full_archive_forgets_the_oldest",
            "test_what_was_skipped_is_not_recalled",
            "test_it_is_not_made_of_what_is_not_there",
        )
    ),
    *(
        f"tests/cache/test_archive.py::{name}"
        for name in (
            "test_a_file_recalls_as_the_stream_did",
            "test_a_branch_within_a_segment_has_its_own",
            "test_a_bad_file_costs_what_it_held",
            "test_a_branch_does_not_change_what_is_in_files",
        )
    ),
    "tests/text/test_chat_library.py",
)


class Skipped(Exception):
    """Why a test cannot run here, in one sentence."""


class Failed(Exception):
    """What failed, in one sentence."""


def need(program: str, package: str) -> str:
    found = shutil.which(program)
    if not found:
        raise Skipped(f"{program} is not installed (Debian: {package})")
    return found


def run(command: Sequence[str | Path], quiet: bool = False, cwd: Path = ROOT, **env: str) -> None:
    """Runs a command; `quiet` shows its output only if it fails."""
    path = f"{TOOLS}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PATH": path, **env},
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
        errors="replace",
    )
    if result.returncode:
        if quiet:
            print(result.stdout[-10000:])
        raise Failed(f"{Path(command[0]).name} ended with status {result.returncode}")


def run_together(commands: Sequence[Sequence[str | Path]], **options: Any) -> None:
    """Runs commands, each most of its time on one core, on all cores; `options` are run's."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(partial(run, **options), commands))


def build(folder: str, targets: Sequence[str], *options: str) -> Path:
    """Configures and builds in build/`folder`; returns where the programs are."""
    where = ROOT / "build" / folder
    python = f"-DPython_EXECUTABLE={TOOLS / 'python'}"
    run(["cmake", "-S", ROOT, "-B", where, "-G", "Ninja", "-DLMINF_TESTS=ON", python, *options], quiet=True)
    run(["cmake", "--build", where, "--target", *targets], quiet=True)
    return where / "bin"


def cpu_supports(flag: str) -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return not cpuinfo.exists() or flag in cpuinfo.read_text().split()


def cpu_variants() -> list[str]:
    if not IS_X86:
        return ["neon"]
    flags = {"avx2": "avx2", "avxvnni": "avx_vnni", "avx512": "avx512bw", "avx512vnni": "avx512_vnni"}
    return ["plain"] + [name for name, flag in flags.items() if cpu_supports(flag)]


def test_device() -> None:
    run([build("kernels", ["test-attn"]) / "test-attn"])


def test_cpu() -> None:
    variants = cpu_variants()
    programs = build("kernels", [*(f"test-attn-cpu-{variant}" for variant in variants), "test-recall"])
    commands = [[programs / f"test-attn-cpu-{variant}"] for variant in variants]
    run_together([*commands, [programs / "test-recall"]])
    if IS_X86 and "avx512" not in variants:
        raise Skipped("this processor has no AVX-512 (the others passed)")


def build_sanitized(*targets: str) -> Path:
    flags = [f"-DCMAKE_{language}_FLAGS_RELWITHDEBINFO=-O1 -g1 -DNDEBUG" for language in ("C", "CXX")]
    return build("sanitize", targets, "-DCMAKE_BUILD_TYPE=RelWithDebInfo", *flags, "-DLMINF_SANITIZE=ON")


def test_sanitize() -> None:
    variants = [variant for variant in cpu_variants() if variant not in ("avx512", "avx512vnni")]
    programs = build_sanitized(*(f"test-attn-cpu-{variant}" for variant in variants), "test-recall")
    commands: list[list[str | Path]] = [[programs / f"test-attn-cpu-{variant}", "50"] for variant in variants]
    run_together([*commands, [programs / "test-recall"]])


def test_library() -> None:
    """What the sanitizers find ends the process, and the test with it."""
    if platform.system() != "Linux":
        raise Skipped("the sanitizers' runtime is preloaded as on Linux")
    compiler = os.environ.get("CXX", "c++")
    # an interpreter that was not built with it needs the runtime first, and what throws exceptions for it to hook into
    names = [f"-print-file-name={name}" for name in ("libasan.so", "libstdc++.so.6")]
    runtime = [subprocess.run([compiler, name], capture_output=True, text=True).stdout.strip() for name in names]
    if not all(map(os.path.isabs, runtime)):
        raise Skipped(f"{compiler} has no libasan.so: only GCC's is known here (CXX=g++)")
    run(
        [TOOLS / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *LIBRARY_TESTS],
        LMINF_LIB_PATH=str(build_sanitized("lminf")),
        LD_PRELOAD=" ".join(runtime),
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1",  # Python's own leaks; sizes in files may be anything
        UBSAN_OPTIONS="print_stacktrace=1",
        OMP_WAIT_POLICY="passive",
    )


def test_neon() -> None:
    if not IS_X86:
        raise Skipped("this is ARM already: cpu runs them")
    compiler = need("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")
    emulator = shutil.which("qemu-aarch64") or need("qemu-aarch64-static", "qemu-user-static")
    programs = build(
        "neon",
        ["test-attn-cpu-neon", "test-recall"],
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_C_COMPILER={compiler.removesuffix('g++')}gcc",
        f"-DCMAKE_CXX_COMPILER={compiler}",
        "-DGGML_NATIVE=OFF",
        "-DGGML_OPENMP=OFF",
    )
    emulated = [emulator, "-L", "/usr/aarch64-linux-gnu"]
    run_together([[*emulated, programs / "test-attn-cpu-neon", "40"], [*emulated, programs / "test-recall"]])


def test_cuda() -> None:
    run([build("kernels", ["test-attn-cuda-emulated"]) / "test-attn-cuda-emulated"])


def test_metal() -> None:
    clang = shutil.which("clang++")
    if not clang:
        run([build("kernels", ["test-attn-metal-emulated"]) / "test-attn-metal-emulated"])
        raise Skipped("clang is not installed (Debian: clang), so address spaces were not checked (the rest passed)")
    spaces = ["-D__METAL_VERSION__=310", "-DLMINF_METAL_SPACES", "-nostdinc", "-I", "native/tests/emulate"]
    warnings = ["-Wall", "-Wextra", "-Wno-unknown-attributes"]
    source = "native/kernels/metal/lminf_attn.metal"
    run([clang, "-std=c++14", "-fsyntax-only", *warnings, *spaces, "-x", "c++", source])
    compilers = [f"-DCMAKE_C_COMPILER={clang.removesuffix('++')}", f"-DCMAKE_CXX_COMPILER={clang}"]
    run([build("clang", ["test-attn-metal-emulated"], *compilers) / "test-attn-metal-emulated"])


def test_nvcc() -> None:
    need("nvcc", "nvidia-cuda-toolkit")
    run([sys.executable, ROOT / "scripts" / "check_cuda.py"])


def test_upstream() -> None:
    program = build("kernels", ["test-backend-ops"]) / "test-backend-ops"
    run([program, "test", "-b", "CPU", "-o", UPSTREAM_OPS], quiet=True)
    run([program, "test", "-b", "CPU", "-o", "FLASH_ATTN_EXT", "-p", UPSTREAM_FLASH], quiet=True)


def test_chat() -> None:
    if platform.system() != "Linux":
        raise Skipped("they use what only libraries of Linux export")
    programs = build("kernels", UPSTREAM_CHAT)
    commands = [[programs / name] for name in UPSTREAM_CHAT]
    run_together(commands, quiet=True, cwd=ROOT / "build" / "upstream" / "llama.cpp")


TESTS: dict[str, Callable[[], None]] = {
    "device": test_device,
    "cpu": test_cpu,
    "sanitize": test_sanitize,
    "library": test_library,
    "neon": test_neon,
    "cuda": test_cuda,
    "nvcc": test_nvcc,
    "metal": test_metal,
    "upstream": test_upstream,
    "chat": test_chat,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*", choices=[*TESTS, []], help="default: all but library")
    parser.add_argument("--require", action="store_true", help="what cannot run here is a failure")
    args = parser.parse_args()

    results: list[tuple[str, str]] = []
    failed = False
    for name in args.names or [name for name in TESTS if name != "library"]:
        print(f"--- {name}", flush=True)
        started = time.monotonic()
        try:
            TESTS[name]()
            results.append((name, f"passed in {time.monotonic() - started:.0f} s"))
        except Skipped as why:
            results.append((name, f"NOT RUN: {why}"))
            failed = failed or args.require
        except Failed as why:
            results.append((name, f"FAILED: {why}"))
            failed = True
    print()
    for name, result in results:
        print(f"{name:<9} {result}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
