"""Decode and prefill with recall over a long archive, against the same window without it, in turn in one process.

    .venv/bin/python benchmarks/recall.py [--shape NAME] [--tokens N] [--json FILE]

Weights and tokens are random; times do not depend on them. The archive is filled by really reading the tokens, without
recalling: minutes for 100k tokens of a 1B model. --small takes the attention of the shape alone, with little around it:
filled in a minute, and nearly all of what it then does is recall's, as one who looks for hot spots wants it.

Where other work runs beside it, threads wait for each other, and the clock says little: OMP_WAIT_POLICY=passive, and
the ratio of processor times.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as bindings
from llama_cpp._logger import set_verbose

from lminf_edge import native
from lminf_edge.bench.random_model import find_shape, random_model
from lminf_edge.model import native_context, native_model

ROOT = Path(__file__).resolve().parent.parent
N_BATCH = 512


class Stream:
    """A context with a Λ window, and a stream of random tokens in it."""

    def __init__(self, model: Any, args: argparse.Namespace, n_recall: int) -> None:
        self._native = native.load()
        params = self._native.default_params()
        params.n_global, params.n_local = 10, args.window - 10
        params.n_recall, params.n_archive = n_recall, 2 * args.tokens
        self._n_recall = n_recall
        self._rng = np.random.default_rng(0)
        self._n_vocab = bindings.llama_vocab_n_tokens(bindings.llama_model_get_vocab(model))
        self.ctx = native_context(
            model,
            params,
            n_ctx=max(args.window, N_BATCH),
            n_batch=N_BATCH,
            n_ubatch=args.ubatch,
            n_threads=args.threads,
            n_threads_batch=args.threads,
        )

    def fill(self, n_tokens: int) -> None:
        if self._n_recall:
            self._native.set_recall(self.ctx, 0)
        self.process(n_tokens, N_BATCH)
        if self._n_recall:
            self._native.set_recall(self.ctx, self._n_recall)

    def process(self, n_tokens: int, step: int) -> tuple[float, float]:
        """The seconds that it takes, `step` tokens at a time: by the clock, and of all processors."""
        tokens = self._rng.integers(0, self._n_vocab, n_tokens, dtype=np.int32)
        started, worked = time.perf_counter(), time.process_time()
        for start in range(0, n_tokens, step):
            pointer = ctypes.cast(tokens.ctypes.data + 4 * start, ctypes.POINTER(ctypes.c_int32))
            result = bindings.llama_decode(self.ctx, bindings.llama_batch_get_one(pointer, min(step, n_tokens - start)))
            if result != 0:
                raise RuntimeError(f"llama_decode returned {result}.")
        bindings.llama_synchronize(self.ctx)
        return time.perf_counter() - started, time.process_time() - worked


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--small", action="store_true", help="its attention with little around it")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens in the archive")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--recall", type=int, default=256)
    parser.add_argument("--ubatch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()

    set_verbose(False)
    name, shape = args.shape, find_shape(args.shape)
    if args.small:
        name, shape = f"{name}-small", replace(shape, n_embd=256, n_ff=256, n_vocab=256)
    model = native_model(str(random_model(name, shape, ROOT / "build" / "models")))
    without, with_recall = (Stream(model, args, n_recall) for n_recall in (0, args.recall))
    without.fill(args.window + 2 * N_BATCH)
    begun = time.perf_counter()
    with_recall.fill(args.tokens)
    print(f"{args.tokens} tokens archived in {time.perf_counter() - begun:.0f} s", flush=True)

    figures: dict[str, Any] = {**vars(args), "json": None, "load_before": os.getloadavg()[0]}
    for test, n_tokens, step in (("decode", 32, 1), ("prefill", N_BATCH, N_BATCH)):
        times: list[list[tuple[float, float]]] = [[], []]
        for i in range(args.rounds + 1):  # the first warms up
            for j in (0, 1) if i % 2 else (1, 0):
                taken = (without, with_recall)[j].process(n_tokens, step)
                if i:
                    times[j].append(taken)
        figures[test] = {"n_tokens": n_tokens, "without": times[0], "with": times[1]}
        for at, kind in enumerate(("the clock", "processor time")):
            a, b = ([each[at] for each in those] for those in times)
            ratios = [x / y for x, y in zip(a, b, strict=True)]
            print(
                f"{test:<8} by {kind:<15} {1e3 * statistics.median(a) / n_tokens:7.2f} ms a token without recall, "
                f"{1e3 * statistics.median(b) / n_tokens:7.2f} with: {statistics.median(ratios):.3f} of the speed "
                f"({min(ratios):.3f} to {max(ratios):.3f})",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
