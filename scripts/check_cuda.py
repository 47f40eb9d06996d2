#!/usr/bin/env python3
"""Compiles the CUDA kernels for several architectures, with upstream's flags and headers, warnings being errors.

Prints what each kernel needs: registers, bytes spilled, bytes of stack. Needs nvcc, no GPU and no CUDA libraries; the
objects are left in build/cuda-check. Shared memory is dynamic; how much a kernel gets, the emulated tests look at.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from upstream import ROOT, UpstreamError, fetch

KERNELS = ROOT / "native" / "kernels"
FLAGS = ("-std=c++17", "-O3", "-use_fast_math", "-extended-lambda", "-Werror", "all-warnings", "-Xptxas", "-v")

ENTRY = re.compile(
    r"Compiling entry function '_Z\d+(?P<name>\w+?_kernel)(?:I(?P<args>(?:L[ib]\d+E)+)E)?.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<spill>\d+) bytes spill stores.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compile_for(nvcc: str, arch: int, tree: Path, dest: Path) -> str:
    """What ptxas says about the kernels."""
    includes = [KERNELS, KERNELS / "cuda", tree / "ggml/src/ggml-cuda", tree / "ggml/src", tree / "ggml/include"]
    command = [nvcc, *FLAGS, "-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += [f"-I{path}" for path in includes]
    # a stand-in for cuBLAS' header, last in line: nvcc may be installed without the library
    command += [f"-Xcompiler=-idirafter,{ROOT / 'native/tests/nvcc'}"]
    command += ["-c", str(KERNELS / "cuda/lminf-attn.cu"), "-o", str(dest / f"lminf-attn.sm_{arch}.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UpstreamError(f"nvcc failed for sm_{arch}:\n{result.stdout}{result.stderr}")
    return result.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("arch", nargs="*", type=int, default=[75, 80, 89, 90], help="compute capabilities")
    parser.add_argument("--tree", type=Path, help="a llama.cpp tree with the patches (default: the pinned one)")
    args = parser.parse_args()
    try:
        nvcc = shutil.which("nvcc")
        if not nvcc:
            raise UpstreamError("nvcc is not on the PATH.")
        tree = args.tree
        if tree is None:
            fetch(ROOT / "build" / "upstream", stock=False)
            tree = ROOT / "build" / "upstream" / "llama.cpp"
        dest = ROOT / "build" / "cuda-check"
        dest.mkdir(parents=True, exist_ok=True)
        for arch in args.arch:
            kernels = list(ENTRY.finditer(compile_for(nvcc, arch, tree, dest)))
            if not kernels:
                raise UpstreamError(f"nvcc compiled no kernel for sm_{arch}.")
            for kernel in kernels:
                numbers = ", ".join(re.findall(r"\d+", kernel["args"] or ""))
                name = kernel["name"] + (f"<{numbers}>" if numbers else "")
                print(
                    f"sm_{arch}  {name:22}  {kernel['registers']:>3} registers"
                    f"  {kernel['spill']:>4} bytes spilled  {kernel['stack']:>4} bytes of stack",
                    flush=True,
                )
    except UpstreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
