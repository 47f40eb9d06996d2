"""The logits of a stream's last tokens, as many as fit a budget, indexed by position."""

from __future__ import annotations

from typing import Any

import numpy as np

from lminf_edge.cache.sequence import Logits
from lminf_edge.errors import ModelError, UserError

BUDGET = 256 << 20  # bytes


def check_numbers(logits: Logits) -> None:
    """Raises ModelError for logits of which some are NaN or infinity, or all are minus infinity."""
    if not np.isfinite(logits.max()):
        raise ModelError(
            "The model gives no numbers (NaN or infinity) after these tokens: its file is damaged or was converted "
            "badly, so try another copy of it."
        )


class Rows(np.ndarray[Any, np.dtype[np.float32]]):
    """Logits (n_rows, n_vocab) of which the first belongs to token `start`: rows are indexed by token.

    These are the indices of the array itself only if nothing was dropped (start 0). Negative indices count from the
    last token. Raises UserError, which is also an IndexError, for a token whose row was dropped.
    """

    start: int = 0

    def __array_finalize__(self, other: object) -> None:
        if isinstance(other, Rows) and self.shape[:1] == other.shape[:1]:
            self.start = other.start

    def __iter__(self) -> Any:
        return iter(self.view(np.ndarray))

    def __getitem__(self, key: Any) -> Any:
        start = self.start
        if start == 0:
            return super().__getitem__(key)
        row, rest = (key[0], key[1:]) if isinstance(key, tuple) and key else (key, ())
        if isinstance(row, slice):
            row = slice(self._row(row.start or 0), self._row(row.stop), row.step)
        elif isinstance(row, (int, np.integer)) and not isinstance(row, bool):
            row = self._row(int(row))
        index = (row, *rest)
        return self.view(np.ndarray)[index]

    def _row(self, token: int | None) -> int | None:
        if token is None or token < 0:
            return token
        if token < self.start:
            raise DroppedError(token, self.start, len(self))
        return token - self.start


class DroppedError(UserError, IndexError):
    """The logits of a token were dropped."""

    def __init__(self, token: int, start: int, n_rows: int) -> None:
        super().__init__(
            f"The logits of token {token} are not kept any more, only those of tokens {start} to {start + n_rows - 1}: "
            "read them in between shorter calls of eval."
        )


class ScoreWindow:
    """The last computed rows of logits that fit `budget` bytes.

    Arrays returned before keep their contents.
    """

    def __init__(self, n_vocab: int, budget: int = BUDGET) -> None:
        self._n_max = max(1, budget // (4 * n_vocab))
        self._rows: Logits = np.empty((0, n_vocab), dtype=np.float32)
        self._start = self._n_rows = 0

    def push(self, position: int, rows: Logits) -> None:
        """Stores rows (n_rows, n_vocab) of the tokens from `position` on, replacing those stored from there on."""
        self.truncate(position)
        if position != self._start + self._n_rows:
            self._start, self._n_rows = position, 0
        rows, position = rows[-self._n_max :], position + max(len(rows) - self._n_max, 0)
        if self._n_rows == 0:
            self._start = position
        n_kept = min(self._n_rows, self._n_max - len(rows))
        end = self._n_rows + len(rows)
        if end > len(self._rows):
            if end > self._n_max:  # drop a quarter at a time, not a row for each new one
                n_kept = min(n_kept, self._n_max * 3 // 4)
            n_room = min(self._n_max, max(2 * len(self._rows), n_kept + len(rows)))
            larger = np.empty((n_room, self._rows.shape[1]), dtype=np.float32)
            larger[:n_kept] = self._rows[self._n_rows - n_kept : self._n_rows]
            self._start, self._n_rows, self._rows = position - n_kept, n_kept, larger
        self._rows[self._n_rows : self._n_rows + len(rows)] = rows
        self._n_rows += len(rows)

    def truncate(self, n_tokens: int) -> None:
        """Forgets the rows of all but the first n_tokens."""
        n_rows = min(self._n_rows, max(n_tokens - self._start, 0))
        if n_rows < self._n_rows:  # arrays returned before are not overwritten
            self._rows, self._n_rows = self._rows[:n_rows].copy(), n_rows

    def rows(self, n_tokens: int) -> Rows:
        """The rows kept of a stream of n_tokens."""
        self.truncate(n_tokens)
        if self._start + self._n_rows != n_tokens:  # the last tokens came without logits
            self._start, self._n_rows = n_tokens, 0
        rows = self._rows[: self._n_rows].view(Rows)
        rows.start = self._start
        return rows
