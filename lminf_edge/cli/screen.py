"""The live display of two readers side by side."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lminf_edge.cli.common import human_bytes

if TYPE_CHECKING:
    from lminf_edge.cli.demo import Side

BATCH = 256  # tokens between two updates of the display


class Screen:
    """Redraws two lines on a terminal; elsewhere prints a plain line now and then, without control characters."""

    PLAIN_EVERY = 5.0  # seconds

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._live = sys.stdout.isatty()
        self._drawn = False
        self._printed = time.monotonic()

    def show(self, stock: Side, lminf: Side, kv_stock: int, kv_lminf: int) -> None:
        if self._quiet:
            return
        lines = [_status("full attention", stock, kv_stock), _status("Λ cache", lminf, kv_lminf)]
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            scale = [loss / BATCH for reader in (stock, lminf) for loss in reader.losses]
            lines = [
                (line + "  " + sparkline(reader.losses, scale, width - len(line) - 2))[:width]
                for line, reader in zip(lines, (stock, lminf), strict=True)
            ]
            up = f"\x1b[{len(lines)}F" if self._drawn else ""
            print(up + "".join(f"\x1b[K{line}\n" for line in lines), end="", flush=True)
            self._drawn = True
        elif time.monotonic() - self._printed > self.PLAIN_EVERY:
            self._printed = time.monotonic()
            print("\n".join(lines), flush=True)

    def leave(self) -> None:
        if not self._quiet:
            print(flush=True)


def _status(name: str, reader: Side, n_bytes: int) -> str:
    recent = max(0, len(reader.losses) - 4) * BATCH
    nll, rate = reader.mean_nll(recent, reader.position), reader.rate(recent, reader.position)
    state = "done" if reader.done else f"{rate:.0f} tok/s"
    return f"{name:<14}  token {reader.position:>6}  {nll:.2f} nats  {state:>11}  KV {human_bytes(n_bytes):>8}"


def sparkline(losses: Sequence[float], scale: Sequence[float], width: int) -> str:
    """The mean losses of blocks (sums over BATCH tokens) as a row of bars, lowest to highest of `scale`."""
    if width < 8 or not losses:
        return ""
    n_columns = min(width, len(losses))
    means = []
    for column in range(n_columns):
        block = losses[column * len(losses) // n_columns : (column + 1) * len(losses) // n_columns]
        means.append(sum(block) / len(block) / BATCH)
    low, high = min(scale), max(scale)
    bars = "▁▂▃▄▅▆▇█"
    return "".join(
        bars[round((min(max(mean, low), high) - low) / ((high - low) or 1) * (len(bars) - 1))] for mean in means
    )
