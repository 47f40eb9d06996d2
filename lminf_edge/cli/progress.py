"""A progress line on stderr for long measurements, with the time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_WIDTH = 24  # of the bar
_EVERY = 0.1  # seconds between two updates


class Progress:
    """One bar for all parts of a task, on a terminal; nothing elsewhere.

    with Progress() as progress:
        progress.expect(n_tokens_of_all_parts)
        progress.begin("lminf")
        progress.at(512)  # of this part
    """

    def __init__(self, unit: str = "tokens") -> None:
        self._shown = sys.stderr.isatty()
        self._label, self._unit, self._total = "", unit, 1
        self._before = self._done = 0  # in the parts before this one; in all
        self._begun = self._drawn = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wipes the line: what follows is a result or an error."""
        if self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def expect(self, total: int) -> None:
        """How much there is to do in all parts."""
        self._total = max(total, 1)
        self._begun = time.monotonic()

    def begin(self, label: str) -> None:
        """The next part."""
        self._label, self._before = label, self._done

    def at(self, done: int) -> None:
        """How much of this part is done."""
        self._done = self._before + done
        now = time.monotonic()
        if not self._shown or (self._done < self._total and now - self._drawn < _EVERY):
            return
        self._drawn = now
        rate = self._done / max(now - self._begun, 1e-9)
        filled = _WIDTH * self._done // self._total
        left = (self._total - self._done) / rate if rate else 0.0
        print(
            f"\r\x1b[K{self._label:<15} [{'#' * filled:{_WIDTH}}] {self._done} of {self._total} {self._unit}, "
            f"{rate:.0f}/s, {_clock(left)} left",
            end="",
            file=sys.stderr,
            flush=True,
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
