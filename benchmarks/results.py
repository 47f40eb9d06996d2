"""Fills docs/results.md, and draws its plots, with the figures of benchmarks/evidence.py.

make results, or: .venv/bin/python benchmarks/results.py [--figures DIR] [--page FILE]

The paper's own figures, in benchmarks/published.json, and those of speed, in docs/performance, stand beside them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pages
from machine import ROOT
from measured import (
    PAST,
    SMALL,
    beside,
    blocks,
    compare_buckets,
    constant_memory,
    curve,
    drift,
    far_blocks,
    far_end,
    found_of,
    fresh_blocks,
    is_real,
    kind_of,
    loss_records,
    not_refused,
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
    window_of,
    window_size,
)
from pages import Record, block, table
from pictures import DIVERGENCE, PASSKEY, draw, loss_plot, of_kind, recall_picture
from report import DEEP, pick, positions, results_of
from trend import Array, Estimate, mean_difference, proportion

from lminf_edge.bench.alternate import fastest, ratio
from lminf_edge.cli.common import human_bytes
from lminf_edge.config import LMInfConfig
from lminf_edge.evaluate import plots
from lminf_edge.evaluate.policies import WITHOUT_RECALL
from lminf_edge.models import embedded_models

Records = dict[str, Record]

# what is to be reached
NANO = "nano"
WITHIN = {True: 0.01, False: 0.03}  # of the loss of streams started fresh, of a real model and of a toy
FULL_WORSE = 1.0  # nats
KEYS = 0.95  # of the passkeys in reach
RECALLED = 0.85  # of the ceiling
RECALLED_KEYS = 0.95  # at each length


# --- words ------------------------------------------------------------------------------------------------------------


def nats(value: float) -> str:
    return f"{value:+.4f}" if abs(value) < 0.1 else f"{value:+.2f}"


def interval(estimate: Estimate, digits: int = 4) -> str:
    return f"{estimate.value:+.{digits}f} ({estimate.low:+.{digits}f} to {estimate.high:+.{digits}f})"


def verdict(estimate: Estimate) -> str:
    """With "tie" where the interval contains zero."""
    words = f"{nats(estimate.value)} ± {estimate.margin:.4f}"
    return f"tie ({words})" if estimate.is_zero else words


def compared(samples: Sequence[Array]) -> str:
    """The first minus the second, where there is enough for an interval."""
    return verdict(mean_difference(*samples)) if len(samples[0]) >= 2 else "–"


def span(start: int, end: int) -> str:
    return f"{start:,} – {end:,}"


def model_of(record: Record) -> str:
    return f"`{record['model']['name']}`"


def subject(record: Record) -> str:
    return f"{model_of(record)}, {window_of(record)}"


def sources(records: Iterable[Record]) -> str:
    """Where and when they were measured, and the files."""
    links: dict[str, list[str]] = {}
    for record in records:
        name, machine = record["experiment"], record["machine"]
        links.setdefault(f"{machine['cpu']}, {machine['date'][:10]}", []).append(f"[{name}](results/{name}.json)")
    return "; ".join(f"{where}: {', '.join(found)}" for where, found in links.items()) + ".\n"


def described(record: Record) -> str:
    """Model, weights and cache."""
    model = record["model"]
    return (
        f"{model['n_params'] / 1e6:.{0 if is_real(record) else 2}f} M parameters ({model['architecture']}), "
        f"{model['weights']} weights, trained on {model['n_ctx_train']:,} tokens; window {window_of(record)}, "
        f"{record['settings']['kv_type']} KV"
    )


def reached(record: Record) -> str:
    of = "" if record["complete"] else f" (of {record['settings']['tokens']:,}: stopped)"
    return f"{record['tokens']:,}{of}"


def same_again(record: Record) -> str:
    """How many blocks cost what they cost when they were read before."""
    again = readings_again(record)
    if not len(again):
        return "–"
    return f"{int((again == 0).sum()):,} of {len(again):,}; largest difference {np.abs(again).max():.5f} nats"


# --- in short ---------------------------------------------------------------------------------------------------------


def claim(record: Record, what: str, measured: str, target: str = "", met: bool = False) -> list[str]:
    """What was measured, what is to be reached, and whether it is."""
    so_far = "" if record["complete"] else " so far"
    judged = [target, f"reached{so_far}" if met else "**not reached**"] if target else ["–", "–"]
    return [f"{model_of(record)}, {window_size(record):,}", what, measured, *judged]


def summary(records: Records) -> str:
    losses, far = loss_records(records, "f16"), loss_records(records, "f16", "far")
    rows = [
        *(row for record in losses for row in loss_claims(record)),
        *(fresh_claim(record) for record in (*far, *losses) if record["fresh"].get("lminf")),
        *map(drift_claim, stream_records(records)),
        *(divergence_claim(records[name]) for name in ("kl-f32",) if name in records),
        *map(tail_claim, tail_records(records)),
        *(passkey_claim(records[name]) for name in ("passkey",) if name in records),
        *(row for record in recall_records(records) for row in recall_claims(record)),
    ]
    return stale_note(records) + table(["model, window", "", "measured", "target", ""], rows, 5) if rows else ""


def is_asked(record: Record) -> bool:
    """Losses have targets for real models, and for the toy that was made to reach them."""
    return is_real(record) or bool(record["model"]["name"] == NANO)


def loss_claims(record: Record) -> list[list[str]]:
    rows = []
    n_full = read_everywhere(record, "full") if "full" in record["policies"] else 0
    start, end = n_full // 2, far_end(record)
    if start >= record["model"]["n_ctx_train"]:
        worse = mean_difference(*beside(record, "full", start, n_full))
        target = f"{FULL_WORSE:.0f} nat at least" if is_asked(record) else ""
        what = f"full attention minus Λ at {span(start, n_full)}"
        rows.append(claim(record, what, f"{interval(worse, 2)} nats", target, worse.value >= FULL_WORSE))
    if end > PAST:
        differences = [f"`{other}` {compared(beside(record, other, PAST, end))}" for other in constant_memory(record)]
        what = f"others minus Λ at {span(PAST, end)} (positive: Λ is better)"
        rows.append(claim(record, what, ", ".join(differences)))
    return rows


def fresh_claim(record: Record) -> list[str]:
    start, end = record["settings"]["start"], far_end(record)
    far, near = blocks(record, "lminf", start, end).mean(), fresh_blocks(record, "lminf", end).mean()
    share, within = float(far / near) - 1, WITHIN[is_real(record)]
    measured = f"{far:.4f} against {near:.4f}: {share:+.2%}"
    if record["fresh"].get("full"):
        measured += f" (full attention, fresh: {fresh_blocks(record, 'full', end).mean():.4f})"
    what = f"Λ at {span(start, end)}, against the same tokens started fresh"
    return claim(record, what, measured, f"within {within:.0%}" if is_asked(record) else "", abs(share) <= within)


def drift_claim(record: Record) -> list[str]:
    estimate = drift(record)
    assert estimate is not None
    past = record["settings"]["start"]
    what = f"drift over {reached(record)} tokens, past {past:,}, for ten times the position"
    measured = f"{interval(estimate, 5)} nats; blocks that cost the same when read again: {same_again(record)}"
    return claim(record, what, measured, "zero within its interval", estimate.is_zero)


def divergence_claim(record: Record) -> list[str]:
    largest = max(policy["largest_before_full"] for policy in record["policies"].values())
    what = "weights and cache in f32: largest KL divergence from full attention before the window is full"
    return claim(record, what, f"{largest:.1e} nats", "zero, but for rounding", largest < 1e-6)


def tail_claim(record: Record) -> list[str]:
    """What the default of prefill "tail" costs."""
    way = f"{LMInfConfig.n_tail} windows"
    estimate = mean_difference(tail_blocks(record, way), tail_blocks(record, "everything"))
    what = f"sinks and the last {way} processed, minus all"
    return claim(record, what, f"{interval(estimate)} nats", f"{SMALL} at most", estimate.high <= SMALL)


def passkey_claim(record: Record) -> list[str]:
    right, asked, _, _ = reach(record, "lminf")
    measured = f"{right} of {asked}: {right / asked:.0%}"
    return claim(record, "passkeys in reach of Λ, given right", measured, f"{KEYS:.0%}", right / asked >= KEYS)


def recall_claims(record: Record) -> list[list[str]]:
    """All lengths together, keys at each, beside the fact in the window; and what full attention read, beside it."""
    rows = []
    is_key = record["settings"]["task"] == "prose"
    target = RECALLED_KEYS if is_key else RECALLED
    lengths = {name: lengths_of(record, name) for name in ("recall", "full")}
    beside: list[tuple[str, int | None]] = [("ceiling", length) for length in (lengths["recall"] if is_key else [None])]
    for policy, length in (*beside, *(("full", length) for length in lengths["full"])):
        at = f" at {length:,}" if length else ""
        right, asked = found_of(record, "recall", length)
        best, tried = found_of(record, policy, length if policy == "full" else None)
        if asked and best:
            share, ceiling = right / asked, best / tried
            name = f"full attention{at}" if policy == "full" else "the fact in the window"
            if policy != "full" and not is_key:
                where = f" at {' and '.join(f'{each:,}' for each in lengths['recall'])}"
            else:
                where = at * is_key
            what = f"{record['settings']['task']}{where}: right answers with recall, against {name}"
            measured = f"{right} of {asked} against {best} of {tried}: {share / ceiling:.0%}"
            rows.append(claim(record, what, measured, f"{target:.0%}", share >= target * ceiling))
    return rows


def lengths_of(record: Record, policy: str) -> list[int]:
    return sorted({cell["length"] for cell in record["policies"].get(policy, {"cells": []})["cells"]})


def stale_note(records: Records) -> str:
    """A warning if an embedded model is no longer the one that was measured."""
    embedded = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in embedded_models().items()}
    models = {name: record["model"] for name, record in records.items()}
    stale = [name for name, model in models.items() if embedded.get(model["name"], model["sha256"]) != model["sha256"]]
    if not stale:
        return ""
    return f"**Not up to date**: another version of an embedded model was measured by {', '.join(stale)}.\n\n"


# --- loss by position -------------------------------------------------------------------------------------------------


def loss(records: Records) -> str:
    """Of each model its plot, its losses, and the others minus Λ."""
    parts = []
    for record in loss_records(records, "f16"):
        title = record["model"]["name"] + (f", window {window_size(record):,}" if is_real(record) else "")
        texts = texts_read(record, *record["policies"])
        mean = f"mean over {len(texts)} texts, each" if len(texts) > 1 else "one text,"
        parts.append(
            f"{'###' if is_real(record) else '####'} {title}\n\n"
            f"![loss by position, {title}](results/{loss_plot(record)})\n\n"
            f"{described(record)}; {mean} read as one stream ({', '.join(texts)}). {sources([record])}\n"
            f"{losses_table(record)}\n{full_sentence(record)}{others_table(record)}"
        )
    return "\n".join(parts)


def losses_table(record: Record) -> str:
    policies = [policy for policy in WITHOUT_RECALL if policy in record["policies"]]
    curves = {policy: octaves(curve(record, policy), window_size(record)) for policy in policies}
    means = {policy: {bucket.start: f"{bucket.mean:.3f}" for bucket in found} for policy, found in curves.items()}
    rows = [
        [span(bucket.start, bucket.end), *(means[policy].get(bucket.start, "–") for policy in policies)]
        for bucket in curves["lminf"]
    ]
    return table(["loss at positions", *policies], rows)


def full_sentence(record: Record) -> str:
    """Where full attention was stopped."""
    n, n_train = record["full_tokens"], record["model"]["n_ctx_train"]
    if "full" not in record["policies"] or n >= far_end(record):
        return ""
    where = f"{n / n_train:g} times the training length" if n > n_train else "inside the training length"
    return f"Full attention was stopped after {n:,} tokens, {where}.\n\n"


def others_table(record: Record) -> str:
    """Others minus Λ in every octave past PAST, and in how many finer buckets Λ is better, tied and worse."""
    others = constant_memory(record)
    rows, start = [], PAST
    while start < far_end(record):
        end = min(2 * start, far_end(record))
        cells = [compared(beside(record, other, start, end)) for other in others]
        rows.append([span(start, end), *cells])
        start = end
    if not rows:
        return ""
    n_texts = [len(texts_read(record, other, "lminf")) for other in others]
    columns = [f"{other}, {n} text{'s' * (n > 1)}" for other, n in zip(others, n_texts, strict=True)]
    rows.append(["finer buckets", *(buckets(record, other) for other in others)])
    return table(["minus Λ at positions", *columns], rows)


def buckets(record: Record, other: str) -> str:
    found = compare_buckets(record, other)
    if not found:
        return "–"
    better, worse = sum(e.low > 0 for e in found), sum(e.high < 0 for e in found)
    largest = max(found, key=lambda e: abs(e.value))
    return f"{better} / {len(found) - better - worse} / {worse}, at most {nats(largest.value)}"


def far(records: Records) -> str:
    """Λ alone, further than the others, beside streams that have just begun."""
    found = [record for record in loss_records(records, "f16", "far") if record["fresh"]["lminf"]]  # not stopped before
    rows = []
    for record in found:
        start, end = record["settings"]["start"], far_end(record)
        far, near = blocks(record, "lminf", start, end), fresh_blocks(record, "lminf", end)
        difference = f"{compared([far, near])} ({far.mean() / near.mean() - 1:+.2%})"
        texts = ", ".join(record["policies"]["lminf"]["texts"])
        rows.append([subject(record), span(start, end), texts, f"{far.mean():.4f}", f"{near.mean():.4f}", difference])
    header = ["", "positions", "text", "Λ", "started fresh", "difference"]
    return table(header, rows, 3) + "\n" + sources(found) if rows else ""


def q8_0(records: Records) -> str:
    """A q8_0 cache beside an f16 one."""
    found, rows = [], []
    for plain in loss_records(records, "f16"):
        if (quantized := records.get(plain["experiment"].removesuffix("f16") + "q8_0")) is None:
            continue
        start, end = quantized["settings"]["start"], min(far_end(plain), far_end(quantized))
        cells = {"": f"{subject(plain)}, {span(start, end)}"}
        for policy in plain["policies"].keys() & quantized["policies"].keys():
            stop = min(end, *(read_everywhere(record, policy) for record in (quantized, plain)))
            texts = [text for text in texts_read(quantized, policy) if text in texts_read(plain, policy)]
            cells[policy] = compared([blocks(record, policy, start, stop, texts) for record in (quantized, plain)])
        found.append(quantized)
        rows.append(cells)
    header = ["", *(policy for policy in WITHOUT_RECALL if any(cells.get(policy, "–") != "–" for cells in rows))]
    lines = [[cells.get(column, "–") for column in header] for cells in rows]
    return f"{table(header, lines)}\n{sources(found)}" if rows else ""


# --- long streams -----------------------------------------------------------------------------------------------------


def stream(records: Records) -> str:
    """A column for each stream."""
    found = stream_records(records)
    if not found:
        return ""
    columns = [stream_figures(record) for record in found]
    rows = [[what, *(column[what] for column in columns)] for what in columns[0]]
    picture = f"![drift](results/{of_kind('drift', found[0])})"
    return f"{picture}\n\n{table(['', *map(model_of, found)], rows)}\n{sources(found)}"


def stream_figures(record: Record) -> dict[str, str]:
    estimate, again = drift(record), drift(record, within=True)
    assert estimate is not None
    position, difference, _ = paired(record)
    decades = float(np.log10(position[-1] / position[0]))
    most = max(abs(estimate.low), abs(estimate.high)) * decades
    moves = f"no drift: {most:.4f} at most (95 %)" if estimate.is_zero else f"{estimate.value * decades:+.4f}"
    before, after = record["resident_bytes"]
    return {
        "window": window_of(record),
        "text, in blocks of": f"{record['text_tokens']:,} tokens, {record['block']:,}",
        "tokens read": reached(record),
        "loss minus that of a fresh start": f"{difference.mean():+.5f}",
        "slope": interval(estimate, 5),
        "the line moves": f"{moves}, from {position[0]:,.0f} to {position[-1]:,.0f}",
        "slope, the same block read again": interval(again, 6) if again else "–",
        "blocks read again with the same loss": same_again(record),
        "KV": human_bytes(record["kv_bytes"]),
        "resident memory": f"{human_bytes(before)} → {human_bytes(after)}" if before else "–",
        "rebases": f"{record['rebases']:,}",
        "largest position in the graph": f"{record['max_graph_position']:,}",
    }


# --- settings ---------------------------------------------------------------------------------------------------------


def sweep(kind: str) -> Callable[[Records], str]:
    """A block of one setting's values."""
    return lambda records: "\n".join(
        sweep_table(record) for name, record in records.items() if name.startswith(f"sweep-{kind}")
    )


def sweep_table(record: Record) -> str:
    n_local = record["settings"].get("window", record["model"]["n_ctx_train"] // 2) - LMInfConfig.n_global
    defaults = {"n_global": LMInfConfig.n_global, "n_local": n_local, "max_distance": n_local, "kv_type": "f16"}
    has_weights = "weights" in record["variants"][0]
    reference = variant_of(record, **defaults, **({"weights": "F16"} if has_weights else {}))
    texts = reference["texts"]
    text = next(iter(texts.values()))
    is_fresh = "fresh_nll" in text
    rows = []
    for variant in record["variants"]:
        difference = mean_difference(far_blocks(variant), far_blocks(reference))
        matters = difference.low > SMALL or difference.high < -SMALL
        cells = [
            variant["name"],
            f"{far_blocks(variant).mean():.4f}",
            "–" if variant is reference else f"**{verdict(difference)}**" if matters else verdict(difference),
            human_bytes(variant["kv_bytes"]),
            *([f"{far_blocks(variant, 'fresh_nll').mean():.4f}"] if is_fresh else []),
            *([human_bytes(variant["file_bytes"])] if has_weights else []),
        ]
        rows.append(cells)
    header = ["", "loss", f"minus that of {reference['name']}", "KV", *["started fresh"] * is_fresh]
    return (
        f"{model_of(record)}, G = {LMInfConfig.n_global}, L = {n_local}; tokens "
        f"{span(text['start'], text['edges'][-1])} of {len(texts)} text{'s' * (len(texts) > 1)}. {sources([record])}\n"
        + table([*header, *["file"] * has_weights], rows)
    )


# --- the tail ---------------------------------------------------------------------------------------------------------


def tail(records: Records) -> str:
    found = tail_records(records)
    if not found:
        return ""
    columns = tails(found[0])
    rows = []
    for record in found:
        depths = tail_octaves(record)
        for i, (start, end) in enumerate([(depths[0][0], depths[-1][1]), *(depths if len(depths) > 1 else ())]):
            everything = tail_blocks(record, "everything", start, end)
            if len(everything) < 2:
                continue
            costs = [compared([tail_blocks(record, way, start, end), everything]) for way in columns]
            cells = ["" if i else subject(record), span(start, end), str(len(everything)), f"{everything.mean():.3f}"]
            rows.append([*cells, *costs])
    return (
        f"Each place has {found[0]['settings']['block']} tokens. {sources(found)}\n"
        + table(["", "depth", "places", "loss, everything", *columns], rows, 2)
    )  # fmt: skip


# --- recall -----------------------------------------------------------------------------------------------------------


def answers(record: Record, policy: str, length: int | None = None) -> str:
    right, asked = found_of(record, policy, length)
    if not asked:
        return "–"
    low, high = proportion(right, asked)
    return f"{right} of {asked} ({low:.0%} to {high:.0%})"


def in_window(record: Record, length: int) -> str:
    """Right answers with recall about facts that had not left the window."""
    cells = [cell for cell in record["policies"].get("recall", {"cells": []})["cells"] if cell["length"] == length]
    reachable = sum(round(cell["in_reach"] * cell["trials"]) for cell in cells)
    return f"{sum(cell['correct_in_reach'] for cell in cells)} of {reachable}" if reachable else "–"


def recall(records: Records) -> str:
    found = recall_records(records)
    if not found:
        return ""
    rows = []
    for record in found:
        settings = record["settings"]
        what = [
            f"{model_of(record)}, {settings['task']}",
            f"{window_of(record)}; {settings['n_recall']} at {record['window']['recall_distance']}"
            + (f", in the last {settings['n_recalling']} tokens" if "n_recalling" in settings else ""),
            str(len(settings["depths"])),
        ]
        cells = [cell for name, p in record["policies"].items() if name != "ceiling" for cell in p["cells"]]
        for i, length in enumerate(sorted({cell["length"] for cell in cells})):
            shares = [answers(record, policy, length) for policy in ("lminf", "recall", "full")]
            shares.insert(2, in_window(record, length))
            first = ["", "", ""] if i else what
            rows.append([*first, f"{length:,}", *shares, "" if i else answers(record, "ceiling")])
    header = ["", "window; recalled at distance", "places", "tokens", "Λ", "Λ with recall", "of these in the window"]
    header += ["full attention", "ceiling"]
    picture = f"![right answers by length and place](results/{of_kind('recall', found[0])})\n\n"
    return f"{picture if recall_picture(records) else ''}{table(header, rows, 4)}\n{sources(found)}"


def recall_loss(records: Records) -> str:
    found = recall_losses(records)
    if not found:
        return ""
    ways = list(found[0]["ways"])[1:]
    rows = []
    for record in found:
        plain, settings = recall_blocks(record, "0"), record["settings"]
        size = f"{len(plain)} of {settings['block']} tokens, from {settings['start']:,} on"
        costs = [compared([recall_blocks(record, way), plain]) for way in ways]
        rows.append([subject(record), size, f"{plain.mean():.4f}", *costs])
    return table(["", "blocks", "Λ", *(f"R = {way}" for way in ways)], rows, 2) + "\n" + sources(found)


def ring(records: Records) -> str:
    """A stream much longer than its archive."""
    parts = []
    for record in (record for name, record in records.items() if name.startswith("ring-")):
        settings, columns = record["settings"], []
        for end in record["ends"]:
            plain, recalled = end["text_nll"].values()
            columns.append([
                f"{end['tokens']:,}", f"{end['correct']} of {end['trials']}", f"{plain:.4f}",
                f"{recalled - plain:+.4f}", f"{end['mean_nll']:.4f}", f"{end['n_archived']:,}",
                *(human_bytes(end[f"{what}_bytes"]) for what in ("archive", "kv", "resident")),
            ])  # fmt: skip
        names = [
            "tokens read", "right answers", f"loss of {settings['text']:,} tokens that are new",
            f"with {settings['n_recall']} recalled", "loss of what was read since", "tokens in the archive",
            "archive", "KV", "resident memory",
        ]  # fmt: skip
        rows = [[name, *cells] for name, *cells in zip(names, *columns, strict=True)]
        parts.append(
            f"{model_of(record)}, {window_of(record)}, an archive of {settings['n_archive']:,} tokens; keys are told "
            f"once, up to {settings['length']:,} tokens before they are asked for. {sources([record])}\n"
            + table(rows[0], rows[1:])
        )
    return "\n".join(parts)


# --- the rest ---------------------------------------------------------------------------------------------------------


def generation(records: Records) -> str:
    """Long texts: whether they repeat themselves, and what the model thinks of them."""
    parts = []
    for record in (record for name, record in records.items() if name.startswith("generation-")):
        settings, policies, block = record["settings"], record["policies"], record["settings"]["block"]
        rows, by_seed = [], {}
        for name, figures in policies.items():
            losses, new = np.array(figures["nll"]), np.array(figures["distinct"])
            by_seed[name] = np.array(figures["distinct_all"]), losses.mean(axis=1)
            means = [mean_difference(values) for values in by_seed[name]]
            rows.append([
                plots.NAMES.get(name, "the novels themselves"),
                *(f"{e.value:.3f} ± {e.margin:.3f}" for e in means),
                *(f"{values[:, 0].mean():.3f} → {values[:, -1].mean():.3f}" for values in (new, losses)),
            ])  # fmt: skip
        differences = [compared(pair) for pair in zip(by_seed["lminf"], by_seed["shift"], strict=True)]
        rows.append(["Λ minus context shift", *differences, "", ""])
        sampling = ", ".join(f"{name} {value:g}" for name, value in settings["sampling"].items())
        parts.append(
            f"{described(record)}, {settings['seeds']} seeds, {settings['prompt']} tokens of prompt; {sampling}. "
            f"Counted are {len(policies['lminf']['nll'][0]) * block:,} tokens past the window. {sources([record])}\n"
            + table(["written by", "distinct 4-grams", "loss", f"distinct, first → last {block} tokens",
                     f"loss, first → last {block}"], rows)
        )  # fmt: skip
    return "\n".join(parts)


def divergence(records: Records) -> str:
    found = [records[name] for name in ("kl-f32", "kl-f16") if name in records]
    rows = []
    for record in found:
        exact = record["settings"]["kv_type"] == "f32"
        cache = f"{'F32' if exact else record['model']['weights']} weights, {record['settings']['kv_type']} KV"
        for policy, figures in record["policies"].items():
            buckets = list(zip(pairwise(figures["edges"]), figures["bucket_kl"], strict=True))
            after = [(end - start, mean) for (start, end), mean in buckets if start >= window_size(record)]
            mean_after = sum(n * mean for n, mean in after) / sum(n for n, _ in after)
            rows.append([cache, policy, f"{figures['largest_before_full']:.1e}", f"{mean_after:.5f}"])
    if not rows:
        return ""
    return (
        f"![KL divergence](results/{DIVERGENCE})\n\n{subject(found[0])}, {found[0]['stretches']} stretches of "
        f"{found[0]['length']} tokens, the training length. {sources(found)}\n"
        + table(["", "policy", "largest before", "mean after"], rows, 2)
    )


def passkey(records: Records) -> str:
    if "passkey" not in records:
        return ""
    found = [records[name] for name in ("passkey", "passkey-sinks") if name in records]
    rows = []
    for record in found:
        for policy in record["policies"]:
            counts = reach(record, policy)
            shares = [f"{right} of {asked}" if asked else "–" for right, asked in (counts[:2], counts[2:])]
            rows.append([policy, window_of(record), *shares, told_first(record, policy)])
    return (
        f"![passkey retrieval](results/{PASSKEY})\n\n{model_of(found[0])}, {found[0]['settings']['trials']} prompts "
        f"for each length and depth. {sources(found)}\n"
        + table(["", "window", "right, in reach", "right, out of reach", "told at once, out of the window"], rows, 2)
    )


def told_first(record: Record, policy: str) -> str:
    """Right answers about a key that begins a prompt longer than the window."""
    size = window_size(record)
    cells = [c for c in record["policies"][policy]["cells"] if c["depth"] == 0 and c["length"] > size]
    return f"{sum(c['correct'] for c in cells)} of {sum(c['trials'] for c in cells)}" if cells else "–"


def paper(records: Records) -> str:
    """The paper's figures beside ours."""
    ours = ours_of(not_refused(records)) | ours_of_speed()
    figures = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
    rows = [[f["what"], f["value"], ours.get(f["ours"]) or "–", f["differs"], f["source"]] for f in figures]
    return table(["", "the paper", "ours", "what differs", "source of the paper's figure"], rows, 5)


def ours_of(records: Records) -> dict[str, str]:
    streams = [
        f"{model_of(record)}, {reached(record)} tokens: slope {interval(estimate, 5)} nats"
        for record in stream_records(records)
        if (estimate := drift(record))
    ]
    first = []
    for name, record in records.items():
        if name.startswith("sweep-global"):
            most = max(variant["n_global"] for variant in record["variants"])
            losses = [far_blocks(variant_of(record, n_global=n)) for n in (most, 10)]
            first.append(f"loss with {most} minus that with 10, {model_of(record)}: {compared(losses)} nats")
    windows = [f"{window_of(r)} of {r['model']['n_ctx_train']}" for r in loss_records(records, "f16")]
    return {"longest": "; ".join(streams), "n_global": "; ".join(first), "n_local": next(iter(windows), "")}


def ours_of_speed() -> dict[str, str]:
    """At the deepest position that both ours and full attention were measured at."""
    if (record := speed().get("positions")) is None:
        return {}
    full = pick(results_of(record), cache="full", depth=DEEP)
    ours = pick(results_of(record), cache="lambda", depth=full[0].contender.depth)
    a, b = fastest(ours), fastest(full)
    where = f"at position {a.contender.depth:,}, window {a.contender.window}"
    machine = f"{record['model']['shape']} shape, {record['model']['weights']}, {record['n_threads']} CPU threads"
    return {
        "decoding": f"{ratio(a, b).median:.2f} × as fast {where}: {machine}",
        "memory": f"{b.kv_bytes / a.kv_bytes:.2f} × less KV memory {where}: {machine}",
    }


def reading(record: Record) -> str:
    """How long a text takes."""
    fast, n_tokens = fastest(pick(results_of(record), cache="lambda", depth=DEEP)), 1 << 17
    return (
        f"Llama-3.2-1B's shape with Q4_0 weights and a window of {fast.contender.window} reads {fast.median:,.0f} "
        f"tokens/s on the machine of [performance.md](performance.md): {n_tokens / fast.median / 60:.0f} minutes for "
        f"{n_tokens:,} tokens and a policy.\n"
    )


def texts(records: Records) -> str:
    """What was read."""
    found: dict[str, list[Record]] = {}
    for record in records.values():
        for name, text in record["texts"].items():
            found.setdefault(name, []).append(text)
    rows = []
    for name, each in found.items():
        counts = [text["n_tokens"] for text in each]
        rows.append([name, f"`{each[0]['sha256'][:12]}…`", f"{each[0]['n_bytes']:,}", span(min(counts), max(counts))])
    return table(["text", "sha256", "bytes", "tokens, by model"], rows, 2)


def commands(records: Records) -> str:
    """What does each of them from a shell; and what could not be measured."""
    refused = [f"- {name} could not be measured: {r['refused']}\n" for name, r in records.items() if "refused" in r]
    lines = []
    for name, record in not_refused(records).items():
        stopped = "" if record["complete"] else f", stopped at {record['tokens']:,} tokens"
        lines.append(f"# {name}{stopped}\n{record['command']}\n")
    return f"```text\n{''.join(lines)}```\n" + ("\n" + "".join(refused) if refused else "")


def machines(records: Records) -> str:
    total = sum(record["seconds"] for record in records.values())
    return f"{total / 3600:.1f} hours in all.\n\n{pages.machines(records)}"


# --- the page ---------------------------------------------------------------------------------------------------------


def speed() -> Records:
    """The figures of docs/performance.md."""
    return pages.load_records(ROOT / "docs" / "performance")


def of(is_of_real: bool, make: Callable[[Records], str]) -> pages.Block:
    """A block of what was measured of real models, or of toys."""
    return lambda records: make(kind_of(not_refused(records), is_of_real))


SECTIONS: dict[str, Callable[[Records], str]] = {
    "summary": summary,
    "loss": loss,
    "q8_0": q8_0,
    "stream": stream,
    "n_global": sweep("global"),
    "n_local": sweep("local"),
    "max_distance": sweep("distance"),
    "tail": tail,
    "recall": recall,
    "recall-loss": recall_loss,
}
OF_REAL = {"far": far, "generation": generation}
OF_TOYS = {
    "ring": ring,
    "kv-type": sweep("kv"),
    "weights": sweep("weights"),
    "divergence": divergence,
    "passkey": passkey,
}
BLOCKS: dict[str, pages.Block] = {
    **{name: of(True, make) for name, make in (SECTIONS | OF_REAL).items()},
    **{f"toy-{name}": of(False, make) for name, make in (SECTIONS | OF_TOYS).items()},
    "positions": lambda _: block("positions", positions)(speed()),
    "reading": lambda _: block("prefill", reading)(speed()),
    "paper": paper,
    "texts": texts,
    "machines": machines,
    "commands": commands,
}

if __name__ == "__main__":
    sys.exit(pages.main("results", BLOCKS, "make results-measure", draw=draw))
