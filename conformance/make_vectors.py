"""Writes vectors/: the tiny model, the tokens, and what the oracle makes of them.

The tiny model has random weights, at scales where attention is far from uniform and logits are far from flat, so that
every wrong distance shows (tests/reference/tiny_models.py). nano is the trained model of the package, on English text.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from oracle import Llama, distances
from reference import tiny_models
from vectors import FOLDER

import lminf_edge
from lminf_edge.evaluate.stories import STORIES

# nats: f32 takes no token further than 5e-5, the nearest wrong rule takes some further than 0.05
TOLERANCE = 2e-4


def cases(n_global: int, n_local: int) -> dict[str, dict[str, Any]]:
    """All policies with as many tokens in view, and the ceiling elsewhere."""
    window = {"n_global": n_global, "n_local": n_local}
    made: dict[str, dict[str, Any]] = {
        "full": {"policy": "full", "parameters": {}},
        "window": {"policy": "window", "parameters": {"n_local": n_global + n_local}},
        "lminf-far": {"policy": "lminf", "parameters": window | {"max_distance": 2 * n_local}},
        "lminf-more-sinks-than-window": {
            "policy": "lminf",
            "parameters": {"n_global": n_local // 2, "n_local": n_local // 3, "max_distance": n_local},
        },
        "recall": {"policy": "recall", "parameters": window | {"recall_distance": 2 * n_local}},
    }
    made.update(
        {name: {"policy": name, "parameters": window} for name in ("lminf", "sinks", "sinks-uncapped", "shift")}
    )
    return made


def write(name: str, model: str, tokens: list[int], tolerance: float, chosen: dict[str, dict[str, Any]]) -> None:
    oracle = Llama(FOLDER / model)
    for case in chosen.values():
        table = distances(len(tokens), case["policy"], **case["parameters"])
        case["losses"] = np.round(oracle.losses(tokens, table), 6).tolist()
    lines = [
        f' "{key}": {{"policy": "{case["policy"]}", "parameters": {json.dumps(case["parameters"])},\n'
        f'  "losses": {json.dumps(case["losses"])}}}'
        for key, case in chosen.items()
    ]
    (FOLDER / f"{name}.json").write_text(
        f'{{"model": "{model}", "tolerance": {tolerance},\n"tokens": {tokens},\n"cases": {{\n'
        + ",\n".join(lines)
        + "\n}}\n"
    )


def main() -> None:
    shape = tiny_models.Shape("llama")
    tensors = tiny_models.weights(shape, np.random.default_rng(0))
    tiny_models.write_gguf(FOLDER / "tiny.gguf", shape.arch, tiny_models.metadata(shape), tensors)
    write("tiny", "tiny.gguf", tiny_models.tokens(400).tolist(), TOLERANCE, cases(4, 24))
    text = " ".join(story.text for story in STORIES).encode()
    with contextlib.closing(lminf_edge.Llama("nano", vocab_only=True, verbose=False)) as vocabulary:
        prose = vocabulary.tokenize(text)[:600]
    write("nano", "../../lminf_edge/models/nano.gguf", prose, TOLERANCE, cases(4, 60))


if __name__ == "__main__":
    main()
