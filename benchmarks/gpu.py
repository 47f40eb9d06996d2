"""Builds for the GPU of this machine, tests there, measures, and writes docs/performance/cuda/*.json (or metal).

    make gpu (or make metal), or: .venv/bin/python benchmarks/gpu.py [--backend cuda|metal] [--only PART]...

Both libraries, ours and stock, are built for the GPU at hand alone, in build/cuda and build/cuda-stock: minutes on 16
cores, most of them for stock flash attention. What is measured took 6 minutes on an NVIDIA H200; 5 GB of disk for
models (build/models). Leave the machine alone meanwhile. benchmarks/report.py makes the section of the
page from what is written here.

    operations   the fused attention against float64: native/tests/test-attn, several seeds
    models       every architecture as a tiny random model with all layers there: native/tests/test-archs
    loss         the embedded models' loss of each token, GPU against CPU
    attention    the operation beside stock flash attention, a copy and a product of matrices: bench-attn
    decode-..., prefill-...   whole models beside stock with flash attention, at several windows
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Backend:
    device: str  # ggml's name of the first one
    options: tuple[str, ...]  # of CMake
    card: Callable[[], dict[str, str]]


class GpuError(Exception):
    """One sentence for the user."""


def output(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        raise GpuError(f"{command[0]} does not say which GPU this machine has: is there one?") from None


def nvidia_card() -> dict[str, str]:
    first = output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader").splitlines()[
        0
    ]
    name, driver, memory = first.split(", ")
    compiler = re.search(r"release ([\d.]+)", output("nvcc", "--version"))
    return {"name": name, "driver": driver, "memory": memory, "compiler": f"CUDA {compiler[1] if compiler else '?'}"}


def apple_card() -> dict[str, str]:
    memory = f"{int(output('sysctl', '-n', 'hw.memsize')) >> 30} GiB, shared"
    system = output("sw_vers", "-productVersion")
    return {
        "name": output("sysctl", "-n", "machdep.cpu.brand_string"),
        "driver": f"macOS {system}",
        "memory": memory,
        "compiler": "Metal",
    }


BACKENDS = {
    "cuda": Backend("CUDA0", ("-DGGML_CUDA=ON",), nvidia_card),
    "metal": Backend("MTL0", ("-DGGML_METAL=ON",), apple_card),
}

# --- building ---------------------------------------------------------------------------------------------------------


def build(name: str, targets: Sequence[str], options: Sequence[str]) -> Path:
    """Builds in build/`name`, and returns where libraries and programs are."""
    folder = ROOT / "build" / name
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in ([*configure, *options], ["cmake", "--build", str(folder), "--target", *targets]):
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            print(done.stdout.decode(errors="replace")[-10000:])
            raise GpuError(f"{' '.join(command[:3])} failed.")
    return folder / "bin"


# --- testing ----------------------------------------------------------------------------------------------------------


def test_operations(programs: Path, device: str) -> Record:
    """Several runs of test-attn, each with random cases of its own, side by side."""
    n_runs = max(1, min(8, (os.cpu_count() or 2) // 2))

    def run(_: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([programs / "test-attn", device], capture_output=True, text=True)

    with ThreadPoolExecutor(n_runs) as pool:
        done = list(pool.map(run, range(n_runs)))
    counts = [0, 0, 0]
    worst: dict[str, float] = {}  # by the types of K and V
    failures = []
    for each in done:
        last = re.search(r"(\d+) run, (\d+) failed, (\d+) declined", each.stdout)
        if last is None:
            failures.append(f"test-attn ended with status {each.returncode}: {each.stderr.strip()[-500:]}")
            continue
        counts = [a + int(b) for a, b in zip(counts, last.groups(), strict=True)]
        failures += re.findall(r"FAILED, (.*)", each.stdout)
        for types, nmse in re.findall(r"(\w+/\w+) (\S+e-\d+)", each.stdout):
            worst[types] = max(worst.get(types, 0.0), float(nmse))
    most = max(worst.values(), default=0.0)
    print(f"  {counts[0]} cases, {counts[1]} failed, {counts[2]} declined; worst NMSE {most:.1e}")
    for failure in failures[:50]:
        print(f"  {failure}")
    return {
        "n_run": counts[0],
        "n_failed": counts[1],
        "n_declined": counts[2],
        "seeds": [int(seed) for each in done for seed in re.findall(r"LMINF_TEST_SEED=(\d+)", each.stdout)],
        "worst_nmse": worst,
        "failures": failures,
    }


# What a GPU computes depends on how many tokens it computes at once: products of f32 matrices take tf32, with 10 bits.
# Where the sinks are wrong, results differ by more.
GPU_ROUNDING = 1e-4


def test_models(programs: Path, device: str, only: Sequence[str]) -> Record:
    """test-archs on the device, for every architecture that has a Λ cache."""
    import models

    names = only or [name for name, expected in models.expected().items() if expected["verdict"] == "runs"]

    def check_one(name: str) -> Record:
        started = time.monotonic()
        result: Record = models.check(programs / "test-archs", name, "--device", device)
        print(f"  {name}: {result['verdict']}, {time.monotonic() - started:.0f} s", flush=True)
        return result

    with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:  # each starts the GPU for itself
        results = list(pool.map(check_one, names))
    failures = []
    worst: dict[str, tuple[str, float]] = {}  # by check: the model and its error
    for result in results:
        name = result["name"]
        if result["verdict"] != "runs":
            failures.append(f"{name}: {result['verdict']}, {result.get('why')}")
            continue
        failures += [f"{name}: {check}: {why}" for check, why in result["faults"].items()]
        for check in ("stock", "rebase", "rollback", "sequences", "operations", "snapshots", "partial", "cpu"):
            error = result["checks"].get(check)
            if error is None:
                continue
            if not (isinstance(error, float | int) and error <= GPU_ROUNDING):
                failures.append(f"{name}: {check}: NMSE {error}")
            elif error >= worst.get(check, ("", 0.0))[1]:
                worst[check] = (name, error)
        layers = result["layers"]
        if layers["fused"] != layers["full"] + layers["sliding"] and models.expected()[name].get("fused", True):
            failures.append(f"{name}: {layers['fused']} of its layers are fused")
    print(f"  {len(results)} models, {len(failures)} failures")
    for failure in failures:
        print(f"  {failure}")
    return {"n_models": len(results), "failures": failures, "worst_nmse": worst, "models": results}


def test_loss(n_tokens: int) -> Record:
    """Loss of each token of a text with a small window, on the GPU and on the CPU."""
    import numpy as np

    from lminf_edge import Llama, LMInfConfig
    from lminf_edge.bench.contender import KV_TYPE_NUMBERS
    from lminf_edge.evaluate import token_nll

    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))).encode()
    results = []
    for model in ("nano", "nano-alibi"):
        for kv_type in ("f16", "q8_0"):
            losses = {}
            for where, n_gpu_layers in (("gpu", -1), ("cpu", 0)):
                llm = Llama(
                    model,
                    lminf=LMInfConfig(n_global=10, n_local=502),
                    n_gpu_layers=n_gpu_layers,
                    type_k=KV_TYPE_NUMBERS[kv_type],
                    type_v=KV_TYPE_NUMBERS[kv_type],
                    flash_attn=True,
                    verbose=False,
                )
                tokens = llm.tokenize(text)[:n_tokens]
                losses[where] = token_nll(llm, tokens)
                attention = llm.stream_info().attention
                llm.close()
            difference = np.abs(losses["gpu"] - losses["cpu"])
            results.append(
                {
                    "model": model,
                    "kv_type": kv_type,
                    "attention": attention,
                    "n_tokens": len(tokens),
                    "mean_gpu": float(losses["gpu"].mean()),
                    "mean_cpu": float(losses["cpu"].mean()),
                    "mean_difference": float(difference.mean()),
                    "max_difference": float(difference.max()),
                }
            )
            print(f"  {json.dumps(results[-1])}", flush=True)
    return {"window": 512, "results": results}


# --- measuring --------------------------------------------------------------------------------------------------------


def measure_attention(programs: Path, device: str, n_rounds: int) -> Record:
    command = [str(programs / "bench-attn"), device, "--rounds", str(n_rounds), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for line in lines:
        print(f"  {json.dumps(line)}", flush=True)
    if done.returncode:
        raise GpuError(f"bench-attn ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    return {"n_rounds": n_rounds, "results": lines}


FAR = 32768

# the windows that each shape is measured with
WINDOWS = {"llama-3.2-1b": (1024, 4096, 16384), "qwen3-0.6b": (1024, 4096, 16384), "llama-2-7b": (1024, 4096)}
TESTS: dict[str, tuple[Any, int]] = {"decode": ("tg", 64), "prefill": ("pp", 512)}


def contenders(windows: Sequence[int], test: str, kv_type: str) -> list[Any]:
    """Λ with an empty and a full window; stock empty, with as many tokens, and with 32k. Every cell is computed."""
    from lminf_edge.bench.contender import Contender
    from lminf_edge.config import default_ubatch

    kind, n_tokens = TESTS[test]
    common: dict[str, Any] = {"flash_attn": True, "kv_type": kv_type, "prefilled": True}
    ours = [
        Contender(
            "ours", "lambda", kind, n_tokens, depth, window, n_ubatch=default_ubatch(window, on_gpu=True), **common
        )
        for window in windows
        for depth in (0, 2 * window)
    ]
    return ours + [Contender("stock", "full", kind, n_tokens, depth, **common) for depth in (0, *windows, FAR)]


def measure_model(name: str, n_rounds: int, libraries: dict[str, Path], models: Path) -> Record:
    from speed import Experiment, measure

    test, shape, kv_type = split(name)
    # all rounds with the same contexts: a place in a GPU's memory is as good as another, and filling them takes longest
    experiment = Experiment(
        shape, n_rounds, lambda _: contenders(WINDOWS[shape], test, kv_type), rounds_per_context=n_rounds
    )
    return measure(experiment, libraries, models, n_threads=2, n_gpu_layers=-1)


def split(name: str) -> tuple[str, str, str]:
    """Test, shape and KV type of an experiment's name."""
    test, _, rest = name.partition("-")
    shape, _, kv_type = rest.rpartition("-")
    return test, shape, kv_type


MODELS = [f"{test}-{shape}-{kv_type}" for shape in WINDOWS for kv_type in ("f16", "q8_0") for test in TESTS]
PARTS = ["operations", "models", "loss", "attention", *MODELS]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, default="metal" if platform.system() == "Darwin" else "cuda")
    parser.add_argument("--only", metavar="PART", choices=PARTS, action="append", help=", ".join(PARTS))
    parser.add_argument("--model", metavar="ARCH", action="append", default=[], help="of the part models: these alone")
    parser.add_argument("--rounds", metavar="N", type=int, default=5, help="of decode and prefill; default 5")
    parser.add_argument("--cmake", metavar="OPTION", action="append", default=[], help="one more option for CMake")
    parser.add_argument("--models", metavar="DIR", type=Path, default=ROOT / "build" / "models")
    parser.add_argument("--out", metavar="DIR", type=Path, help="default docs/performance/cuda or .../metal")
    args = parser.parse_args()
    backend = BACKENDS[args.backend]
    out = args.out or ROOT / "docs" / "performance" / args.backend
    status = 0
    try:
        card = backend.card()
        print(", ".join(card.values()), flush=True)
        started = time.monotonic()
        options = [*backend.options, *args.cmake]
        targets = ["lminf", "test-attn", "test-archs", "bench-attn"]
        ours = build(args.backend, targets, ["-DLMINF_TESTS=ON", *options])
        stock = build(f"{args.backend}-stock", ["lminf"], ["-DLMINF_STOCK=ON", *options])
        print(f"built in {time.monotonic() - started:.0f} s", flush=True)

        os.environ["LMINF_LIB_PATH"] = str(ours)  # before lminf_edge is imported
        from machine import describe

        libraries = {"ours": ours, "stock": stock}
        machine = describe(ours, stock) | {"card": card}
        out.mkdir(parents=True, exist_ok=True)
    except (GpuError, ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    parts: dict[str, Callable[[], Record]] = {
        "operations": lambda: test_operations(ours, backend.device),
        "models": lambda: test_models(ours, backend.device, args.model),
        "loss": lambda: test_loss(4000),
        "attention": lambda: measure_attention(ours, backend.device, 2 * args.rounds + 1),
    }
    for name in args.only or PARTS:
        print(name, flush=True)
        started = time.monotonic()
        try:
            figures = parts[name]() if name in parts else measure_model(name, args.rounds, libraries, args.models)
        except (GpuError, ValueError, RuntimeError, MemoryError, ImportError, OSError) as error:
            print(f"error: {name}: {error}", file=sys.stderr)  # a card may be too small for one, and not for the next
            status = 1
            continue
        seconds = round(time.monotonic() - started, 1)
        print(f"  took {seconds:.0f} s", flush=True)
        record = {"experiment": name, "seconds": seconds, **figures, "machine": machine}
        (out / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        if figures.get("failures"):
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
