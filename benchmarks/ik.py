"""Measures ik_llama.cpp beside this project and stock llama.cpp, in the same run: docs/performance/neighbor/ik-*.json.

    .venv/bin/python benchmarks/ik.py CHECKOUT [--shape llama-3.2-1b] [--weights Q4_0] [--depths 0,4096]

CHECKOUT is a copy of https://github.com/ikawrakow/ik_llama.cpp, of which nothing is kept here. Its llama-bench is built
beside it with the flags of ours (Release, this processor) and measured in every round after ours and stock, with and
without weights repacked at load time; it has flash attention on, which it needs for a quantized cache. Ours and stock
have made-up cells before a test (see lminf_edge/bench/state.py), ik_llama.cpp computes its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import ROOT, describe, read_bandwidth
from quantize import FILE_TYPES, quantize

from lminf_edge import native
from lminf_edge.bench.alternate import Bench
from lminf_edge.bench.contender import Contender
from lminf_edge.bench.random_model import SHAPES, random_model
from lminf_edge.config import default_ubatch

FIGURES = ROOT / "docs" / "performance" / "neighbor"
N_GEN = 32
N_PROMPT = 512


@dataclasses.dataclass(frozen=True)
class Setting:
    """A test of ik_llama.cpp's llama-bench; `repacked` is its --run-time-repack."""

    test: str
    n_tokens: int
    depth: int
    kv_type: str
    repacked: bool


def build(checkout: Path) -> Path:
    """ik_llama.cpp's llama-bench, built unless it is there.

    Raises ValueError if this is no checkout of it, and CalledProcessError if it cannot be built.
    """
    program = checkout / "build" / "bin" / "llama-bench"
    if not (checkout / "examples" / "llama-bench").is_dir():
        raise ValueError(f"{checkout} is no checkout of ik_llama.cpp.")
    if not program.exists():
        options = [
            "-DCMAKE_BUILD_TYPE=Release",
            "-DGGML_NATIVE=ON",
            "-DLLAMA_BUILD_TESTS=OFF",
            "-DLLAMA_BUILD_SERVER=OFF",
        ]
        subprocess.run(["cmake", "-G", "Ninja", "-B", checkout / "build", "-S", checkout, *options], check=True)
        subprocess.run(["cmake", "--build", checkout / "build", "--target", "llama-bench"], check=True)
    return program


def run(program: Path, model: Path, setting: Setting, n_threads: int) -> float:
    """Tokens per second of one run in a process of its own."""
    test = {
        "pp": ["-p", str(setting.n_tokens), "-n", "0"],
        "tg": ["-p", "0", "-n", "0", "-gp", f"{setting.depth},{setting.n_tokens}"]
        if setting.depth
        else ["-p", "0", "-n", str(setting.n_tokens)],
    }[setting.test]
    cache = ["-fa", "1", "-ctk", setting.kv_type, "-ctv", setting.kv_type, "-rtr", str(int(setting.repacked))]
    command = [str(program), "-m", str(model), "-t", str(n_threads), "-r", "1", "-o", "json", *test, *cache]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (result,) = json.loads(output[output.index("[") :])
    return float(setting.n_tokens / result["avg_ns"] * 1e9)


def contenders(depths: Sequence[int], window: int, kv_types: Sequence[str]) -> list[Contender]:
    """Ours and stock: decode at each depth, prefill into an empty cache."""
    n_ubatch = default_ubatch(window)
    made = []
    for kv_type in kv_types:
        for depth in depths:
            ours = Contender("ours", "lambda", "tg", N_GEN, depth, window, kv_type=kv_type, n_ubatch=n_ubatch)
            made.append(
                dataclasses.replace(ours, flash_attn=kv_type != "f16")
            )  # llama.cpp wants it; it changes nothing
            for flash in (False, True) if kv_type == "f16" else (True,):
                made.append(Contender("stock", "full", "tg", N_GEN, depth, window, flash_attn=flash, kv_type=kv_type))
    made.append(Contender("ours", "lambda", "pp", N_PROMPT, 0, window, n_ubatch=n_ubatch))
    made += [Contender("stock", "full", "pp", N_PROMPT, 0, window, flash_attn=flash) for flash in (False, True)]
    return made


def settings(depths: Sequence[int], kv_types: Sequence[str]) -> list[Setting]:
    decode = [
        Setting("tg", N_GEN, depth, kv_type, repacked)
        for kv_type in kv_types
        for depth in depths
        for repacked in (False, True)
    ]
    return decode + [Setting("pp", N_PROMPT, 0, "f16", repacked) for repacked in (False, True)]


def model_of(shape: str, weights: str, folder: Path, n_threads: int) -> Path:
    """A model of random weights in this format."""
    if weights.lower() in ("q4_0", "q8_0"):
        return random_model(shape, SHAPES[shape], folder, weights.lower())
    source = random_model(shape, SHAPES[shape], folder, "f16")
    target = source.with_name(source.name.replace("-f16-", f"-{weights.lower()}-"))
    if not target.exists():
        quantize(source, target, weights, n_threads)
    return target


def measure(
    program: Path,
    model: Path,
    libraries: dict[str, Path],
    depths: Sequence[int],
    window: int,
    rounds: int,
    threads: int,
) -> dict[str, Any]:
    """The JSON of one model, without the machine: `results` of ours and stock, `neighbor` of ik_llama.cpp."""
    kv_types = ("f16", "q8_0")
    ours = contenders(depths, window, kv_types)
    theirs = settings(depths, kv_types)
    speeds: list[list[float]] = [[] for _ in ours]
    others: list[list[float]] = [[] for _ in theirs]
    for i in range(rounds):
        # closed between rounds: a second copy of the model would share the machine's memory with ik_llama.cpp
        with Bench(libraries, model, threads) as bench:
            facts = bench.facts
            for each, contender in zip(speeds, ours, strict=True):
                (result,) = bench.measure([contender], 2, rounds_per_context=2)
                each.append(result.tokens_per_second[1])  # the first run warms up, as llama-bench's does
        for each, setting in zip(others, theirs, strict=True):
            each.append(run(program, model, setting, threads))
        print(f"  round {i + 1} of {rounds}", flush=True)
    return {
        "model": {"n_params": facts["ours"]["n_params"], "n_bytes": facts["ours"]["n_bytes"]},
        "system": {library: fact["system"] for library, fact in facts.items()},
        "n_rounds": rounds,
        "results": [
            {**dataclasses.asdict(contender), "tokens_per_second": each}
            for contender, each in zip(ours, speeds, strict=True)
        ],
        "neighbor": [
            {**dataclasses.asdict(setting), "tokens_per_second": each}
            for setting, each in zip(theirs, others, strict=True)
        ],
    }


def commit_of(checkout: Path) -> str:
    """The commit of a checkout, or "" where git does not know."""
    done = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a copy of ik_llama.cpp's repository")
    parser.add_argument("--commit", help="of the checkout, where git does not know it")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--weights", choices=[*FILE_TYPES], default="Q4_0")
    parser.add_argument("--depths", default="0,4096", help="stream positions, default 0,4096")
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stock-lib", metavar="DIR", type=Path, default=ROOT / "build" / "stock" / "bin")
    parser.add_argument("--models", metavar="DIR", type=Path, default=ROOT / "build" / "models")
    parser.add_argument("--out", metavar="DIR", type=Path, default=FIGURES, help="default docs/performance/neighbor")
    args = parser.parse_args()
    try:
        native.load()
        folder = native.library_folder()
        assert folder is not None
        program = build(args.checkout)
        model = model_of(args.shape, args.weights, args.models, args.threads)
        machine = describe(folder, args.stock_lib)
        started = time.monotonic()
        depths = [int(depth) for depth in args.depths.split(",")]
        figures = measure(
            program, model, {"ours": folder, "stock": args.stock_lib}, depths, args.window, args.rounds, args.threads
        )
        name = f"ik-{args.shape}-{args.weights.lower()}"
        figures["model"] |= {"shape": args.shape, "weights": args.weights.lower()}
        record = {
            "experiment": name,
            "n_threads": args.threads,
            "seconds": round(time.monotonic() - started, 1),
            "checkout": args.commit or commit_of(args.checkout),
            **figures,
            "bytes_per_second": read_bandwidth(args.threads, 5),
            "machine": machine,
        }
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    except (ValueError, RuntimeError, MemoryError, ImportError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
