"""Means over ranges of positions, accumulated while the stream is processed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_LEAST = 64  # tokens in a bucket of log_edges: fewer make a mean too noisy to look at
_PER_OCTAVE = 4


@dataclass(frozen=True)
class Bucket:
    """The mean over positions start .. end - 1."""

    start: int
    end: int
    mean: float


def even_edges(n: int, width: int) -> list[int]:
    """Edges of buckets of the same width, from 0 to n."""
    return [*range(0, n, width), n]


def log_edges(n: int) -> list[int]:
    """Edges of buckets for a logarithmic axis, from 0 to n: each octave 2^k .. 2^(k+1) in four, and 64 at least.

    Every power of two from 64 on is an edge, so that training lengths and windows are.
    """
    edges = [0]
    while edges[-1] < n:
        octave = 1 << max(edges[-1].bit_length() - 1, 0)
        edges.append(edges[-1] + max(_LEAST, octave // _PER_OCTAVE))
    return [*edges[:-1], n]


class BucketMeans:
    """Sums up values by position."""

    def __init__(self, edges: Sequence[int]) -> None:
        self._edges = np.asarray(edges)
        self._sums = np.zeros(len(edges) - 1)
        self._counts = np.zeros(len(edges) - 1, dtype=np.int64)
        self._end = 0  # after the furthest position

    def add(self, start: int, values: npt.NDArray[np.float64]) -> None:
        """`values` (n,) are those at positions start, start + 1, and so on."""
        at = np.searchsorted(self._edges, np.arange(start, start + len(values)), side="right") - 1
        self._sums += np.bincount(at, weights=values, minlength=len(self._sums))
        self._counts += np.bincount(at, minlength=len(self._sums))
        self._end = max(self._end, start + len(values))

    @property
    def count(self) -> int:
        return int(self._counts.sum())

    @property
    def mean(self) -> float:
        """Over all positions; nan without any."""
        return float(self._sums.sum() / self.count) if self.count else float("nan")

    def buckets(self) -> list[Bucket]:
        """Those that hold anything; the last one ends with the values."""
        return [
            Bucket(int(start), min(int(end), self._end), float(total / count))
            for start, end, total, count in zip(
                self._edges[:-1], self._edges[1:], self._sums, self._counts, strict=True
            )
            if count
        ]
