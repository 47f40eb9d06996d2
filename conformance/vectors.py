"""Vectors: a model, tokens, and for each of several policies the loss of every token as the oracle has it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from oracle import Array, Llama, Table, distances

FOLDER = Path(__file__).parent / "vectors"


@dataclass(frozen=True)
class Case:
    """A policy with its parameters, as oracle.distances takes them, and the losses (n_tokens - 1,) that it gives."""

    name: str
    policy: str
    parameters: dict[str, int]
    losses: Array

    def table(self, n_tokens: int) -> Table:
        return distances(n_tokens, self.policy, **self.parameters)


@dataclass(frozen=True)
class Vectors:
    """One file of vectors/.

    model       its GGUF file
    tolerance   nats per token that rounding to f32 may cost; the nearest wrong rule costs far more
    """

    name: str
    model: Path
    tokens: npt.NDArray[np.int32]
    tolerance: float
    cases: dict[str, Case]

    @cached_property
    def oracle(self) -> Llama:
        return Llama(self.model)


@dataclass(frozen=True)
class Difference:
    """Of an implementation's losses from a case's, in nats per token.

    first   the first token whose loss differs by more than the tolerance, None if there is none
    """

    case: str
    largest: float
    mean: float
    first: int | None

    @property
    def conforms(self) -> bool:
        return self.first is None


def load(name: str) -> Vectors:
    path = FOLDER / f"{name}.json"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    cases = {
        name: Case(name, case["policy"], case["parameters"], np.array(case["losses"]))
        for name, case in record["cases"].items()
    }
    tokens = np.array(record["tokens"], dtype=np.int32)
    return Vectors(path.stem, (FOLDER / record["model"]).resolve(), tokens, record["tolerance"], cases)


def load_all() -> Iterator[Vectors]:
    for path in sorted(FOLDER.glob("*.json")):
        yield load(path.stem)


def compare(losses: npt.ArrayLike, expected: Array, tolerance: float, case: str = "") -> Difference:
    """Of n losses, which are those of the last n tokens; what is not a number is no loss.

    Raises ValueError if there are none, or more than there are to compare with.
    """
    found = np.asarray(losses, dtype=np.float64)
    missing = len(expected) - len(found)
    if found.ndim != 1 or not len(found) or missing < 0:
        raise ValueError(f"losses of shape {found.shape}, and there are {len(expected)} to compare with")
    difference = np.abs(found - expected[missing:])
    difference[~np.isfinite(difference)] = np.inf
    wrong = np.flatnonzero(difference > tolerance)
    # expected[i] is that of token i + 1
    first = missing + int(wrong[0]) + 1 if len(wrong) else None
    return Difference(case, float(difference.max()), float(difference.mean()), first)


def nearest(losses: npt.ArrayLike, vectors: Vectors) -> Difference:
    """From the case that these losses are nearest to."""
    found = (compare(losses, case.losses, vectors.tolerance, case.name) for case in vectors.cases.values())
    return min(found, key=lambda difference: difference.mean)
