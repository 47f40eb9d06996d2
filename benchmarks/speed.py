"""Measures what docs/performance.md says, beside stock llama.cpp, and writes it to docs/performance/*.json.

    make bench, or: .venv/bin/python benchmarks/speed.py [--only NAME]... [--threads 2]

About 15 minutes on two cores; 5 GB of disk for models (build/models), and 20 GB of memory for the 7B one. Leave the
machine alone meanwhile. benchmarks/report.py makes the page and the plot from what is written here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from machine import ROOT, describe, read_bandwidth

from lminf_edge import native
from lminf_edge.bench.alternate import ROUNDS_PER_CONTEXT, Bench
from lminf_edge.bench.contender import Contender
from lminf_edge.bench.random_model import SHAPES, Shape, random_model
from lminf_edge.config import LMInfConfig, Recall, default_ubatch
from lminf_edge.models import find_model

FIGURES = ROOT / "docs" / "performance"


@dataclass(frozen=True)
class Size:
    """How large everything is: the real thing, or small enough for a test."""

    shapes: dict[str, Shape]
    window: int = 4096
    positions: tuple[int, ...] = (0, 1024, 2048, 4096, 8192, 32768, 1_000_000)
    full_positions: tuple[int, ...] = (0, 1024, 2048, 4096, 8192, 16384, 32768)
    n_gen: int = 32
    n_gen_slow: int = 8  # for deep full attention and large models
    n_prompt: int = 512
    n_latency: int = 101_000  # the first thousand are not counted
    archived: tuple[int, int] = (100_000, 1_000_000)
    most_rounds: int = 1000

    @property
    def full_window(self) -> int:
        """A stream position at which every cell of a Λ cache is in use."""
        return 2 * self.window


# the attention of the 1B shape with little around it, to tell small differences in attention apart
_1B = SHAPES["llama-3.2-1b"]
REAL = Size(SHAPES | {"attention-1b": dataclasses.replace(_1B, n_ff=256, n_vocab=512)})
TINY = Size(
    {
        name: dataclasses.replace(
            shape, n_layer=2, n_embd=64, n_head=4, n_head_kv=2, head_size=64, n_ff=96, n_vocab=300
        )
        for name, shape in REAL.shapes.items()
    },
    window=512,
    positions=(0, 512, 2048, 1_000_000),
    full_positions=(0, 512, 2048),
    n_gen=2,
    n_gen_slow=2,
    n_prompt=64,
    n_latency=200,
    archived=(5000, 6000),
    most_rounds=2,
)


@dataclass(frozen=True)
class Experiment:
    """Contenders that are measured in turn, all with one model."""

    shape: str
    n_rounds: int
    contenders: Callable[[Size], Sequence[Contender]]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)  # of the processes that are measured
    rounds_per_context: int = ROUNDS_PER_CONTEXT


# glibc then asks for huge pages for everything that llama.cpp allocates, in both libraries
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def ours(size: Size, depth: int, n_gen: int | None = None) -> list[Contender]:
    """Without flash attention, which the fused attention does not use."""
    n_ubatch = default_ubatch(size.window)
    return [Contender("ours", "lambda", "tg", n_gen or size.n_gen, depth, size.window, n_ubatch=n_ubatch)]


def full(size: Size, depth: int, n_gen: int | None = None) -> list[Contender]:
    n_tokens = n_gen or size.n_gen
    return [Contender("stock", "full", "tg", n_tokens, depth, size.window, flash_attn=fa) for fa in (False, True)]


def window(size: Size, n_gen: int | None = None) -> list[Contender]:
    n_tokens = n_gen or size.n_gen
    at = size.window - n_tokens
    return [Contender("stock", "window", "tg", n_tokens, at, size.window, flash_attn=fa) for fa in (False, True)]


def decode(size: Size) -> list[Contender]:
    """Ours with a full window and an empty cache, stock with as large a context, full, and an empty one."""
    return ours(size, size.full_window) + ours(size, 0) + window(size) + full(size, 0)


def decode_slow(size: Size) -> list[Contender]:
    return ours(size, size.full_window, size.n_gen_slow) + window(size, size.n_gen_slow)


def decode_q8_0(size: Size) -> list[Contender]:
    """With flash attention alone: stock has no quantized values without it."""
    f16, stock = ours(size, size.full_window), window(size)[1:]
    return f16 + [dataclasses.replace(c, kv_type="q8_0", flash_attn=True) for c in f16 + stock]


def positions(size: Size) -> list[Contender]:
    n_gen = size.n_gen_slow
    streams = [contender for depth in size.positions for contender in ours(size, depth, n_gen)]
    stock = [contender for depth in size.full_positions for contender in full(size, depth, n_gen)]
    return streams + stock + window(size, n_gen)


def far(size: Size) -> list[Contender]:
    return ours(size, size.full_window) + ours(size, 1_000_000)


def prefill(size: Size) -> list[Contender]:
    def prompts(contenders: Sequence[Contender]) -> list[Contender]:
        n = size.n_prompt
        return [
            dataclasses.replace(c, test="pp", n_tokens=n, depth=size.window - n if c.cache == "window" else c.depth)
            for c in contenders
        ]

    stock = [
        dataclasses.replace(c, n_ubatch=n) for c in window(size) for n in (c.n_ubatch, default_ubatch(size.window))
    ]
    return prompts(ours(size, size.full_window) + ours(size, 0) + stock)


def sinks(size: Size) -> list[Contender]:
    """The same n_local with and without sinks, and an empty cache to take off what is not attention."""
    (with_sinks,) = ours(size, size.full_window, 3 * size.n_gen)
    without = dataclasses.replace(with_sinks, n_global=0, window=with_sinks.window - with_sinks.n_global)
    return [with_sinks, without, dataclasses.replace(without, depth=0)]


def recalling(size: Size, depth: int) -> list[Contender]:
    """Decoding with as many tokens in the archive, and without one."""
    (without,) = ours(size, depth)
    recall = Recall(**LMInfConfig(n_recall=32, n_archive=depth + 8 * size.n_prompt).recall_settings())
    n_ubatch = default_ubatch(size.window, recalls=True)
    return [without, dataclasses.replace(without, cache="recall", recall=recall, n_ubatch=n_ubatch)]


def recalling_prompts(size: Size) -> list[Contender]:
    contenders = recalling(size, size.archived[0])
    return [dataclasses.replace(c, test="pp", n_tokens=size.n_prompt) for c in contenders]


def made_up(size: Size) -> list[Contender]:
    """Cells made up and cells really computed."""
    small = dataclasses.replace(size, window=size.window // 4)
    contenders = ours(small, small.full_window) + full(small, small.full_window)
    return [dataclasses.replace(c, prefilled=prefilled) for c in contenders for prefilled in (False, True)]


EXPERIMENTS = {
    "decode-llama-3.2-1b": Experiment("llama-3.2-1b", 8, decode),
    "decode-llama-3.2-1b-q8_0": Experiment("llama-3.2-1b", 6, decode_q8_0),
    "decode-qwen3-0.6b": Experiment("qwen3-0.6b", 4, decode),
    "decode-llama-2-7b": Experiment("llama-2-7b", 6, decode_slow),
    "huge-pages-llama-3.2-1b": Experiment("llama-3.2-1b", 4, decode, HUGE_PAGES),
    "huge-pages-llama-2-7b": Experiment("llama-2-7b", 4, decode_slow, HUGE_PAGES),
    "positions": Experiment("llama-3.2-1b", 4, positions),
    "far": Experiment("llama-3.2-1b", 8, far),
    "prefill": Experiment("llama-3.2-1b", 4, prefill),
    "sinks": Experiment("attention-1b", 20, sinks),
    "recall": Experiment("llama-3.2-1b", 6, lambda size: recalling(size, size.archived[0])),
    "recall-prefill": Experiment("llama-3.2-1b", 4, recalling_prompts),
    "recall-far": Experiment("llama-3.2-1b", 4, lambda size: recalling(size, size.archived[1])),
    "made-up-cells": Experiment("qwen3-0.6b", 4, made_up),
}
LATENCY = "latency"
BANDWIDTH = "bandwidth"
BUSY = "busy"

# how threads wait for each other: GCC's OpenMP spins for some milliseconds, for 5,000 turns, or sleeps at once
WAITING = {"spin": {}, "spin briefly": {"GOMP_SPINCOUNT": "5000"}, "sleep": {"OMP_WAIT_POLICY": "passive"}}
N_BUSY = (0, 1, 2)  # other processes that never rest


def measure(
    experiment: Experiment,
    libraries: dict[str, Path],
    models: Path,
    n_threads: int,
    n_gpu_layers: int = 0,
    size: Size = REAL,
) -> dict[str, Any]:
    """The JSON of one experiment, without the machine."""
    model = random_model(experiment.shape, size.shapes[experiment.shape], models)
    n_rounds = min(experiment.n_rounds, size.most_rounds)
    environment = mock.patch.dict(os.environ, experiment.environment)
    with environment, Bench(libraries, model, n_threads, n_gpu_layers) as bench:
        results = bench.measure(
            experiment.contenders(size),
            n_rounds,
            lambda line: print(f"  {line}", flush=True),
            experiment.rounds_per_context,
        )
        facts = bench.facts
    return {
        "model": {"shape": experiment.shape, "weights": "q4_0", **_model_facts(facts)},
        "n_rounds": n_rounds,
        "system": {library: fact["system"] for library, fact in facts.items()},
        "results": [result.as_json() for result in results],
    }


def measure_latency(size: Size, libraries: dict[str, Path], n_threads: int) -> dict[str, Any]:
    """Time between tokens of one long stream of the embedded model."""
    contender = Contender("ours", "lambda", "tg", 32, 0, 512, n_ubatch=default_ubatch(512))
    with Bench({"ours": libraries["ours"]}, find_model("nano"), n_threads) as bench:
        latency = bench.latency(contender, size.n_latency)
        facts = bench.facts
    return {
        "model": {"shape": "nano", "weights": "q8_0", **_model_facts(facts)},
        "system": {library: fact["system"] for library, fact in facts.items()},
        "contender": dataclasses.asdict(contender),
        "latency": latency,
    }


def measure_bandwidth(size: Size, n_workers: int) -> dict[str, Any]:
    """What memory yields to as many processes as decoding has threads."""
    return {"system": {"ours": ""}, "bytes_per_second": read_bandwidth(n_workers, min(5, size.most_rounds))}


@contextlib.contextmanager
def other_work(n_processes: int) -> Iterator[None]:
    """So many processes of one thread that do nothing else than compute."""
    busy = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"  # no longer than we live
    processes = []
    try:
        for _ in range(n_processes):
            processes.append(subprocess.Popen([sys.executable, "-c", busy]))
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure_busy(size: Size, libraries: dict[str, Path], models: Path, n_threads: int) -> dict[str, Any]:
    """Decoding beside other work, by n_threads, which should be as many as there are cores, and by half of them."""
    shape = "qwen3-0.6b"
    paths: dict[str, str | os.PathLike[str]] = {
        "nano": find_model("nano"),
        shape: random_model(shape, size.shapes[shape], models),
    }
    settings = dict.fromkeys([*((n_threads, name) for name in WAITING), (max(n_threads // 2, 1), "spin")])
    n_rounds = min(3, size.most_rounds)
    contender = Contender("ours", "lambda", "tg", size.n_gen, 0, 512, n_ubatch=default_ubatch(512))
    results, system = [], {}
    for model, path in paths.items():
        for n_busy, (threads, waiting) in itertools.product(N_BUSY, settings):
            environment = mock.patch.dict(os.environ, WAITING[waiting])
            with environment, other_work(n_busy), Bench({"ours": libraries["ours"]}, path, threads) as bench:
                (result,) = bench.measure([contender], n_rounds)
                system = {library: fact["system"] for library, fact in bench.facts.items()}
            speeds = list(result.tokens_per_second)
            print(f"  {model}, {threads} threads, {waiting}, {n_busy} busy: {speeds}", flush=True)
            results.append(
                {"model": model, "threads": threads, "waiting": waiting, "busy": n_busy, "tokens_per_second": speeds}
            )
    return {"system": system, "environments": WAITING, "n_gen": size.n_gen, "results": results}


def _model_facts(facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"n_params": facts["ours"]["n_params"], "n_bytes": facts["ours"]["n_bytes"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [*EXPERIMENTS, LATENCY, BANDWIDTH, BUSY]
    parser.add_argument("--only", metavar="NAME", choices=names, action="append", help=", ".join(names))
    parser.add_argument("--threads", metavar="N", type=int, default=2, help="default 2")
    parser.add_argument("--rounds", metavar="N", type=int, help="at most N, for a first look")
    parser.add_argument("--stock-lib", metavar="DIR", type=Path, default=ROOT / "build" / "stock" / "bin")
    parser.add_argument("--models", metavar="DIR", type=Path, default=ROOT / "build" / "models")
    parser.add_argument("--out", metavar="DIR", type=Path, default=FIGURES, help="default docs/performance")
    parser.add_argument("--tiny", action="store_true", help="tiny models and two rounds, to see that it works")
    args = parser.parse_args()
    if args.tiny and args.out == FIGURES:
        parser.error("--tiny needs --out: its figures say nothing")
    size = TINY if args.tiny else REAL
    size = dataclasses.replace(size, most_rounds=min(size.most_rounds, args.rounds or size.most_rounds))
    try:
        native.load()
        folder = native.library_folder()
        assert folder is not None
        libraries = {"ours": folder, "stock": args.stock_lib}
        args.out.mkdir(parents=True, exist_ok=True)
        machine = describe(folder, args.stock_lib)
        for name in args.only or names:
            print(f"{name}", flush=True)
            started = time.monotonic()
            if name == LATENCY:
                figures = measure_latency(size, libraries, args.threads)
            elif name == BANDWIDTH:
                figures = measure_bandwidth(size, args.threads)
            elif name == BUSY:
                figures = measure_busy(size, libraries, args.models, args.threads)
            else:
                figures = measure(EXPERIMENTS[name], libraries, args.models, args.threads, size=size)
            seconds = round(time.monotonic() - started, 1)
            print(f"  took {seconds:.0f} s", flush=True)
            record = {"experiment": name, "n_threads": args.threads, "seconds": seconds, **figures, "machine": machine}
            (args.out / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    except (ValueError, RuntimeError, MemoryError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
