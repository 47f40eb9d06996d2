"""Measures contenders in turn: each round runs every test once, so that all of them meet the same machine.

A ratio is taken within each round; its median and spread say what holds. A machine that slows down for a while slows
both sides of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lminf_edge.bench.contender import KV_TYPE_NUMBERS, Contender
from lminf_edge.config import check_memory
from lminf_edge.errors import UserError
from lminf_edge.native import LIBRARY_NAMES
from lminf_edge.weightless import Weightless

ROUNDS_PER_CONTEXT = 2


class Worker:
    """A worker process (worker.py) with a library from this folder.

    Raises UserError if there is no library in it, with the worker's sentence when something fails, and if the process
    ends, as when llama.cpp aborts or an rpc-server is gone.
    """

    def __init__(self, folder: Path) -> None:
        if not any((folder / name).exists() for name in LIBRARY_NAMES):
            raise UserError(f"There is no llama.cpp library in {folder}.")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lminf_edge.bench.worker"],
            env=os.environ | {"LMINF_LIB_PATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"op": op, **fields}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
            raise UserError(
                f"The process that measures ended {how} in {op!r}: what it printed says why, such as what llama.cpp "
                "cannot run; if it printed nothing, memory ran out."
            )
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise UserError(reply["error"])
        return reply

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@dataclass(frozen=True)
class Result:
    """Tokens per second of a contender, one figure per round, and the bytes of its KV cache."""

    contender: Contender
    kv_bytes: int
    tokens_per_second: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_second)

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self.contender),
            "label": self.contender.label,
            "kv_bytes": self.kv_bytes,
            "tokens_per_second": list(self.tokens_per_second),
            "median": self.median,
            "min": min(self.tokens_per_second),
            "max": max(self.tokens_per_second),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Result:
        return Result(Contender.from_json(value), value["kv_bytes"], tuple(value["tokens_per_second"]))


@dataclass(frozen=True)
class Ratio:
    """Median and spread, over the rounds, of one contender's speed over another's."""

    median: float
    min: float
    max: float


def ratio(result: Result, base: Result) -> Ratio:
    """How many times as fast `result` is as `base`, measured in the same rounds."""
    return ratio_of(result.tokens_per_second, base.tokens_per_second)


def ratio_of(speeds: Sequence[float], base: Sequence[float]) -> Ratio:
    """The same of speeds, one per round."""
    values = [a / b for a, b in zip(speeds, base, strict=True)]
    return Ratio(statistics.median(values), min(values), max(values))


def fastest(results: Sequence[Result]) -> Result:
    """The one with the best median."""
    return max(results, key=lambda result: result.median)


class Bench:
    """Workers that have one model loaded, one for each library.

    libraries: a folder for each name that contenders use; names with the same folder share a process.
    rpc_servers: machines that hold the layers, host:port each; each takes one process, so there may be one library.
    facts: for each name what worker.py answers to "load".

    Raises UserError, in one sentence, if a library, a server or the model cannot be used.
    """

    def __init__(
        self,
        libraries: Mapping[str, Path],
        model: str | os.PathLike[str],
        n_threads: int,
        n_gpu_layers: int = 0,
        rpc_servers: Sequence[str] = (),
    ) -> None:
        self._model = os.fspath(model)
        self._is_here = not rpc_servers
        self._workers: dict[Path, Worker] = {}
        self._folders = {name: folder.resolve() for name, folder in libraries.items()}
        request: dict[str, Any] = {"model": os.fspath(model), "n_threads": n_threads, "n_gpu_layers": n_gpu_layers}
        request["rpc_servers"] = list(rpc_servers)
        try:
            for folder in self._folders.values():
                if folder not in self._workers:
                    self._workers[folder] = Worker(folder)
            facts = {folder: worker.ask("load", **request) for folder, worker in self._workers.items()}
            self.facts = {name: facts[folder] for name, folder in self._folders.items()}
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()

    @contextlib.contextmanager
    def _opened(self, contenders: Sequence[Contender]) -> Iterator[list[tuple[Worker, dict[str, Any]]]]:
        """Contexts, numbered like the contenders, that are closed again."""
        if self._is_here:
            check_memory(sum(self._kv_bytes(contenders)))
        opened: list[tuple[Worker, dict[str, Any]]] = []
        try:
            for i, contender in enumerate(contenders):
                worker = self._workers[self._folders[contender.library]]
                opened.append((worker, worker.ask("open", id=i, contender=asdict(contender))))
            yield opened
        finally:
            for i, (worker, _) in enumerate(opened):
                with contextlib.suppress(RuntimeError):  # it has ended, and someone has been told
                    worker.ask("close", id=i)

    def _kv_bytes(self, contenders: Sequence[Contender]) -> list[int]:
        """Bytes that each one's cache takes, as the library of this process says: others cannot tell."""
        with Weightless(self._model) as model:
            return [
                model.layout(each.lambda_window(), KV_TYPE_NUMBERS[each.kv_type], each.n_ubatch).parts.kv_bytes
                if each.is_lambda
                else model.stock_bytes(each.n_ctx, KV_TYPE_NUMBERS[each.kv_type], each.n_ubatch)
                for each in contenders
            ]

    def measure(
        self,
        contenders: Sequence[Contender],
        n_rounds: int,
        progress: Callable[[str], None] = lambda line: None,
        rounds_per_context: int = ROUNDS_PER_CONTEXT,
    ) -> list[Result]:
        """Each contender's speeds, in the order given.

        All contexts exist at the same time, and every round begins with another contender. They are made anew for each
        rounds_per_context rounds, so that the place of its memory cannot favour one throughout.
        """
        n = len(contenders)
        speeds: list[list[float]] = [[] for _ in contenders]
        kv_bytes = self._kv_bytes(contenders)
        for begin in range(0, n_rounds, rounds_per_context):
            with self._opened(contenders) as opened:
                for round_ in range(begin, min(begin + rounds_per_context, n_rounds)):
                    for i in (j % n for j in range(round_, round_ + n)):
                        speed = contenders[i].n_tokens / opened[i][0].ask("run", id=i)["seconds"]
                        speeds[i].append(speed)
                        progress(
                            f"round {round_ + 1} of {n_rounds}: {contenders[i].library}, {contenders[i].cache_label}, "
                            f"{contenders[i].label}: {speed:.2f} tokens/s"
                        )
        return [Result(*fields) for fields in zip(contenders, kv_bytes, map(tuple, speeds), strict=True)]

    def latency(self, contender: Contender, n_tokens: int) -> dict[str, Any]:
        """What Context.latency in worker.py says about a stream of n_tokens."""
        with self._opened([contender]) as opened:
            return opened[0][0].ask("latency", id=0, n_tokens=n_tokens)
