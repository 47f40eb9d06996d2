"""Plots of the results. They need matplotlib, the extra [plot]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lminf_edge.errors import UserError
from lminf_edge.evaluate.buckets import Bucket

if TYPE_CHECKING:
    from lminf_edge.evaluate.passkey import Cell

FORMATS = (".png", ".svg", ".pdf")

# color, dashes and width of each policy, drawn in this order: where they coincide, as they often do, all can be seen;
# the colors are Okabe and Ito's, which color-blind people tell apart, and no two solid lines are equally wide
STYLES = {
    "full": ("black", "-", 1.8),
    "sinks-uncapped": ("#D55E00", (0, (6, 1.5, 1, 1.5)), 2.4),
    "lminf": ("#56B4E9", "-", 5.0),
    "recall": ("#CC79A7", (0, (1, 1.5)), 3.0),
    "shift": ("#E69F00", (0, (3, 3)), 2.8),
    "sinks": ("#0072B2", (3, (3, 3)), 2.8),
    "window": ("#009E73", "-", 1.2),
}
NAMES = {
    "full": "full attention",
    "shift": "context shift",
    "window": "window alone",
    "sinks": "sinks, StreamingLLM",
    "sinks-uncapped": "sinks, uncapped",
    "lminf": "Λ, LM-Infinite",
    "recall": "Λ with recall",
}


def check_plot(path: Path) -> None:
    """Raises ImportError without matplotlib, ValueError for a kind of file that is not drawn; in one sentence."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path} is no picture that can be drawn: give a name that ends in {', '.join(FORMATS)}.")
    load_pyplot()


def plot_losses(
    path: Path, curves: Mapping[str, Sequence[Bucket]], n_ctx_train: int, window: int = 0, title: str = ""
) -> None:
    """Loss against position, on a logarithmic axis, with the training length and the window marked (0: not known)."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name in STYLES:
        if curves.get(name):
            color, line, width = STYLES[name]
            buckets = curves[name]
            # in the middle of the bucket, as the axis has it
            x = [(max(bucket.start, 1) * bucket.end) ** 0.5 if bucket.start else bucket.end / 2 for bucket in buckets]
            axes.plot(
                x,
                [bucket.mean for bucket in buckets],
                color=color,
                linestyle=line,
                linewidth=width,
                label=NAMES[name],
            )
    axes.margins(y=0.12)  # room for the names of the marks
    end = max(bucket.end for buckets in curves.values() for bucket in buckets)
    _position_axis(axes, end)
    _mark(axes, {"window full": window, "training length": n_ctx_train}, end)
    axes.set_ylabel("loss, nats per token")
    if title:
        axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=9, handlelength=4, loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def plot_passkey(path: Path, policies: Mapping[str, Sequence[Cell]], title: str = "") -> None:
    """A heat map for each policy: right answers in percent, by length and depth.

    A cell is hatched where most keys were out of reach.
    """
    pyplot = load_pyplot()
    from matplotlib import patheffects

    n_columns = min(3, len(policies))
    n_rows = -(-len(policies) // n_columns)
    lengths = sorted({cell.length for cells in policies.values() for cell in cells})
    depths = sorted({cell.depth for cells in policies.values() for cell in cells})
    figure, grid = pyplot.subplots(
        n_rows,
        n_columns,
        figsize=(1.6 + max(2.4, 0.62 * len(lengths)) * n_columns, 1.3 + max(1.6, 0.34 * len(depths)) * n_rows),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    image = None
    for axes, (name, cells) in zip(grid.flat, policies.items(), strict=False):
        values = [[float("nan")] * len(lengths) for _ in depths]
        for cell in cells:
            column, row = lengths.index(cell.length), depths.index(cell.depth)
            values[row][column] = cell.accuracy
            # white to dark blue: as good in gray, and for the color-blind
            ink = "white" if cell.accuracy > 0.55 else "black"
            lost = cell.in_reach < 0.5
            axes.add_patch(
                pyplot.Rectangle(
                    (column - 0.5, row - 0.5), 1, 1, facecolor="none", hatch="////" if lost else "",
                    edgecolor="0.75" if lost else "none", linewidth=0,
                )
            )  # fmt: skip
            axes.add_patch(
                pyplot.Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="none", edgecolor="0.6", linewidth=0.6)
            )
            number = axes.text(
                column, row, f"{100 * cell.accuracy:.0f}", color=ink, fontsize=7, ha="center", va="center"
            )
            paper = "white" if ink == "black" else "#08306b"  # keeps the hatching off the number
            number.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground=paper)])
        image = axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_title(NAMES[name], fontsize=10)
        axes.set_xticks(range(len(lengths)), [_position(length) for length in lengths], fontsize=8)
        axes.set_yticks(range(len(depths)), [f"{100 * depth:g}%" for depth in depths], fontsize=8)
        axes.tick_params(length=0)
    for axes in grid.flat[len(policies) :]:
        axes.set_visible(False)
    figure.supxlabel("length of the prompt, tokens; hatched: key out of reach", fontsize=9)
    figure.supylabel("where the key was told", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    bar = figure.colorbar(image, ax=grid, ticks=[0, 0.5, 1], format="{x:.0%}", shrink=0.8)
    bar.set_label("right answers", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    save(figure, path)


def plot_drift(path: Path, streams: Mapping[str, Sequence[tuple[float, float, float]]], title: str = "") -> None:
    """How much more tokens far into a stream cost than the same tokens do when a stream has just begun.

    `streams` has, by name, (position, mean difference in nats per token, margin of its 95 % interval).
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    end = 0
    for (name, points), color in zip(streams.items(), ("#0072B2", "#D55E00", "#009E73"), strict=False):
        x, y, margin = (list(values) for values in zip(*points, strict=True))
        axes.errorbar(x, y, yerr=margin, fmt="o-", color=color, markersize=4, linewidth=1.2, capsize=2, label=name)
        end = max(end, int(max(x)))
    largest = max(abs(y) + margin for points in streams.values() for _, y, margin in points)
    _position_axis(axes, int(1.3 * end))
    axes.set_xlim(left=min(points[0][0] for points in streams.values()) / 1.5)
    axes.axhline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_ylim(-1.5 * largest, 1.5 * largest)
    axes.set_ylabel("loss minus that of the same\ntext started fresh, nats")
    if title:
        axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    save(figure, path)


def plot_divergence(
    path: Path, policies: Mapping[str, tuple[Sequence[float], Sequence[float]]], window: int, title: str = ""
) -> None:
    """Mean KL divergence from full attention by position: (edges of buckets, means in nats) of each policy."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    for name in STYLES:
        if name in policies:
            color, line, width = STYLES[name]
            edges, means = policies[name]
            x = [(start + end) / 2 for start, end in pairwise(edges)]
            axes.plot(x, means, color=color, linestyle=line, linewidth=width, label=NAMES[name])
    end = max(int(edges[-1]) for edges, _ in policies.values())
    _mark(axes, {"window full": window}, end)
    axes.set_xlim(0, end)
    axes.set_xlabel("position, tokens")
    axes.set_ylabel("KL divergence, nats")
    if title:
        axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, handlelength=4, loc="upper left")
    save(figure, path)


def _mark(axes: Any, marks: Mapping[str, int], end: int) -> None:
    """Vertical lines at these positions before `end`, each with its name.

    Of two, the first is to the left of its line, and so is one, further down, that has no room at its right.
    """
    names: dict[int, list[str]] = {}
    for name, position in marks.items():
        if 0 < position < end:
            names.setdefault(position, []).append(name)
    for i, position in enumerate(sorted(names)):
        axes.axvline(position, color="0.3", linewidth=0.9, linestyle=":", zorder=1)
        is_narrow = 3 * position > end
        is_left = is_narrow or (i == 0 and len(names) > 1)
        axes.annotate(
            ", ".join(names[position]), (position, 1), (-4 if is_left else 4, -20 if is_narrow else -4),
            xycoords=("data", "axes fraction"), textcoords="offset points", va="top",
            ha="right" if is_left else "left", fontsize=9,
        )  # fmt: skip


def _position_axis(axes: Any, end: int) -> None:
    axes.set_xscale("log", base=2)
    ticks = [1 << k for k in range(6, end.bit_length())]
    while len(ticks) > 10:
        ticks = ticks[::2]
    axes.set_xticks(ticks, [_position(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(left=32, right=end)
    axes.set_xlabel("position, tokens")


def _position(n: int) -> str:
    """512, 16k, 2M: powers of two as people say them."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if n >= unit and n % unit == 0:
            return f"{n // unit}{name}"
    return str(n)


def load_pyplot() -> Any:
    """matplotlib.pyplot, without a window. Raises ImportError, in one sentence."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ImportError("A plot needs matplotlib: pip install 'lminf-edge[plot]'.") from None
    return pyplot


def save(figure: Any, path: Path) -> None:
    """Writes and closes it."""
    metadata = {"Software": None} if path.suffix.lower() == ".png" else None  # the same bytes for the same figures
    figure.savefig(path, dpi=120, metadata=metadata)
    load_pyplot().close(figure)
