"""What can be said about means and slopes that were measured on a finite text, with 95 % confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % confidence interval, from n independent samples."""

    value: float
    low: float
    high: float
    n: int

    @property
    def margin(self) -> float:
        return (self.high - self.low) / 2

    @property
    def is_zero(self) -> bool:
        """Whether zero lies within the interval."""
        return self.low <= 0 <= self.high


def proportion(n_right: int, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share of which n_right of n samples were right (Wilson's score interval)."""
    interval = stats.binomtest(n_right, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def mean_difference(a: Sequence[float] | Array, b: Sequence[float] | Array | float = 0.0) -> Estimate:
    """Mean of a - b over samples that belong together: the same blocks of text, so that its difficulty cancels.

    Raises ValueError for fewer than two.
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    n = len(difference)
    if n < 2:
        raise ValueError("A confidence interval needs two samples at least.")
    mean = float(difference.mean())
    margin = float(stats.t.ppf(0.975, n - 1) * stats.sem(difference))
    return Estimate(mean, mean - margin, mean + margin, n)


def slope(x: Array, y: Array, clusters: Array, within: bool = False) -> Estimate:
    """Slope of the least squares line through (x, y), all (n,).

    Samples with the same number in `clusters` are not independent of each other: here, the same block of text read
    again. The interval is the cluster-robust one (Liang & Zeger 1986, with the usual small-sample factor), with one
    degree of freedom less than there are clusters. With `within`, only differences inside clusters count.

    Raises ValueError for fewer than two clusters or no spread of x.
    """
    _, index = np.unique(clusters, return_inverse=True)
    n_clusters = int(index.max()) + 1 if len(index) else 0
    if n_clusters < 2:
        raise ValueError("A slope needs two blocks of text at least.")
    if within:
        counts = np.bincount(index)
        x, y = (values - (np.bincount(index, weights=values) / counts)[index] for values in (x, y))
    else:
        x, y = x - x.mean(), y - y.mean()
    spread = float((x * x).sum())
    if spread < 1e-12:
        raise ValueError("A slope needs blocks at different positions.")
    value = float((x * y).sum()) / spread
    scores = np.bincount(index, weights=x * (y - value * x))
    n = len(x)
    factor = n_clusters / (n_clusters - 1) * (n - 1) / max(n - 2, 1)
    margin = float(stats.t.ppf(0.975, n_clusters - 1)) * float(factor * (scores * scores).sum()) ** 0.5 / spread
    return Estimate(value, value - margin, value + margin, n_clusters)
