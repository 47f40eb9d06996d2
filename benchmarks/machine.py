"""What figures were measured on: processor, memory, compiler, build settings, commit."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from lminf_edge.config import physical_memory
from lminf_edge.native import LIBRARY_NAMES

ROOT = Path(__file__).resolve().parent.parent

# of the instruction sets that ggml has kernels for
_FEATURES = "avx avx2 f16c fma avx_vnni avx512f avx512bw avx512_vnni avx512_bf16 amx_int8 asimd asimddp i8mm sve"


def describe(ours: Path, stock: Path) -> dict[str, Any]:
    """The machine and how the libraries in these folders were built, as far as it can be known.

    Raises ValueError, in one sentence, if it is known that they were built with different settings.
    """
    cpu, features = _cpu()
    settings = _build_settings(ours), _build_settings(stock)
    if None not in settings and settings[0] != settings[1]:
        assert settings[0] is not None
        assert settings[1] is not None
        names = sorted(n for n in settings[0].keys() | settings[1].keys() if settings[0].get(n) != settings[1].get(n))
        raise ValueError(f"Ours and stock were built with other settings: {', '.join(names)}.")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu,
        "features": features,
        "n_cores": os.cpu_count(),
        "memory_bytes": physical_memory(),
        "load_before": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "compiler": {"ours": _compiler(ours), "stock": _compiler(stock)},
        "build": settings[0] if None not in settings else None,
        "commit": _commit(),
        "upstream": (ROOT / "patches" / "upstream.txt").read_text().split()[0],
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }


def resident_bytes() -> int | None:
    """Resident memory of this process, where the system tells (Linux does)."""
    status = Path("/proc/self/status")
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status.read_text(), re.M) if status.exists() else None
    return 1024 * int(found[1]) if found else None


def _read(start: Any, seconds: float, n_read: Any) -> None:
    numbers = np.ones(1 << 26, dtype=np.int64)  # 512 MiB, far more than any cache
    start.wait()
    begun = time.perf_counter()
    n_bytes = 0
    while time.perf_counter() - begun < seconds:
        numbers.sum()
        n_bytes += numbers.nbytes
    n_read.put(n_bytes / (time.perf_counter() - begun))


def read_bandwidth(n_workers: int, n_rounds: int, seconds: float = 1.0) -> list[float]:
    """Bytes per second that n_workers processes read from memory together, one figure per round."""
    context = multiprocessing.get_context("spawn")
    rounds = []
    for _ in range(n_rounds):
        start, n_read = context.Barrier(n_workers), context.Queue()
        workers = [context.Process(target=_read, args=(start, seconds, n_read)) for _ in range(n_workers)]
        for worker in workers:
            worker.start()
        rounds.append(sum(n_read.get() for _ in workers))
        for worker in workers:
            worker.join()
    return rounds


def _cpu() -> tuple[str, list[str]]:
    """Name of the processor and those of its instruction sets that matter."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    return name[1] if name else platform.processor() or platform.machine(), [f for f in _FEATURES.split() if f in known]


def _compiler(folder: Path) -> str | None:
    """What the compiler left in the library about itself."""
    for path in (folder / name for name in LIBRARY_NAMES):
        if path.exists():
            found = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", path.read_bytes())
            return found[0].decode() if found else None
    return None


def _build_settings(folder: Path) -> dict[str, str] | None:
    """Build type, compiler flags and ggml's options from CMake's cache; None for a library that was not built here."""
    caches = [folder.parent / "CMakeCache.txt"]
    if "LMINF_LIB_PATH" not in os.environ and folder.parent.name == "lminf_edge":  # the editable install of make
        caches += ROOT.glob("build/py3-none-*/CMakeCache.txt")
    for cache in caches:
        if cache.exists():
            pairs = re.findall(
                r"^(CMAKE_BUILD_TYPE|CMAKE_C(?:XX)?_FLAGS(?:_RELEASE)?|GGML_\w+):\w+=(.*)$", cache.read_text(), re.M
            )
            # how it was compiled, not with what at hand: a cache for the compiler changes no code. RPC is ours alone
            return {name: value for name, value in pairs if not re.search("_DIR$|CCACHE|_RPC|AVAILABLE_BACKENDS", name)}
    return None


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout

    try:
        # the figures themselves do not count as a change
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
