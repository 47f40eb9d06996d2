"""A line on stderr that says how far a long measurement is."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_WIDTH = 24  # of the bar
_EVERY = 0.1  # seconds between two updates


class Progress:
    """A bar for each thing done, on a terminal; nothing elsewhere, or with `quiet`.

    with Progress(quiet) as progress:
        progress.begin("lminf", n_tokens)
        progress.at(512)
    """

    def __init__(self, quiet: bool) -> None:
        self._shown = not quiet and sys.stderr.isatty()
        self._label, self._total, self._unit = "", 1, ""
        self._begun = self._drawn = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wipes the line: what follows is a result or an error."""
        if self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def begin(self, label: str, total: int, unit: str = "tokens") -> None:
        self._label, self._total, self._unit = label, total, unit
        self._begun = time.monotonic()

    def at(self, done: int) -> None:
        now = time.monotonic()
        if not self._shown or (done < self._total and now - self._drawn < _EVERY):
            return
        self._drawn = now
        rate = done / max(now - self._begun, 1e-9)
        filled = _WIDTH * done // self._total
        left = (self._total - done) / rate if rate else 0.0
        print(
            f"\r\x1b[K{self._label:<15} [{'#' * filled:{_WIDTH}}] {done} of {self._total} {self._unit}, "
            f"{rate:.0f}/s, {_clock(left)} left",
            end="",
            file=sys.stderr,
            flush=True,
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
