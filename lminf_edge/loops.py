"""Detects that a model repeats itself, which it would do for ever."""

from __future__ import annotations

import numpy as np

MAX_PERIOD = 512  # tokens of the longest cycle detected
MIN_REPEATS = 4  # repetitions that make a cycle a loop, and
MIN_TOKENS = 512  # tokens they must span


class LoopDetector:
    """Detects a cycle of at most MAX_PERIOD tokens, repeated exactly, MIN_REPEATS times over MIN_TOKENS tokens.

    Greedy decoding ends in such cycles; repetitions that vary, as with a temperature, are not detected. On 26 novels
    and on tables, lists and code without a period of their own there is no false alarm. Time and memory per
    token are constant: MAX_PERIOD comparisons, in NumPy.
    """

    def __init__(self) -> None:
        self._tokens = np.full(8 * MAX_PERIOD, -1, dtype=np.int32)
        self._end = MAX_PERIOD  # the last MAX_PERIOD tokens precede it
        periods = np.arange(MAX_PERIOD, 0, -1)
        # by period, from the longest to 1: consecutive tokens equal to the one a period before, and how many are a loop
        self._runs = np.zeros(MAX_PERIOD, dtype=np.int32)
        self._loop = np.maximum(MIN_REPEATS * periods, MIN_TOKENS) - periods

    def push(self, token: int) -> bool:
        """Adds a token; returns whether the tokens up to it are a loop."""
        if self._end == len(self._tokens):
            self._tokens[:MAX_PERIOD] = self._tokens[-MAX_PERIOD:]
            self._end = MAX_PERIOD
        same = self._tokens[self._end - MAX_PERIOD : self._end] == token
        self._tokens[self._end] = token
        self._end += 1
        self._runs += 1
        self._runs *= same
        return bool((self._runs >= self._loop).any())
