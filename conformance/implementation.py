"""What an adapter yields: an implementation with its settings, and how to get its losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy.typing as npt
from oracle import Table


@dataclass(frozen=True)
class Implementation:
    """
    name        the cache and its settings
    how         the tokens come in
    case        of the vectors, which it is compared with
    losses      computes those of all tokens but the first, in nats, or those of the last tokens alone; an exception is
                a finding as well
    explained   what it really does, where that is known to be something else than the case
    """

    name: str
    how: str
    case: str
    losses: Callable[[], npt.ArrayLike]
    explained: Table | None = None
