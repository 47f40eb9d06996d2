"""Limits of time that a slow or a busy machine keeps, too: they grow with what a fixed piece of work takes there."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Clock = Callable[[], float]
WORK_SECONDS = 0.004  # of `work`, on a core of 2023 with nothing beside it


def work() -> None:
    """Strings, dicts, and memory that comes and goes: what templates, schemas and grammars are."""
    made = [{f"name {i} {j}": str(i * j) for j in range(40)} for i in range(120)]
    sorted(json.dumps(json.loads(json.dumps(made))).split(","))


def pace(clock: Clock) -> float:
    """How many times WORK_SECONDS the work takes now; at least 1."""
    took = []
    for _ in range(5):
        began = clock()
        work()
        took.append(clock() - began)
    return max(1.0, statistics.median(took) / WORK_SECONDS)


@contextmanager
def within(n_seconds: float, clock: Clock = time.process_time) -> Iterator[None]:
    """Fails if the block takes longer than `n_seconds` times the pace of this machine, before the block or after it."""
    before = pace(clock)
    began = clock()
    yield
    took = clock() - began
    limit = n_seconds * max(before, pace(clock))
    assert took < limit, f"took {took:.2f} s; {n_seconds} s are {limit:.2f} s at the pace of this machine"
