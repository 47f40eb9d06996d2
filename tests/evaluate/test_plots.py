"""What the pictures show, read from the figures before they are written."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib import colormaps, colors

from lminf_edge.evaluate import plots
from lminf_edge.evaluate.buckets import Bucket
from lminf_edge.evaluate.passkey import Cell
from lminf_edge.evaluate.policies import POLICIES


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    yield figures
    for figure in figures:
        plots.load_pyplot().close(figure)


def marks(axes: Any) -> dict[float, str]:
    """Position and name of each vertical line."""
    lines = [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1]
    names = {text.xy[0]: text.get_text() for text in axes.texts}
    return {x: names[x] for x in lines}


@pytest.mark.parametrize(
    ("n_ctx_train", "window", "expected"),
    [
        (512, 256, {256: "window full", 512: "training length"}),
        (256, 512, {256: "training length", 512: "window full"}),
        (512, 512, {512: "window full, training length"}),
        (0, 256, {256: "window full"}),
        (512, 0, {512: "training length"}),
        (4096, 256, {256: "window full"}),  # the stream ends before
        (0, 0, {}),
    ],
)
def test_window_and_training_length_are_marked(
    drawn: list[Any], n_ctx_train: int, window: int, expected: dict[int, str]
) -> None:
    curve = [Bucket(i * 64, (i + 1) * 64, 4.0) for i in range(32)]
    plots.plot_losses(Path("x.png"), {"lminf": curve}, n_ctx_train, window)
    assert marks(drawn[0].axes[0]) == expected


def test_every_policy_has_a_line_of_its_own() -> None:
    assert set(plots.STYLES) == set(POLICIES) == set(plots.NAMES)
    looks = [(str(dashes), width) for _, dashes, width in plots.STYLES.values()]
    assert len(set(looks)) == len(looks)  # without any color
    assert len({colors.to_hex(color) for color, _, _ in plots.STYLES.values()}) == len(looks)


def test_a_passkey_map_has_numbers_borders_and_one_scale_from_light_to_dark(drawn: list[Any]) -> None:
    cells = [
        Cell(length, depth, trials=10, correct=correct, reachable=reachable, found=0)
        for length, depth, correct, reachable in [
            (128, 0.0, 10, 10),
            (128, 1.0, 9, 10),
            (256, 0.0, 0, 0),
            (256, 1.0, 4, 4),
        ]
    ]
    plots.plot_passkey(Path("x.png"), {"lminf": cells})
    axes = drawn[0].axes[0]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): "100", (0, 1): "90", (1, 0): "0", (1, 1): "40",
    }  # fmt: skip
    borders = [patch.get_xy() for patch in axes.patches if patch.get_linewidth() > 0]
    assert sorted(borders) == [(-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)]
    assert sorted(patch.get_xy() for patch in axes.patches if patch.get_hatch()) == [(0.5, -0.5), (0.5, 0.5)]
    cmap = colormaps[axes.images[0].get_cmap().name]
    gray = [
        sum(part * weight for part, weight in zip(cmap(x / 20), (0.30, 0.59, 0.11), strict=False)) for x in range(21)
    ]
    assert all(lighter > darker for lighter, darker in pairwise(gray))
    for text in axes.texts:  # legible: light on dark, dark on light
        value = cells[[(0, 0), (0, 1), (1, 0), (1, 1)].index(text.get_position())].accuracy
        paper = gray[round(20 * value)]
        assert abs(paper - (1.0 if text.get_color() == "white" else 0.0)) > 0.4
