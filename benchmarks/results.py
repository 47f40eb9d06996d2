"""Writes docs/results.md and its plots from the figures that benchmarks/evidence.py measured.

    make results, or: .venv/bin/python benchmarks/results.py [--figures DIR] [--page FILE]

Every number of the page comes from those files, or, for the paper's own, from benchmarks/published.json; only the words
around them are here. What a sentence claims is decided by the figures.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pages
from measured import (
    PAST,
    SMALL,
    Record,
    beside,
    blocks,
    cells_of,
    compare_buckets,
    constant_memory,
    curve,
    drift,
    drift_points,
    far_blocks,
    far_end,
    found_of,
    fresh_blocks,
    is_real,
    kind_of,
    loss_records,
    octaves,
    paired,
    reach,
    read_everywhere,
    readings_again,
    recall_blocks,
    recall_losses,
    recall_records,
    stream_records,
    tail_blocks,
    tail_octaves,
    tail_records,
    tails,
    texts_read,
    variant_of,
    window_size,
)
from report import pick, positions_section, results_of, table
from trend import Estimate, mean_difference, proportion

from lminf_edge.bench.alternate import Result, fastest, ratio
from lminf_edge.cli.common import human_bytes
from lminf_edge.config import LMInfConfig
from lminf_edge.evaluate import plots
from lminf_edge.evaluate.policies import WITHOUT_RECALL
from lminf_edge.models import embedded_models

# what is to be reached
NANO = "nano"
WITHIN = {True: 0.01, False: 0.03}  # of the loss of streams started fresh, of a real model and of a toy
FULL_WORSE = 1.0  # nats
KEYS = 0.95  # of the passkeys in reach
RECALLED = 0.85  # of the ceiling

HEAD = """# Results

Written by `benchmarks/results.py` from what `benchmarks/evidence.py` measured (`docs/results/*.json`): do not edit.
`make results-measure TEXT="book.txt ..."` measures again, `make results` rewrites this page.

Losses are in nats per token: -log of the probability that the model gives to the token that comes next. Every policy
runs through llama.cpp on the same tokens (see [design.md](design.md), "Measuring"). Intervals are 95 % confidence
intervals; two policies are a tie when that of their difference contains zero. Differences are taken block by block of
the same text, so its difficulty cancels. "Started fresh" is the same text read by streams that had just begun, each
token at a position where the window is full and which is inside the training length. Two small real models come first;
toys, which can be read by the million tokens, are in the [appendix](#appendix-toy-models).
"""


# --- words ------------------------------------------------------------------------------------------------------------


def nats(value: float) -> str:
    return f"{value:+.4f}" if abs(value) < 0.1 else f"{value:+.2f}"


def interval(estimate: Estimate, digits: int = 4) -> str:
    return f"{estimate.value:+.{digits}f} ({estimate.low:+.{digits}f} to {estimate.high:+.{digits}f})"


def verdict(estimate: Estimate) -> str:
    """With "a tie" where the interval contains zero."""
    margin = (estimate.high - estimate.low) / 2
    return (
        f"tie ({nats(estimate.value)} ± {margin:.4f})" if estimate.is_zero else f"{nats(estimate.value)} ± {margin:.4f}"
    )


def short(n: int) -> str:
    """131072 as 128k, 10000000 as 10M."""
    for unit, name in ((1 << 20, "M"), (1_000_000, "M"), (1 << 10, "k"), (1000, "k")):
        if n >= unit and n % unit == 0:
            return f"{n // unit}{name}"
    return f"{n:,}"


def names(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def window_of(record: Record) -> str:
    window = record["window"]
    return f"{window['n_global']} + {window['n_local']}"


# --- claims -----------------------------------------------------------------------------------------------------------

Claim = tuple[str, str, str, str]  # what, measured, target, reached


def claims(records: dict[str, Record]) -> list[Claim]:
    found: list[Claim] = []
    for record in loss_records(records, "f16"):
        found += loss_claims(record)
    for record in (*loss_records(records, "f16", "far"), *loss_records(records, "f16")):
        if record["fresh"].get("lminf"):
            found.append(fresh_claim(record))
    for record in stream_records(records):
        found += stream_claims(record)
    for name in ("kl-f32", "kl-f16"):
        if name in records:
            found.append(kl_claim(records[name]))
    for record in tail_records(records):
        found += tail_claims(record)
    if "passkey" in records:
        found += passkey_claims(records["passkey"])
    for record in recall_records(records):
        found += recall_claims(record)
    return found


def target(record: Record, words: str, met: bool) -> tuple[str, str]:
    """What is to be reached, and whether it is: of real models, and of the toy that was made to reach it."""
    is_asked = is_real(record) or record["model"]["name"] == NANO
    return (words, "reached" if met else "**not reached**") if is_asked else ("–", "–")


def subject(record: Record) -> str:
    return f"`{record['model']['name']}`, window {window_size(record):,}"


def loss_claims(record: Record) -> list[Claim]:
    rows: list[Claim] = []
    n_full = read_everywhere(record, "full") if "full" in record["policies"] else 0
    start = n_full // 2
    if start >= record["model"]["n_ctx_train"]:
        worse = mean_difference(*beside(record, "full", start, n_full))
        what = f"{subject(record)}: full attention minus Λ at {short(start)} – {short(n_full)}"
        met = worse.value >= FULL_WORSE
        rows.append((what, f"{interval(worse, 2)} nats", *target(record, f"{FULL_WORSE:.0f} nat at least", met)))
    words = []
    for other in constant_memory(record):
        end = min(far_end(record), read_everywhere(record, other))
        samples = beside(record, other, PAST, end)
        if len(samples[0]) >= 2:
            words.append(f"`{other}` {verdict(mean_difference(*samples))}")
    if words:
        what = f"{subject(record)}: others minus Λ at {short(PAST)} – {short(end)} (positive: Λ is better)"
        rows.append((what, ", ".join(words), "–", "–"))
    return rows


def fresh_claim(record: Record) -> Claim:
    start, end = record["settings"]["start"], far_end(record)
    far, near = (f.mean() for f in (blocks(record, "lminf", start, end), fresh_blocks(record, "lminf", end)))
    share, within = float(far / near) - 1, WITHIN[is_real(record)]
    full = (
        f" (full attention, fresh: {fresh_blocks(record, 'full', end).mean():.4f})" if "full" in record["fresh"] else ""
    )
    return (
        f"{subject(record)}: Λ at {short(start)} – {short(end)}, against the same tokens started fresh",
        f"{far:.4f} against {near:.4f}: {share:+.2%}{full}",
        *target(record, f"within {within:.0%}", abs(share) <= within),
    )


def stream_claims(record: Record) -> list[Claim]:
    estimate, name = drift(record), record["model"]["name"]
    assert estimate is not None
    found = [
        (
            f"`{name}`: drift over {reached(record)} tokens, past {short(record['settings']['start'])}, for ten times "
            "the position",
            f"{interval(estimate, 5)} nats",
            "zero within its interval",
            ("reached" if record["complete"] else "reached so far") if estimate.is_zero else "**not reached**",
        )
    ]
    again = readings_again(record)
    if len(again):
        largest = float(np.abs(again).max())
        found.append(
            (
                f"`{name}`: blocks of text in these {reached(record)} tokens that cost what they cost when they were "
                "read before",
                f"{int((again == 0).sum()):,} of {len(again):,}; largest difference {largest:.5f} nats",
                "–",
                "–",
            )
        )
    return found


def reached(record: Record) -> str:
    of = "" if record["complete"] else f" (of {record['settings']['tokens']:,}: stopped)"
    return f"{record['tokens']:,}{of}"


def kl_claim(record: Record) -> Claim:
    largest = max(policy["largest_before_full"] for policy in record["policies"].values())
    exact = record["settings"]["kv_type"] == "f32"
    what = "weights and cache in f32" if exact else f"{record['model']['weights']} weights, f16 cache"
    return (
        f"`{record['model']['name']}`, {what}: largest KL divergence from full attention before the window is full",
        f"{largest:.1e} nats",
        *(("zero, but for rounding", "reached" if largest < 1e-6 else "**not reached**") if exact else ("–", "–")),
    )


def tail_claims(record: Record) -> list[Claim]:
    """What the default of prefill "tail" costs."""
    way = f"{LMInfConfig.n_tail} windows"
    estimate = mean_difference(tail_blocks(record, way), tail_blocks(record, "everything"))
    what = f"`{record['model']['name']}`, window {window_of(record)}: sinks and the last {way} processed, minus all"
    met = "reached" if estimate.high <= SMALL else "**not reached**"
    return [(what, f"{interval(estimate)} nats", f"{SMALL} at most", met)]


def recall_claims(record: Record) -> list[Claim]:
    """All lengths together, beside the fact in the window; and lengths full attention was trained on, beside it."""
    cells = record["policies"].get("full", {"cells": []})["cells"]
    beside = [
        ("the fact in the window", found_of(record, "recall"), found_of(record, "ceiling")),
        *(
            (f"full attention at {length:,}", found_of(record, "recall", length), found_of(record, "full", length))
            for length in sorted({cell["length"] for cell in cells})
        ),
    ]
    claims = []
    for name, (right, asked), (best, tried) in beside:
        if asked and best:
            share, ceiling = right / asked, best / tried
            claims.append(
                (
                    f"{subject(record)}, {record['settings']['task']}: right answers with recall, against {name}",
                    f"{right} of {asked} against {best} of {tried}: {share / ceiling:.0%}",
                    *target(record, f"{RECALLED:.0%}", share >= RECALLED * ceiling),
                )
            )
    return claims


def passkey_claims(record: Record) -> list[Claim]:
    right, asked, right_out, out = reach(record, "lminf")
    name = record["model"]["name"]
    rows: list[Claim] = []
    if asked:
        met = right / asked >= KEYS
        what = f"`{name}`: passkeys in reach of Λ that it gives right"
        rows.append((what, f"{right} of {asked}: {right / asked:.0%}", *target(record, f"{KEYS:.0%}", met)))
    if out:
        what = f"`{name}`: passkeys that have left the reach of Λ, and are given right"
        rows.append((what, f"{right_out} of {out}: {right_out / out:.0%}", "–", "–"))
    return rows


# --- sections ---------------------------------------------------------------------------------------------------------


def summary(records: dict[str, Record]) -> str:
    if not records:
        return ""
    weights = sorted({f"`{r['model']['name']}` {r['model']['weights']}" for r in records.values()})
    facts = (
        f"f16 KV where nothing is said; weights: {', '.join(weights)}. Machines and dates are with each table below."
    )
    return f"## In short\n\n{facts}\n\n" + table(["", "measured", "target", ""], claims(records), 4)


def source(record: Record) -> str:
    """Where and when it was measured, and the file."""
    machine = record["machine"]
    name = record["experiment"]
    return f"{machine['cpu']}, {machine['date'][:10]}: [{name}](results/{name}.json)"


def described(record: Record) -> str:
    """Model, weights and cache."""
    model = record["model"]
    return (
        f"{model['n_params'] / 1e6:.{0 if is_real(record) else 2}f} M parameters ({model['architecture']}), "
        f"{model['weights']} weights, trained on {model['n_ctx_train']:,} tokens; window {window_of(record)}, "
        f"{record['settings']['kv_type']} KV"
    )


def loss_plot(record: Record) -> str:
    return str(record["experiment"]).removesuffix("-f16") + ".png"


def loss_section(records: dict[str, Record]) -> str:
    parts = []
    for record in loss_records(records, "f16"):
        name = record["model"]["name"]
        policies = [policy for policy in WITHOUT_RECALL if policy in record["policies"]]
        curves = {policy: octaves(curve(record, policy), window_size(record)) for policy in policies}
        by_start = {policy: {b.start: b.mean for b in found} for policy, found in curves.items()}
        rows = []
        for bucket in curves["lminf"]:
            values = [by_start[policy].get(bucket.start) for policy in policies]
            cells = [f"{value:.3f}" if value is not None else "–" for value in values]
            rows.append([f"{bucket.start:,} – {bucket.end:,}", *cells])
        texts = texts_read(record, *record["policies"])
        title = f"{name}, window {window_size(record):,}" if is_real(record) else name
        mean = f"mean over {len(texts)} texts, each" if len(texts) > 1 else "one text,"
        parts.append(
            f"### {title}\n\n![loss by position, {title}](results/{loss_plot(record)})\n\n"
            f"{described(record)}; {mean} read as one stream ({names(texts)}). {source(record)}.\n\n"
            + table(["positions", *policies], rows, 1)
            + full_sentence(record)
            + (against_others(record) if is_real(record) else in_buckets(record))
        )
    if not parts:
        return ""
    parts += [part for part in (far_table(records), kv_table(records)) if part]
    return "## Loss by position\n\n" + texts_sentence(records) + "\n".join(parts)


def texts_sentence(records: dict[str, Record]) -> str:
    """What the models may know of the texts."""
    found = loss_records(records, "f16")
    if not is_real(found[0]):
        return ""
    n_least = min(text["n_tokens"] for record in found for text in record["texts"].values())
    return (
        "The novels are old, and all over the web: pages of them may have been in the training data of either model, "
        "which we cannot look into. Neither can have seen one whole at a time: the shortest has "
        f"{n_least:,} tokens, several times what they were trained on. What a model knows by heart helps all policies "
        "alike, as they read the same tokens.\n\n"
    )


def full_sentence(record: Record) -> str:
    """Where full attention was stopped."""
    n, n_train = record["full_tokens"], record["model"]["n_ctx_train"]
    if "full" not in record["policies"] or n >= far_end(record):
        return ""
    where = f"{n / n_train:g} times the training length" if n > n_train else "inside the training length"
    return (
        f"\nFull attention, whose time grows with the square of the length, was stopped after {n:,} tokens, {where}.\n"
    )


def far_table(records: dict[str, Record]) -> str:
    """Λ alone, further than the others, beside streams that have just begun."""
    rows = []
    for record in loss_records(records, "f16", "far"):
        if not record["fresh"]["lminf"]:  # stopped before
            continue
        start, end = record["settings"]["start"], far_end(record)
        far, near = blocks(record, "lminf", start, end), fresh_blocks(record, "lminf", end)
        rows.append(
            [
                f"`{record['model']['name']}`, {window_of(record)}",
                f"{start:,} – {end:,}",
                names([*record["policies"]["lminf"]["texts"]]),
                f"{far.mean():.4f}",
                f"{near.mean():.4f}",
                f"{verdict(mean_difference(far, near))} ({far.mean() / near.mean() - 1:+.2%})",
                source(record),
            ]
        )
    if not rows:
        return ""
    header = ["", "positions", "text", "Λ", "started fresh", "difference", "measured"]
    return "### Λ far into a stream\n\n" + table(header, rows, 3) + "\n"


def against_others(record: Record) -> str:
    """Others minus Λ in every octave past PAST, and how often a finer bucket is a tie."""
    start, end = PAST, far_end(record)
    others = constant_memory(record)
    rows = []
    while start < end:
        stop = min(2 * start, end)
        cells = []
        for other in others:
            samples = beside(record, other, start, min(stop, read_everywhere(record, other)))
            cells.append(verdict(mean_difference(*samples)) if len(samples[0]) >= 2 else "–")
        rows.append([f"{start:,} – {stop:,}", *cells])
        start = stop
    if not rows:
        return ""
    columns = [f"{other}, {len(texts_read(record, other, 'lminf'))}" for other in others]
    return (
        f"\nOthers minus Λ past {short(PAST)}, nats per token (positive: Λ is better), and over how many texts:\n\n"
        + table(["positions", *columns], rows, 1)
        + in_buckets(record)
    )


def in_buckets(record: Record) -> str:
    """How often Λ is better, tied and worse."""
    sentences = []
    for other in constant_memory(record):
        found = [estimate for _, _, estimate in compare_buckets(record, other)]
        if found:
            better, worse = sum(e.low > 0 for e in found), sum(e.high < 0 for e in found)
            largest = max(found, key=lambda e: abs(e.value))
            sentences.append(
                f"`{other}`: Λ is better in {better}, tied in {len(found) - better - worse}, worse in {worse} of "
                f"{len(found)} buckets (at most {nats(largest.value)} nats)"
            )
    if not sentences:
        return ""
    return f"\nIn finer buckets past {short(PAST)}, four for each power of two: {'; '.join(sentences)}.\n"


TIES = """### What is different where losses tie

Beside StreamingLLM's rule (`sinks`) and context shift (`shift`) the losses above are ties, or differ by hundredths of
a nat: whoever asks for loss alone can take any of the three. What Λ has beside it:

- Positions are bounded: what enters the graph is small however long the stream is. A key is rotated when it is stored,
  and again only when all positions move back by a block (a rebase). StreamingLLM's code rotates all cached keys at each
  read.
- One token leaves when one comes. Context shift takes away half of the window at once, so what is in view varies
  between half a window and a whole one.
- Prompts of any length stream through: llama-server refuses those that are longer than the context, shift or not.
- The rule is exact: what a token may attend to, and at which distance, is a function of its position alone, tested per
  token against an independent implementation ([how we know](design.md#how-we-know)).
- A turn costs its own tokens: what was read stays valid while the window moves on. After a shift the cache holds no
  prefix of the conversation but its first tokens.
"""


def kv_table(records: dict[str, Record]) -> str:
    """q8_0 beside f16 KV."""
    rows = []
    for plain in loss_records(records, "f16"):
        quantized = records.get(plain["experiment"].removesuffix("f16") + "q8_0")
        if quantized is None:
            continue
        start, end = quantized["settings"]["start"], min(far_end(plain), far_end(quantized))
        cells = []
        for policy in WITHOUT_RECALL:
            if not all(policy in record["policies"] for record in (plain, quantized)):
                cells.append("–")
                continue
            stop = min(end, *(read_everywhere(record, policy) for record in (plain, quantized)))
            texts = [text for text in texts_read(quantized, policy) if text in texts_read(plain, policy)]
            samples = [blocks(record, policy, start, stop, texts) for record in (quantized, plain)]
            cells.append(verdict(mean_difference(*samples)) if len(samples[0]) >= 2 else "–")
        rows.append([f"`{plain['model']['name']}`, {window_of(plain)}, {short(start)} – {short(end)}", *cells])
    if not rows:
        return ""
    header = ["", *WITHOUT_RECALL]
    kept = [i for i in range(len(header)) if any(row[i] != "–" for row in rows)]
    found = [[row[i] for i in kept] for row in rows]
    title = "### q8_0 KV\n\nLoss with a q8_0 cache minus loss with an f16 cache:\n\n"
    return title + table([header[i] for i in kept], found, 1)


def stream_section(records: dict[str, Record], plot: str) -> str:
    found = stream_records(records)
    if not found:
        return ""
    rows = []
    for record in found:
        fitted, again = drift(record), drift(record, within=True)
        assert fitted is not None
        before, after = record["resident_bytes"]
        rows.append(
            [
                f"`{record['model']['name']}`",
                reached(record),
                f"{paired(record)[1].mean():+.5f}",
                interval(fitted, 5),
                interval(again, 6) if again else "–",
                f"{human_bytes(record['kv_bytes'])}; "
                + (f"{human_bytes(before)} → {human_bytes(after)}" if before else "–"),
                f"{record['rebases']:,}; {record['max_graph_position']:,}",
            ]
        )
    header = [
        "", "tokens", "loss minus that of a fresh start", "slope", "slope, the same block read again",
        "KV; resident memory", "rebases; largest position in the graph",
    ]  # fmt: skip
    words = [
        f"{record['text_tokens']:,} tokens in blocks of {record['block']:,} for `{record['model']['name']}`"
        for record in found
    ]
    return (
        f"## Without end\n\n![drift](results/{plot})\n\n"
        f"One Λ stream, window {window_of(found[0])}, f16 KV, over the texts and, when they end, over them again "
        f"({names(words)}). {'; '.join(map(source, found))}. Each block is paired with the same tokens "
        "started fresh. A straight line is fitted to the "
        "differences against log10 of the position, so slopes are nats for ten times the position. A block of text "
        "that comes round is not another independent sample: errors are clustered by block of text. The last slope "
        "takes no fresh start, only differences between the readings of the same block.\n\n"
        + table(header, rows, 7)
        + "\n"
        + " ".join(map(drift_sentence, found))
        + "\n"
    )


def drift_sentence(record: Record) -> str:
    estimate, name = drift(record), record["model"]["name"]
    assert estimate is not None
    position = paired(record)[0]
    decades = float(np.log10(position[-1] / position[0]))
    span = f"from position {position[0]:,.0f} to {position[-1]:,.0f}"
    if estimate.is_zero:
        bound = max(abs(estimate.low), abs(estimate.high)) * decades
        sentence = f"`{name}`: no drift; {span} the line rises or falls by {bound:.4f} nats at most (95 %)."
    else:
        sentence = f"`{name}`: {span} the line moves by {estimate.value * decades:+.4f} nats."
    again = readings_again(record)
    if len(again) == 0:
        return sentence
    n_same, most = int((again == 0).sum()), float(np.abs(again).max())
    sentence += (
        f" Of {len(again):,} blocks that had been read before, {n_same:,} have the same loss as then, to five digits "
        f"after the point; the largest difference is {most:.5f} nats."
    )
    if not estimate.is_zero and n_same == len(again):
        sentence += " So the line follows the texts, which come one after another, and not the position."
    return sentence


# --- settings ---------------------------------------------------------------------------------------------------------


def sweep_table(record: Record, reference: Record, extra: Sequence[tuple[str, Callable[[Record], str]]] = ()) -> str:
    rows = []
    for variant in record["variants"]:
        losses = far_blocks(variant)
        against = "–" if variant is reference else verdict(mean_difference(losses, far_blocks(reference)))
        rows.append(
            [
                variant["name"],
                f"{losses.mean():.4f}",
                against,
                human_bytes(variant["kv_bytes"]),
                *(show(variant) for _, show in extra),
            ]
        )
    return table(["", "loss", f"minus that of {reference['name']}", "KV", *(title for title, _ in extra)], rows, 1)


def sweep_sentence(record: Record, reference: Record) -> str:
    """Which of the others matter, by more than SMALL."""
    others = [variant for variant in record["variants"] if variant is not reference]
    differences = {v["name"]: mean_difference(far_blocks(v), far_blocks(reference)) for v in others}
    worse = [f"{name} ({nats(e.value)})" for name, e in differences.items() if e.low > SMALL]
    better = [f"{name} ({nats(e.value)})" for name, e in differences.items() if e.high < -SMALL]
    return (
        f"By more than {SMALL} nats worse than {reference['name']}: {names(worse) if worse else 'none'}; better: "
        f"{names(better) if better else 'none'}."
    )


def fresh_column(variant: Record) -> str:
    return f"{far_blocks(variant, 'fresh_nll').mean():.4f}"


FRESH = ("started fresh", fresh_column)
SWEEPS: dict[str, tuple[str, list[tuple[str, Callable[[Record], str]]]]] = {
    "sweep-global": ("G (`n_global`), the first tokens", []),
    "sweep-local": ("L (`n_local`), the window", []),
    "sweep-distance": ("D (`max_distance`), the distance of the first tokens", []),
    "sweep-kv": ("KV type", [FRESH]),
    "sweep-weights": ("Weights", [FRESH, ("file", lambda v: human_bytes(v["file_bytes"]))]),
}


def settings_section(records: dict[str, Record]) -> str:
    parts = []
    for kind, (title, extra) in SWEEPS.items():
        for record in (record for name, record in records.items() if name.startswith(kind)):
            default = record["settings"].get("window", record["model"]["n_ctx_train"] // 2) - LMInfConfig.n_global
            fields: dict[str, Any] = {
                "sweep-global": {"n_global": LMInfConfig.n_global},
                "sweep-local": {"n_local": default},
                "sweep-distance": {"n_local": default, "max_distance": default},
                "sweep-kv": {"kv_type": "f16"},
                "sweep-weights": {"weights": "F16"},
            }[kind]
            reference, texts = variant_of(record, **fields), record["variants"][0]["texts"]
            text = next(iter(texts.values()))
            parts.append(
                f"### {title}\n\n`{record['model']['name']}`, tokens {text['start']:,} – {text['edges'][-1]:,} of "
                f"{len(texts)} text{'s' * (len(texts) > 1)}; G = {LMInfConfig.n_global}, L = {default}, f16 KV if not "
                f"said otherwise. {sweep_sentence(record, reference)} {source(record)}.\n\n"
                + sweep_table(record, reference, extra)
            )
    return "## Which settings\n\n" + "\n".join(parts) if parts else ""


# --- the tail ---------------------------------------------------------------------------------------------------------


def tail_section(records: dict[str, Record]) -> str:
    found = tail_records(records)
    if not found:
        return ""
    block = found[0]["settings"]["block"]
    columns = tails(found[0])
    rows = []
    for record in found:
        octaves_ = tail_octaves(record)
        spans = [(octaves_[0][0], octaves_[-1][1]), *(octaves_ if len(octaves_) > 1 else ())]
        for i, (start, end) in enumerate(spans):
            everything = tail_blocks(record, "everything", start, end)
            if len(everything) < 2:
                continue
            differences = [mean_difference(tail_blocks(record, way, start, end), everything) for way in columns]
            rows.append(
                [
                    "" if i else f"`{record['model']['name']}`, {window_of(record)}",
                    f"{start:,} – {end:,}",
                    str(len(everything)),
                    f"{everything.mean():.3f}",
                    *map(verdict, differences),
                ]
            )
    return (
        '## What prefill "tail" costs\n\n'
        f"Mean loss of {block} tokens of a text after only the sinks and the last tokens before them were processed, "
        "minus their loss after everything before them was, in nats per token. A window is L tokens; the first line of "
        "a model is all depths together, the others are octaves of depth. Each place is a sample. "
        + "; ".join(map(source, found))
        + ".\n\n"
        + table(["", "depth", "places", "loss, everything", *columns], rows, 2)
        + "\nModels with recurrent layers run, but are not here: not measured.\n"
    )


# --- recall -----------------------------------------------------------------------------------------------------------


def answers(record: Record, policy: str, length: int | None = None) -> str:
    right, asked = found_of(record, policy, length)
    if not asked:
        return "–"
    low, high = proportion(right, asked)
    return f"{right} of {asked} ({low:.0%} to {high:.0%})"


def recall_section(records: dict[str, Record], plot: str) -> str:
    found, losses = recall_records(records), recall_losses(records)
    parts = []
    if found:
        rows = []
        for record in found:
            settings = record["settings"]
            cells = [cell for name, p in record["policies"].items() if name != "ceiling" for cell in p["cells"]]
            for i, length in enumerate(sorted({cell["length"] for cell in cells})):
                what = [
                    f"`{record['model']['name']}`, {settings['task']}",
                    f"{window_of(record)}; {settings['n_recall']} at {record['window']['recall_distance']}",
                ]
                shares = [answers(record, policy, length) for policy in ("lminf", "recall", "full")]
                rows.append(
                    [*(("", "") if i else what), f"{length:,}", *shares, "" if i else answers(record, "ceiling")]
                )
        header = ["", "window; recalled at distance", "tokens", "Λ", "Λ with recall", "full attention", "ceiling"]
        measured_by = "; ".join(map(source, found))
        parts.append(
            (f"![right answers by length and place](results/{plot})\n\n" if recall_picture(records) else "")
            + f"Right answers about a fact told once, at {len(found[0]['settings']['depths'])} places of the text; "
            "f16 KV, archives in q8_0. In brackets 95 % intervals. The ceiling is Λ with the fact in its window. "
            f"{measured_by}.\n\n" + table(header, rows, 3)
        )
    if losses:
        columns = list(losses[0]["ways"])
        rows = [
            [
                f"`{record['model']['name']}`, {window_of(record)}",
                str(len(recall_blocks(record, "0"))),
                f"{recall_blocks(record, '0').mean():.4f}",
                *(
                    verdict(mean_difference(recall_blocks(record, way), recall_blocks(record, "0")))
                    for way in columns[1:]
                ),
            ]
            for record in losses
        ]
        settings = losses[0]["settings"]
        parts.append(
            f"Loss on novels from token {settings['start']:,} on, with recall minus without, in blocks of "
            f"{settings['block']} tokens ({'; '.join(map(source, losses))}):\n\n"
            + table(["", "blocks", "Λ", *(f"R = {way}" for way in columns[1:])], rows, 1)
        )
    return "## What recall finds\n\n" + "\n".join(parts) if parts else ""


def recall_picture(records: dict[str, Record]) -> Record | None:
    """The one that is drawn: that with most lengths, if it has several."""
    found = {
        len({cell["length"] for cell in record["policies"]["recall"]["cells"]}): record
        for record in recall_records(records)
        if "recall" in record["policies"]
    }
    return found[max(found)] if max(found, default=0) > 1 else None


# --- long texts -------------------------------------------------------------------------------------------------------


def generation_section(records: dict[str, Record]) -> str:
    found = [record for name, record in records.items() if name.startswith("generation-")]
    parts = []
    for record in found:
        settings, policies = record["settings"], record["policies"]
        rows = []
        for name, figures in policies.items():
            losses, new = np.array(figures["nll"]), np.array(figures["distinct"])
            per_seed = losses.mean(axis=1), np.array(figures["distinct_all"])
            spread = [mean_difference(values, np.zeros(len(values))) for values in per_seed]
            rows.append(
                [
                    plots.NAMES.get(name, "the novels themselves"),
                    *(f"{e.value:.3f} ± {(e.high - e.low) / 2:.3f}" for e in (spread[1], spread[0])),
                    f"{new[:, 0].mean():.3f} → {new[:, -1].mean():.3f}",
                    f"{losses[:, 0].mean():.3f} → {losses[:, -1].mean():.3f}",
                ]
            )
        ours, other = (np.array(policies[name]["distinct_all"]) for name in ("lminf", "shift"))
        loss = mean_difference(*(np.array(policies[name]["nll"]).mean(axis=1) for name in ("lminf", "shift")))
        sampling = ", ".join(f"{name} {value:g}" for name, value in settings["sampling"].items())
        n_far = len(policies["lminf"]["nll"][0]) * settings["block"]
        parts.append(
            f"{described(record)}, {settings['seeds']} seeds: each goes on from another place of a novel "
            f"({settings['prompt']} tokens of prompt), {sampling}, no end of text. Counted are the {n_far:,} tokens "
            "past the window. The judge of the loss is the model itself, with full attention over all of it. Λ minus "
            f"context shift: distinct 4-grams {verdict(mean_difference(ours, other))}, loss {verdict(loss)} nats. "
            f"{source(record)}.\n\n"
            + table(["written by", "distinct 4-grams", "loss", f"distinct, first → last {settings['block']} tokens",
                     f"loss, first → last {settings['block']}"], rows, 1)
        )  # fmt: skip
    return "## Long texts\n\n" + "\n".join(parts) if parts else ""


# --- the rest ---------------------------------------------------------------------------------------------------------


def kl_section(records: dict[str, Record]) -> str:
    rows = []
    for name in ("kl-f32", "kl-f16"):
        if name in records:
            record = records[name]
            size = window_size(record)
            for policy, figures in record["policies"].items():
                after = [
                    (end - start, mean)
                    for (start, end), mean in zip(pairwise(figures["edges"]), figures["bucket_kl"], strict=True)
                    if start >= size
                ]
                mean_after = sum(n * mean for n, mean in after) / sum(n for n, _ in after)
                weights = "F32" if name == "kl-f32" else record["model"]["weights"]
                rows.append([f"{weights} weights, {record['settings']['kv_type']} KV", policy,
                             f"{figures['largest_before_full']:.1e}", f"{mean_after:.5f}"])  # fmt: skip
    if not rows:
        return ""
    record = records.get("kl-f32") or records["kl-f16"]
    return (
        "## Divergence from full attention\n\n![KL divergence](results/divergence.png)\n\n"
        f"`{record['model']['name']}`, window {window_of(record)}, {record['stretches']} stretches of "
        f"{record['length']} tokens, the training length. KL(full attention ‖ policy) of the predictions, in nats: "
        "the largest of any token before position L, and the mean after the window is full. The Λ rule caps the first "
        "distances at position L + 1; the others begin to differ "
        "when the window is full, context shift one token earlier. "
        "(With quantized weights llama.cpp rounds activations to 8 bits: another order of additions shows.)\n\n"
        + table(["", "policy", "largest before", "mean after"], rows, 2)
    )


def passkey_section(records: dict[str, Record]) -> str:
    if "passkey" not in records:
        return ""
    record = records["passkey"]
    rows = []
    for name, title in (("passkey", ""), ("passkey-sinks", ", key among the first tokens")):
        if name not in records:
            continue
        for policy in records[name]["policies"]:
            right, asked, right_out, out = reach(records[name], policy)
            rows.append(
                [
                    policy + title,
                    window_of(records[name]),
                    f"{right} of {asked}" if asked else "–",
                    f"{right_out} of {out}" if out else "–",
                ]
            )
    right, asked, right_out, out = reach(record, "lminf")
    kept = ""
    if "passkey-sinks" in records:
        sinks = records["passkey-sinks"]
        size = window_size(sinks)
        cells = [c for c in sinks["policies"]["lminf"]["cells"] if c["depth"] == 0 and c["length"] > size]
        if cells:
            n, correct = sum(c["trials"] for c in cells), sum(c["correct"] for c in cells)
            kept = (
                f" With {sinks['window']['n_global']} first tokens kept, a key told at once is among them: "
                f"{correct} of {n} right in prompts longer than the window."
            )
    return (
        "## What is remembered\n\n![passkey retrieval](results/passkey.png)\n\n"
        f"`{record['model']['name']}`, a five-digit key told once in prose and asked for at the end, "
        f"{record['settings']['trials']} prompts for each length and depth, greedy, exact match. What has left the "
        f"window cannot be attended to: Λ gives {right} of {asked} keys right that are within reach"
        + (f" and {right_out} of {out} that are not." if out else ".")
        + kept
        + "\n\n"
        + table(["", "window", "right, in reach", "right, out of reach"], rows, 1)
    )


def performance_section(performance: dict[str, Record]) -> str:
    if "positions" not in performance:
        return "## Speed and memory by stream position\n\nNot measured: `make bench` writes `docs/performance/`.\n"
    return positions_section(performance) + "\nFrom [performance.md](performance.md), which has more.\n"


def bench_machine(performance: dict[str, Record]) -> str:
    record = performance["positions"]
    return f"{record['model']['shape']} shape, {record['model']['weights']}, {record['n_threads']} CPU threads"


def ours_decoding(records: dict[str, Record], performance: dict[str, Record]) -> str:
    if "positions" not in performance:
        return "–"
    depth, ours, full = at_deepest(performance)
    return f"{ratio(ours, full).median:.2f} × as fast at position {depth:,}: {bench_machine(performance)}"


def ours_memory(records: dict[str, Record], performance: dict[str, Record]) -> str:
    if "positions" not in performance:
        return "–"
    depth, ours, full = at_deepest(performance)
    less = f"{full.kv_bytes / ours.kv_bytes:.2f} × less KV memory"
    return f"{less} at position {depth:,}, window {ours.contender.window}: {bench_machine(performance)}"


def at_deepest(performance: dict[str, Record]) -> tuple[int, Result, Result]:
    """The deepest position that both were measured at, ours there, and full attention."""
    results = results_of(performance["positions"])
    ours, full = (pick(results, cache=cache) for cache in ("lambda", "full"))
    depth = max({r.contender.depth for r in ours} & {r.contender.depth for r in full})
    return depth, fastest(pick(ours, depth=depth)), fastest(pick(full, depth=depth))


def ours_longest(records: dict[str, Record], performance: dict[str, Record]) -> str:
    lines = []
    for record in stream_records(records):
        estimate = drift(record)
        assert estimate is not None
        lines.append(f"`{record['model']['name']}`, {reached(record)} tokens: slope {interval(estimate, 5)} nats")
    return "; ".join(lines) or "–"


def ours_global(records: dict[str, Record], performance: dict[str, Record]) -> str:
    words = []
    for name, record in records.items():
        if name.startswith("sweep-global"):
            most = max(variant["n_global"] for variant in record["variants"])
            ten, many = (far_blocks(variant_of(record, n_global=n)) for n in (10, most))
            difference = verdict(mean_difference(many, ten))
            words.append(f"loss with {most} minus that with 10, `{record['model']['name']}`: {difference} nats")
    return "; ".join(words) or "–"


def ours_local(records: dict[str, Record], performance: dict[str, Record]) -> str:
    found = loss_records(records, "f16")
    return f"{window_of(found[0])} of {found[0]['model']['n_ctx_train']}" if found else "–"


OURS: dict[str, Callable[[dict[str, Record], dict[str, Record]], str]] = {
    "longest": ours_longest,
    "decoding": ours_decoding,
    "memory": ours_memory,
    "n_global": ours_global,
    "n_local": ours_local,
}


def paper_section(records: dict[str, Record], performance: dict[str, Record], published: Record) -> str:
    rows = [
        [f["what"], f["value"], OURS[f["ours"]](records, performance), f["differs"], f["source"]]
        for f in published["figures"]
    ]
    return f"## Beside the paper\n\n{published['paper']}. {published['left_out']}\n\n" + table(
        ["", "the paper", "ours", "what differs", "source of the paper's figure"], rows, 5
    )


def own_model_section(performance: dict[str, Record]) -> str:
    n_tokens, takes = 1 << 17, ""
    if "prefill" in performance:
        ours = pick(results_of(performance["prefill"]), cache="lambda")
        speed = fastest(pick(ours, depth=max(r.contender.depth for r in ours))).median
        takes = (
            f"Llama-3.2-1B's shape with Q4_0 weights and a window of 4096 reads {speed:,.0f} tokens/s on the machine "
            f"of [performance.md](performance.md): {duration(n_tokens / speed)} for {n_tokens:,} tokens and a policy. "
        )
    return (
        "## Your own model\n\n```sh\n"
        "lminf-edge info -m model.gguf                                        # supported? training length?\n"
        "lminf-edge ppl -m model.gguf -f book.txt --policies all --tokens 32768 --full-tokens 16384 --plot loss.png\n"
        "lminf-edge ppl -m model.gguf -f book.txt --tokens 10000000 --repeat  # Λ alone, as long as you like\n"
        "lminf-edge passkey -m model.gguf --policies all --plot keys.png\n"
        ".venv/bin/python benchmarks/evidence.py --text book.txt --model model.gguf --only loss --out my-results\n"
        "```\n\n"
        "What to expect: up to the window all policies are the same. Past the training length full attention gets "
        "worse; a text that is shorter than that shows nothing, so a model trained on 128k tokens needs a longer one. "
        "Λ stays at the loss of its window: with a window of 4096, a model that makes use of 100k tokens loses what "
        "they gave it. Whether first tokens matter depends on the model: one that leans on its first token, as SmolLM2 "
        "and Gemma 3 do, loses with `window`, and not with `sinks` and `lminf`. `--n-local` makes the window smaller "
        "than the default, min(4096, training length).\n\n"
        f"{takes}Full attention takes four times as long for twice the tokens: `--full-tokens` ends it. Ctrl-C prints "
        "what was measured so far.\n"
    )


def duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} minutes"
        if seconds < 7200
        else f"{seconds / 3600:.1f} hours"
    )


def experiments_section(records: dict[str, Record], refused: dict[str, Record]) -> str:
    rows = []
    for name, record in records.items():
        machine = record["machine"]
        done = "" if record["complete"] else f" (stopped at {record['tokens']:,} tokens)"
        rows.append(
            [
                f"[{name}](results/{name}.json){done}",
                f"`{record['model']['name']}`, {record['model']['weights']}",
                f"`{record['command']}`",
                duration(record["seconds"]),
                f"{machine['date']}, {machine['commit'] or 'not known'}",
            ]
        )
    machines: dict[str, None] = {}
    for record in records.values():
        m = record["machine"]
        memory = human_bytes(m["memory_bytes"] or 0)
        machines[f"{m['cpu']}, {m['n_cores']} cores, {memory} of memory, {m['system']}; {record['n_threads']} threads; "
                 f"{m['upstream']}; {m['compiler']['ours'] or 'compiler not known'}"] = None  # fmt: skip
    texts = {}
    for record in records.values():
        for name, text in record["texts"].items():
            texts[name] = f"{name} ({text['n_bytes']:,} bytes, sha256 {text['sha256'][:12]}…)"
    impossible = "".join(f"- {name} could not be measured: {record['refused']}\n" for name, record in refused.items())
    total = sum(record["seconds"] for record in records.values())
    return (
        "## How it was measured\n\n"
        f"{duration(total)} in all. "
        "Texts: "
        + "; ".join(texts.values())
        + ". Each command does one of them from a shell, with `text.txt` for one text "
        "and `texts.txt` for all of them; `benchmarks/evidence.py` runs the same code on all.\n\n"
        + "".join(f"- {machine}\n" for machine in machines)
        + f"{impossible}\n"
        + table(["experiment", "model", "command", "time", "date, commit"], rows, 5)
    )


def stale_note(records: dict[str, Record]) -> str:
    """A warning if an embedded model is no longer the one that was measured."""
    embedded = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in embedded_models().items()}
    stale = sorted(
        name
        for name, record in records.items()
        if record["model"]["name"] in embedded and record["model"]["sha256"] != embedded[record["model"]["name"]]
    )
    if not stale:
        return ""
    return f"**Not up to date**: {names(stale)} measured another version of an embedded model than this one's.\n"


SUFFIX = {True: "", False: "-toys"}  # of the names of plots


def draw(records: dict[str, Record], folder: Path) -> None:
    for record in loss_records(records, "f16"):
        curves = {policy: curve(record, policy) for policy in WITHOUT_RECALL if policy in record["policies"]}
        title = f"{record['model']['name']}, window {window_of(record)}, f16 KV"
        plots.plot_losses(
            folder / loss_plot(record), curves, record["model"]["n_ctx_train"], window_size(record), title
        )
    for real in (True, False):
        chosen = kind_of(records, real)
        streams = {
            f"{record['model']['name']}, {record['tokens']:,} tokens": drift_points(record)
            for record in stream_records(chosen)
        }
        if streams:
            title = "Λ stream: the same text, far on and started fresh"
            plots.plot_drift(folder / f"drift{SUFFIX[real]}.png", streams, title)
        if (drawn := recall_picture(chosen)) is not None:
            cells = {name: cells_of(policy) for name, policy in drawn["policies"].items() if name != "ceiling"}
            what = f"{drawn['settings']['task']}, window {window_of(drawn)}, {drawn['settings']['n_recall']} recalled"
            plots.plot_passkey(folder / f"recall{SUFFIX[real]}.png", cells, f"{drawn['model']['name']}, {what}")
    found = records.get("kl-f32") or records.get("kl-f16")
    if found:
        policies = {name: (p["edges"], p["bucket_kl"]) for name, p in found["policies"].items()}
        title = f"Divergence from full attention, {found['model']['name']}, window {window_of(found)}"
        plots.plot_divergence(folder / "divergence.png", policies, window_size(found), title)
    if "passkey" in records:
        record = records["passkey"]
        cells = {name: cells_of(policy) for name, policy in record["policies"].items()}
        title = f"Passkey retrieval, {record['model']['name']}, window {window_of(record)}"
        plots.plot_passkey(folder / "passkey.png", cells, title)


def page(everything: dict[str, Record], figures: Path) -> str:
    """Draws the plots as well, beside the figures."""
    refused = {name: record for name, record in everything.items() if "refused" in record}
    records = {name: record for name, record in everything.items() if name not in refused}
    draw(records, figures)
    published = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
    performance = pages.load_records(figures.parent / "performance")
    real, toys = kind_of(records, True), kind_of(records, False)
    losses = loss_section(real)
    sections: Iterable[str] = [
        HEAD,
        stale_note(records),
        summary(real),
        losses,
        TIES if losses else "",
        stream_section(real, f"drift{SUFFIX[True]}.png"),
        settings_section(real),
        tail_section(real),
        recall_section(real, f"recall{SUFFIX[True]}.png"),
        generation_section(real),
        performance_section(performance),
        paper_section(records, performance, published),
        own_model_section(performance),
        appendix(toys),
        experiments_section(records, refused),
    ]
    return "\n".join(section for section in sections if section)


def appendix(toys: dict[str, Record]) -> str:
    """What was measured on models that were made to be small, a heading deeper."""
    sections = [
        summary(toys),
        loss_section(toys),
        stream_section(toys, f"drift{SUFFIX[False]}.png"),
        settings_section(toys),
        tail_section(toys),
        kl_section(toys),
        passkey_section(toys),
        recall_section(toys, f"recall{SUFFIX[False]}.png"),
    ]
    text = "\n".join(section for section in sections if section)
    intro = (
        "Models of less than ten million parameters, on which much can be measured. What they say of first tokens does "
        "not hold for real ones: `nano` and `nano-alibi` do not lean on them.\n"
    )
    return f"## Appendix: toy models\n\n{intro}\n" + re.sub(r"^(?=##)", "#", text, flags=re.MULTILINE) if text else ""


if __name__ == "__main__":
    sys.exit(pages.main("results", page, "make results-measure"))
