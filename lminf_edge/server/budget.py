"""How many bytes requests may hold at a time, over all of them: what a request takes in memory grows with these."""

from __future__ import annotations

import threading

from lminf_edge.engine.request import RequestCancelled
from lminf_edge.server.errors import ApiError

SMALL = 256 << 10  # bytes of each request that do not count
OBJECT_BYTES = 128  # that an object counts for, beside its own: a message of one word takes 3.5 KB until it is rendered
LATER = {"Retry-After": "1"}


class Budget:
    """For several threads."""

    def __init__(self, n_most: int) -> None:
        self.n_most = n_most
        self.n_held = 0  # beyond SMALL of each request
        self.lock = threading.Lock()


class Share:
    """What one request holds: its body, and the stored conversation that it goes on from."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._n_bytes = 0
        self._is_closed = False

    @property
    def n_held(self) -> int:
        """Bytes that count."""
        return max(0, self._n_bytes - SMALL)

    def take(self, n_bytes: int) -> None:
        """Holds more. Raises ApiError if there is no room, RequestCancelled once the request is over."""
        budget = self._budget
        with budget.lock:
            if self._is_closed:
                raise RequestCancelled
            n_more = max(0, self._n_bytes + n_bytes - SMALL) - self.n_held
            if self.n_held + n_more > budget.n_most:
                raise ApiError(
                    413,
                    f"This conversation has {self._n_bytes + n_bytes:,} bytes, with {OBJECT_BYTES} more for each "
                    f"message or other object, and {budget.n_most:,} may be held: compact it, or begin a new one.",
                )
            if budget.n_held + n_more > budget.n_most:
                raise ApiError(503, "Other long requests are being answered: try again later.", headers=LATER)
            budget.n_held += n_more
            self._n_bytes += n_bytes

    def close(self) -> None:
        """The request is over: gives all back."""
        with self._budget.lock:
            self._is_closed = True
            self._budget.n_held -= self.n_held
