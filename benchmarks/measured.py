"""What the files of benchmarks/evidence.py say: curves, differences of the same blocks of text, slopes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from pages import Record as Record
from pages import load_records as load_records
from trend import Array, Estimate, mean_difference, slope

from lminf_edge.evaluate.buckets import Bucket, log_edges
from lminf_edge.evaluate.passkey import Cell
from lminf_edge.evaluate.policies import WITHOUT_RECALL

PAST = 4096  # from there on, Λ is compared with the others in every bucket
REAL = 50_000_000  # parameters: fewer are a toy's
SMALL = 0.01  # nats per token, 1 % of perplexity: up to there a difference does not matter to users


def not_refused(records: dict[str, Record]) -> dict[str, Record]:
    """Without what a model could not do."""
    return {name: record for name, record in records.items() if "refused" not in record}


def is_real(record: Record) -> bool:
    """Whether its model is one that people use."""
    return bool(record["model"]["n_params"] >= REAL)


def kind_of(records: dict[str, Record], real: bool) -> dict[str, Record]:
    """Those of real models, or of toys."""
    return {name: record for name, record in records.items() if is_real(record) == real}


def window_size(record: Record) -> int:
    return int(record["window"]["n_global"] + record["window"]["n_local"])


def window_of(record: Record) -> str:
    return f"{record['window']['n_global']} + {record['window']['n_local']}"


def loss_records(records: dict[str, Record], kv_type: str | None = None, kind: str = "loss") -> list[Record]:
    """Those of loss by position: real models first, and of toys the model of the other experiments."""
    found = [
        record
        for name, record in records.items()
        if name.startswith(f"{kind}-") and kv_type in (None, record["settings"]["kv_type"])
    ]
    return sorted(
        found,
        key=lambda record: (
            not is_real(record),
            record["model"]["name"] != "nano",
            record["model"]["n_params"] if is_real(record) else record["model"]["name"],
            window_size(record),
        ),
    )


# --- loss by position -------------------------------------------------------------------------------------------------


def texts_read(record: Record, *policies: str) -> list[str]:
    """Texts that all these policies have read."""
    read = [record["policies"][policy]["texts"] for policy in policies]
    return [text for text in read[0] if all(text in texts for texts in read)]


def blocks(record: Record, policy: str, start: int, end: int, texts: Sequence[str] | None = None) -> Array:
    """Mean losses of the whole blocks of tokens in [start, end), text after text."""
    block, read = record["settings"]["block"], record["policies"][policy]["texts"]
    first, last = -(-start // block), end // block
    return np.concatenate([np.array(read[text]["block_nll"][first:last]) for text in texts or read])


def beside(record: Record, other: str, start: int, end: int) -> tuple[Array, Array]:
    """The same of another policy and of Λ, of the texts that both have read, as far as both have."""
    texts = texts_read(record, other, "lminf")
    end = min(end, read_everywhere(record, other), read_everywhere(record, "lminf"))
    return blocks(record, other, start, end, texts), blocks(record, "lminf", start, end, texts)


def fresh_blocks(record: Record, policy: str, end: int) -> Array:
    """The same of the tokens in [settings["start"], end), read by streams that had just begun."""
    block = record["settings"]["block"]
    return np.concatenate(
        [np.array(text["block_nll"][: (end - text["start"]) // block]) for text in record["fresh"][policy].values()]
    )


def read_everywhere(record: Record, policy: str) -> int:
    """Tokens that a policy has read of every text."""
    return min(int(text["tokens"]) for text in record["policies"][policy]["texts"].values())


def far_end(record: Record) -> int:
    """Where the last whole block ends that was read of every text."""
    block = int(record["settings"]["block"])
    return read_everywhere(record, "lminf") // block * block


def curve(record: Record, policy: str) -> list[Bucket]:
    """Mean over the texts that all policies have read, in buckets of a logarithmic axis."""
    sums: dict[tuple[int, int], list[float]] = {}
    for name in texts_read(record, *record["policies"]):
        text = record["policies"][policy]["texts"][name]
        for edges, mean in zip(pairwise(text["edges"]), text["bucket_nll"], strict=True):
            sums.setdefault(edges, []).append(mean)
    n_texts = max(map(len, sums.values()))
    return [Bucket(*edges, statistics.mean(means)) for edges, means in sorted(sums.items()) if len(means) == n_texts]


def octaves(buckets: Sequence[Bucket], first: int) -> list[Bucket]:
    """0 .. first, then twice as many each time: means weighted with the number of tokens."""
    result, start, end = [], 0, first
    while start < buckets[-1].end:
        inside = [b for b in buckets if start <= b.start and b.end <= end]
        if inside:
            n = sum(b.end - b.start for b in inside)
            result.append(Bucket(start, inside[-1].end, sum(b.mean * (b.end - b.start) for b in inside) / n))
        start, end = end, 2 * end
    return result


def constant_memory(record: Record) -> list[str]:
    """Policies of constant memory that were measured beside Λ."""
    return [name for name in WITHOUT_RECALL if name in record["policies"] and name not in ("full", "lminf")]


def compare_buckets(record: Record, other: str) -> list[Estimate]:
    """other - lminf in each bucket past PAST that has two blocks at least, from all texts."""
    n = min(read_everywhere(record, name) for name in ("lminf", other))
    edges = [edge for edge in log_edges(n) if edge >= PAST]
    samples = [beside(record, other, start, end) for start, end in pairwise(edges)]
    return [mean_difference(*pair) for pair in samples if len(pair[0]) >= 2]


# --- recall -----------------------------------------------------------------------------------------------------------


def recall_records(records: dict[str, Record]) -> list[Record]:
    """Those of what recall finds, the smallest model first."""
    found = [record for name, record in records.items() if name.startswith("recall-") and "policies" in record]
    return sorted(found, key=lambda record: (record["model"]["n_params"], record["experiment"]))


def recall_losses(records: dict[str, Record]) -> list[Record]:
    """Those of what it does to the loss."""
    found = [record for name, record in records.items() if name.startswith("recall-loss-")]
    return sorted(found, key=lambda record: (record["model"]["n_params"], record["experiment"]))


def found_of(record: Record, policy: str, length: int | None = None) -> tuple[int, int]:
    """Right answers and what was asked for, of prompts of this length, whatever the place of the fact."""
    cells = record["policies"].get(policy, {"cells": []})["cells"]
    asked = [cell for cell in cells if length in (None, cell["length"])]
    return sum(cell["correct"] for cell in asked), sum(cell["trials"] for cell in asked)


def recall_blocks(record: Record, way: str) -> Array:
    """Mean losses of the blocks from settings["start"] on, text after text."""
    skipped = record["settings"]["start"] // record["settings"]["block"]
    return np.concatenate([np.array(losses[skipped:]) for losses in record["ways"][way]["texts"].values()])


# --- the tail ---------------------------------------------------------------------------------------------------------


def tail_records(records: dict[str, Record]) -> list[Record]:
    """Those of a tail against everything that have enough for an interval, the largest model first."""
    found = [
        record
        for name, record in records.items()
        if name.startswith("tail-") and len(tail_blocks(record, "everything")) >= 2
    ]
    return sorted(found, key=lambda record: (-record["model"]["n_params"], record["settings"]["window"]))


def tail_blocks(record: Record, way: str, start: int = 0, end: int | None = None) -> Array:
    """Mean losses of the blocks whose place is in [start, end), text after text."""
    texts = record["ways"][way]["texts"].values()
    return np.array(
        [
            loss
            for losses in texts
            for place, loss in zip(record["settings"]["places"], losses, strict=False)  # a text may end before
            if start <= place and (end is None or place < end)
        ]
    )


def tail_octaves(record: Record) -> list[tuple[int, int]]:
    """From the first place to the last, twice as deep each time."""
    start, last = record["settings"]["places"][0], record["settings"]["places"][-1]
    return [(start << i, start << i + 1) for i in range((last // start).bit_length())]


def tails(record: Record) -> list[str]:
    """What was measured beside everything."""
    return [name for name in record["ways"] if name != "everything"]


# --- long streams -----------------------------------------------------------------------------------------------------


def paired(record: Record) -> tuple[Array, Array, Array]:
    """Of every whole block past settings["start"]: position of its middle, loss minus fresh loss, place in the text."""
    block, fresh = record["block"], np.array(record["fresh_nll"])
    losses = np.array(record["block_nll"])
    index = np.arange(len(losses))
    place = index % len(fresh)
    chosen = index * block >= record["settings"]["start"]
    return ((index + 0.5) * block)[chosen], (losses - fresh[place])[chosen], place[chosen]


def stream_records(records: dict[str, Record]) -> list[Record]:
    """Those of long streams that a line can be fitted to."""
    found = [record for name, record in records.items() if name.startswith(("stream", "longest-"))]
    return sorted((r for r in found if drift(r)), key=lambda r: (r["experiment"] != "stream", r["tokens"]))


def drift(record: Record, within: bool = False) -> Estimate | None:
    """Slope for ten times the position; None where there is too little to fit."""
    position, difference, place = paired(record)
    try:
        return slope(np.log10(position), difference, place, within)
    except ValueError:
        return None


def readings_again(record: Record) -> Array:
    """Of every block past settings["start"] that had been read before: its loss minus that of its first reading."""
    _, difference, place = paired(record)
    _, first, block = np.unique(place, return_index=True, return_inverse=True)
    return np.delete(difference - difference[first][block], first)


def drift_points(record: Record) -> list[tuple[float, float, float]]:
    """(position, mean, margin) in four bins for each power of ten."""
    position, difference, place = paired(record)
    bins = np.floor(4 * np.log10(position)).astype(int)
    points = []
    for number in np.unique(bins):
        # blocks of the same text are one sample, however often it came round
        here, places = difference[bins == number], place[bins == number]
        inside = np.array([here[places == one].mean() for one in np.unique(places)])
        if len(inside) >= 2:
            estimate = mean_difference(inside)
            middle = float(10 ** np.log10(position[bins == number]).mean())
            points.append((middle, estimate.value, estimate.margin))
    return points


# --- sweeps -----------------------------------------------------------------------------------------------------------


def far_blocks(variant: Record, key: str = "block_nll") -> Array:
    """Losses of the blocks far into the texts of one variant of a sweep; "fresh_nll": when streams have just begun."""
    texts = variant["texts"].values()
    return np.concatenate([np.array(text[key][text["first_block"] if key == "block_nll" else 0 :]) for text in texts])


def variant_of(record: Record, **fields: Any) -> Record:
    """The one with these settings."""
    found: list[Record] = [v for v in record["variants"] if all(v[name] == value for name, value in fields.items())]
    (variant,) = found
    return variant


# --- passkeys ---------------------------------------------------------------------------------------------------------


def reach(record: Record, policy: str) -> tuple[int, int, int, int]:
    """Right answers and keys, within reach and out of it."""
    right = asked = right_out = out = 0
    for cell in record["policies"][policy]["cells"]:
        n_in = round(cell["in_reach"] * cell["trials"])
        right, asked = right + cell["correct_in_reach"], asked + n_in
        right_out, out = right_out + cell["correct"] - cell["correct_in_reach"], out + cell["trials"] - n_in
    return right, asked, right_out, out


def cells_of(policy: Record) -> list[Cell]:
    return [
        Cell(c["length"], c["depth"], n := c["trials"], c["correct"], round(c["in_reach"] * n), c["correct_in_reach"])
        for c in policy["cells"]
    ]
