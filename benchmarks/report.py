"""Fills docs/performance.md, and draws its plot, with the figures of benchmarks/speed.py and benchmarks/gpu.py.

make bench-report, or: .venv/bin/python benchmarks/report.py [--figures DIR] [--page FILE]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pages
from pages import Record, block, spread, table

from lminf_edge.bench.alternate import Ratio, Result, fastest, ratio, ratio_of
from lminf_edge.cli.common import human_bytes
from lminf_edge.evaluate import plots

PLOT = "decode-speed.png"
DEEP, NEAR = -1, -2  # as depths: the largest there is, the smallest
GPU = "gpu-"  # before the names of the experiments of benchmarks/gpu.py
NEIGHBOR = "ik-"  # before those of benchmarks/ik.py
AVX2 = "avx2-"  # before those of a processor without AVX-512

NAMES = {"llama-3.2-1b": "Llama-3.2-1B", "qwen3-0.6b": "Qwen3-0.6B", "llama-2-7b": "Llama-2-7B"}

TITLES = {
    "decode-llama-3.2-1b": "Llama-3.2-1B, decode",
    "decode-llama-3.2-1b-q8_0": "Llama-3.2-1B, decode, q8_0 KV",
    "decode-qwen3-0.6b": "Qwen3-0.6B, decode",
    "decode-llama-2-7b": "Llama-2-7B, decode",
    "huge-pages-llama-3.2-1b": "Llama-3.2-1B, decode, all memory of both in huge pages",
    "huge-pages-llama-2-7b": "Llama-2-7B, decode, all memory of both in huge pages",
    "prefill": "Llama-3.2-1B, prefill",
    "positions": "Llama-3.2-1B, decode by stream position",
    "far": "Llama-3.2-1B, decode far into a stream",
    "sinks": "Sinks: the attention of Llama-3.2-1B with 256 feed-forward units and 512 tokens of vocabulary",
    "recall": "Llama-3.2-1B, decode with recall",
    "recall-far": "Llama-3.2-1B, decode with recall from a long archive",
    "recall-prefill": "Llama-3.2-1B, prefill with recall",
    "made-up-cells": "Qwen3-0.6B, cells made up and cells computed",
}

# which contenders a question is about
Choice = dict[str, Any]
FULL: Choice = {"cache": "lambda", "depth": DEEP}
EMPTY: Choice = {"cache": "lambda", "depth": 0}
STOCK: Choice = {"cache": "window"}
STOCK_EMPTY: Choice = {"cache": "full", "depth": 0}
RECALL: Choice = {"cache": "recall"}
Q8_0: Choice = {"cache": "lambda", "kv_type": "q8_0"}

DECODE = "decode, full window of {window}, against better stock at {window}"
FOUR: list[tuple[str, list[Choice], list[Choice]]] = [
    (DECODE, [FULL], [STOCK]),
    ("the same, against our own speed with an empty cache", [FULL], [EMPTY]),
    ("empty caches, ours against stock", [EMPTY], [STOCK_EMPTY]),
    (
        "if attention cost nothing: the faster empty cache against the better stock at {window}",
        [EMPTY, STOCK_EMPTY],
        [STOCK],
    ),
]
RECALLING = "with {depth:,} tokens in the archive and {recall.n_recall} recalled, against no recall"
HUGE = [("decode, full window of {window}, all memory of both in huge pages", [FULL], [STOCK])]
QUESTIONS: dict[str, list[tuple[str, list[Choice], list[Choice]]]] = {
    "decode-llama-3.2-1b": FOUR,
    "decode-llama-3.2-1b-q8_0": [
        ("decode, full window of {window}, our q8_0 KV against our f16 KV", [Q8_0], [FULL | {"kv_type": "f16"}]),
        ("the same, our q8_0 KV against stock with q8_0 KV", [Q8_0], [STOCK]),
    ],
    "decode-qwen3-0.6b": FOUR,
    "decode-llama-2-7b": [(DECODE, [FULL], [STOCK])],
    "huge-pages-llama-3.2-1b": HUGE,
    "huge-pages-llama-2-7b": HUGE,
    "far": [("decode at position {depth:,}, against position {near:,}", [FULL], [FULL | {"depth": NEAR}])],
    "prefill": [("prefill, pp{n_tokens} at a full window of {window}, against better stock", [FULL], [STOCK])],
    "recall": [(f"decode {RECALLING}", [RECALL], [FULL])],
    "recall-far": [(f"decode {RECALLING}", [RECALL], [FULL])],
    "recall-prefill": [(f"prefill, pp{{n_tokens}} {RECALLING}", [RECALL], [FULL])],
}


def results_of(record: Record) -> list[Result]:
    return [Result.from_json(value) for value in record["results"]]


def pick(results: Iterable[Result], **fields: Any) -> list[Result]:
    """Those whose contenders have these properties."""
    end = {DEEP: max, NEAR: min}.get(fields.get("depth", 0))
    if end:
        del fields["depth"]
    found = [r for r in results if all(getattr(r.contender, name) == value for name, value in fields.items())]
    depths = [r.contender.depth for r in found]
    return [r for r in found if not end or r.contender.depth == end(depths)]


# --- cells ------------------------------------------------------------------------------------------------------------


def times(value: Ratio) -> str:
    return spread((value.median, value.min, value.max))


def bold(value: Ratio) -> str:
    median, rest = times(value).split(" (")
    return f"**{median}** ({rest}"


def speed(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def who(result: Result) -> str:
    c = result.contender
    cells = f", {c.kv_type} KV" if c.kv_type != "f16" else ""
    return f"{'Λ' if c.is_lambda else f'stock, fa {int(c.flash_attn)}'}{cells}"


def compare(question: str, ours: Sequence[Result], other: Sequence[Result]) -> list[str]:
    a, b = fastest(ours), fastest(other)
    sides = [f"{speed(side.median)} t/s ({who(side)})" for side in (a, b)]
    return [question, *sides, bold(ratio(a, b))]


# --- blocks -----------------------------------------------------------------------------------------------------------


def summary(records: dict[str, Record]) -> str:
    rows = []
    for name, questions in QUESTIONS.items():
        if name not in records:
            continue
        results = results_of(records[name])
        shape = NAMES[records[name]["model"]["shape"]]
        for question, *sides in questions:
            ours, other = ([r for choice in side for r in pick(results, **choice)] for side in sides)
            if ours and other:
                numbers = vars(ours[0].contender) | {"near": other[0].contender.depth}
                rows.append(compare(f"{shape}: {question.format(**numbers)}", ours, other))
    if "positions" in records:
        full = pick(results_of(records["positions"]), cache="full", depth=DEEP)
        depth = full[0].contender.depth
        ours = pick(results_of(records["positions"]), cache="lambda", depth=depth)
        row = compare(f"Llama-3.2-1B: decode at position {depth:,}, against full attention", ours, full)
        sizes = [fastest(side).kv_bytes for side in (ours, full)]
        row[1:3] = [f"{cell}, {human_bytes(n)} of KV" for cell, n in zip(row[1:3], sizes, strict=True)]
        rows.append([*row[:3], f"{row[3]}, {sizes[1] / sizes[0]:.2f} times less KV memory"])
    if "sinks" in records:
        rows.append(sinks(results_of(records["sinks"])))
    return table(["", "ours", "other", "ratio"], rows, 4)


def sinks(results: list[Result]) -> list[str]:
    """Their share in the time of attention, round by round."""
    full = [r for r in results if r.contender.depth]
    (with_sinks,) = (r for r in full if r.contender.n_global)
    (without,), (empty,) = pick(full, n_global=0), pick(results, depth=0)
    rounds = zip(*(r.tokens_per_second for r in (with_sinks, without, empty)), strict=True)
    low, middle, high = statistics.quantiles([(1 / a - 1 / b) / (1 / a - 1 / c) for a, b, c in rounds], n=4)
    a, b, c = (1000 / r.median for r in (with_sinks, without, empty))
    return [
        f"Share of the sinks in attention time, n_global = {with_sinks.contender.n_global}",
        f"{a:.2f} ms per token with, {b:.2f} ms without sinks",
        f"{c:.2f} ms with an empty cache",
        f"**{middle:.1%}** (middle half of {len(with_sinks.tokens_per_second)} rounds: {low:.1%} – {high:.1%})",
    ]


def positions(record: Record) -> str:
    results = results_of(record)
    rows = []
    for depth in sorted({r.contender.depth for r in results if r.contender.cache != "window"}):
        ours, full = (pick(results, cache=cache, depth=depth) for cache in ("lambda", "full"))
        cells = [f"{depth:,}"]
        for side in (ours, full):
            cells += [speed(fastest(side).median), human_bytes(fastest(side).kv_bytes)] if side else ["–", "–"]
        rows.append([*cells, bold(ratio(fastest(ours), fastest(full))) if ours and full else "–"])
    header = ["stream position", "Λ, t/s", "Λ, KV size", "full attention, t/s", "full attention, KV size", "ratio"]
    return table(header, rows, 0)


def latency(record: Record) -> str:
    figures = record["latency"]
    rows = []
    for what, seconds in (("decoding", figures), ("always the same work, one thread", figures["control"])):
        cells = [f"{1000 * seconds[name]:.2f} ms" for name in ("median", "p99", "max")]
        rows.append([what, *cells, f"{seconds['p99'] / seconds['median']:.2f} ×"])
    return (
        f"{figures['n_tokens']:,} tokens, window {record['contender']['window']}, {record['n_threads']} threads; the "
        f"positions were moved back {figures['n_rebase']} times meanwhile.\n\n"
        + table(["", "median", "p99", "max", "p99 / median"], rows)
    )


def busy(record: Record) -> str:
    """Decoding beside other work."""
    results = record["results"]
    n_busy = sorted({result["busy"] for result in results})
    cells: dict[tuple[str, int, str], list[str]] = {}
    for result in sorted(results, key=lambda result: result["busy"]):
        milliseconds = [1000 / value for value in result["tokens_per_second"]]
        values = statistics.median(milliseconds), min(milliseconds), max(milliseconds)
        cells.setdefault((result["model"], result["threads"], result["waiting"]), []).append(spread(values, unit=" ms"))
    rows = [[f"`{model}`", str(threads), waiting, *made] for (model, threads, waiting), made in cells.items()]
    header = ["model", "threads", "waiting", *(f"{n} busy" if n else "idle" for n in n_busy)]
    return f"{record['machine']['n_cores']} cores.\n\n" + table(header, rows, 3)


def memory(records: dict[str, Record]) -> str:
    """How far decoding is from the speed at which memory can be read."""
    if "bandwidth" not in records or "decode-llama-3.2-1b" not in records:
        return ""
    bandwidth = statistics.median(records["bandwidth"]["bytes_per_second"])
    record = records["decode-llama-3.2-1b"]
    results = results_of(record)
    (full,), (empty,) = pick(results, **FULL), pick(results, **EMPTY)
    stock = pick(results, **STOCK)
    # stock allocates the cells of the window and no more
    n_weights, n_cells = record["model"]["n_bytes"], stock[0].kv_bytes
    token, nothing = 1 / full.median, 1 / empty.median
    rows = [
        [what, human_bytes(n), f"{1000 * n / bandwidth:.1f} ms", f"{1000 * seconds:.1f} ms{note}"]
        for what, n, seconds, note in (
            ("weights, once per token", n_weights, nothing, " (a whole token, empty cache)"),
            ("K and V of the window", n_cells, token - nothing, " (what a full window adds)"),
            ("both", n_weights + n_cells, token, ""),
        )
    ]
    most = bandwidth / (n_weights + n_cells)
    return table(["", "bytes", "at that speed", "measured"], rows) + (
        f"\n{record['n_threads']} processes read {bandwidth / 1e9:.1f} GB/s together. Decoding is at "
        f"{full.median / most:.0%} of memory's speed; all of it would be {most / fastest(stock).median:.2f} times the "
        "speed of the better stock here.\n"
    )


def made_up(record: Record) -> str:
    results = results_of(record)
    rows = []
    for each in pick(results, prefilled=False):
        c = each.contender
        (real,) = pick(results, prefilled=True, cache=c.cache, flash_attn=c.flash_attn)
        rows.append([f"{who(each)} at d{c.depth}", times(ratio(each, real))])
    return table(["Qwen3-0.6B", "speed with made-up cells over speed with computed ones"], rows)


def details(records: dict[str, Record]) -> str:
    parts = []
    for name, title in TITLES.items():
        if name not in records:
            continue
        record, model = records[name], records[name]["model"]
        rows = []
        for r in results_of(record):
            c = r.contender
            cache = f"{'Λ' if c.is_lambda else 'stock'}, {c.cache_label.removeprefix('Λ ')}"
            flash = "–" if c.is_lambda else str(int(c.flash_attn))
            label = c.label + (f", ub {c.n_ubatch}" if c.test == "pp" else "")
            form = f"{{:.{0 if r.median >= 100 else 1 if r.median >= 10 else 2}f}}"
            least, most = (form.format(f(r.tokens_per_second)) for f in (min, max))
            rows.append([
                cache + (" computed" if c.prefilled else ""), c.kv_type, flash, human_bytes(r.kv_bytes), label,
                speed(r.median), f"{least} – {most}",
            ])  # fmt: skip
        parts.append(
            f"### {title}\n\n{model['n_params'] / 1e6:,.0f} M weights, {human_bytes(model['n_bytes'])} "
            f"({model['weights'].upper()}), {record['n_threads']} threads, {record['n_rounds']} rounds, "
            f"{record['seconds']:.0f} s. [{name}.json](performance/{name}.json)\n\n"
            + table(["cache", "kv", "fa", "KV size", "test", "t/s", "least – most"], rows, 2)
        )
    return "\n".join(parts)


def machines(records: dict[str, Record]) -> str:
    return pages.machines({name: record for name, record in records.items() if not name.startswith(GPU)})


# --- ik_llama.cpp -----------------------------------------------------------------------------------------------------


def neighbor(records: dict[str, Record]) -> str:
    """Ours and stock beside ik_llama.cpp, each with its fastest setting, and what each keeps of its speed at depth."""
    parts = []
    for name, record in records.items():
        if not name.startswith(NEIGHBOR):
            continue
        runs = [{**run, "who": who} for who, key in (("", "results"), ("ik", "neighbor")) for run in record[key]]
        fast: dict[tuple[str, str, int, str], list[float]] = {}
        for run in runs:
            at = run["who"] or run["library"], run["test"], run["depth"], run["kv_type"]
            fast[at] = max(fast.get(at, [0.0]), run["tokens_per_second"], key=statistics.median)
        for who, test, depth, _ in list(fast):  # the faster of f16 and q8_0
            both = [fast[at] for at in fast if at[:3] == (who, test, depth)]
            if test == "tg":
                fast[who, test, depth, "either"] = max(both, key=statistics.median)
        rows = []
        for _, test, depth, kv_type in (at for at in fast if at[0] == "ours"):
            sides = [fast.get((who, test, depth, kv_type)) for who in ("ours", "ik", "stock")]
            label = "prefill, 512 tokens" if test == "pp" else f"decode at {depth:,}" if depth else "decode, empty"
            speeds = [speed(statistics.median(side)) if side else "–" for side in sides]
            ratios = [times(ratio_of(sides[0], side)) if sides[0] and side else "–" for side in sides[1:]]
            rows.append([label, kv_type, *speeds, *ratios])
        kept = []
        for at, values in fast.items():
            empty = fast.get((at[0], "tg", 0, at[3]))
            if at[1] == "tg" and at[2] and empty:
                kept.append(f"{at[0]} {statistics.median(values) / statistics.median(empty):.2f} ({at[3]}, {at[2]:,})")
        model, limit = record["model"], record["bytes_per_second"]
        parts.append(
            f"{NAMES[model['shape']]}, {model['weights'].upper()}, {record['n_rounds']} rounds; ik_llama.cpp "
            f"{record['checkout'][:12]}; memory yields {max(limit) / 1e9:.0f} GB/s.\n\n"
            + table(["test", "KV", "ours", "ik", "stock", "ours / ik", "ours / stock"], rows, 2)
            + f"\nKept at depth: {', '.join(kept)}.\n"
        )
    return "\n".join(parts)


# --- a processor without AVX-512 --------------------------------------------------------------------------------------


def avx2(records: dict[str, Record]) -> str:
    return summary({name.removeprefix(AVX2): record for name, record in records.items() if name.startswith(AVX2)})


# --- GPUs -------------------------------------------------------------------------------------------------------------


def card(records: dict[str, Record]) -> str:
    record = next((record for name, record in records.items() if name.startswith(GPU)), None)
    if record is None:
        return ""
    machine, card = record["machine"], record["machine"]["card"]
    return (
        f"{machine['date']}: {card['name']}, {card['memory']}, driver {card['driver']}, {card['compiler']}; "
        f"{machine['upstream']}, commit {machine['commit'] or 'not known'}.\n"
    )


def gpu_models(records: dict[str, Record], test: str) -> str:
    """Λ with a full window beside stock with as many tokens, and with 32k."""
    rows = []
    for shape, name in NAMES.items():
        for kv_type in ("f16", "q8_0"):
            if (record := records.get(f"{GPU}{test}-{shape}-{kv_type}")) is None:
                continue
            results = results_of(record)
            stock = {r.contender.depth: r for r in pick(results, cache="full")}
            far = stock[max(stock)]
            for full in (r for r in pick(results, cache="lambda") if r.contender.depth):
                window = full.contender.window
                (empty,) = pick(results, cache="lambda", window=window, depth=0)
                speeds = [f"{r.median:,.0f}" for r in (full, stock[window], far, empty, stock[0])]
                ratios = [times(ratio(full, r)) for r in (stock[window], far)]
                sizes = f"{human_bytes(full.kv_bytes)} / {human_bytes(far.kv_bytes)}"
                row = [name, kv_type, f"{window:,}", *speeds[:2], ratios[0], speeds[2], ratios[1], *speeds[3:], sizes]
                rows.append(row)
    header = ["model", "KV", "window", "Λ", "stock, as many", "ratio", "stock, 32k", "ratio", "Λ, empty"]
    return table([*header, "stock, empty", "KV size: Λ / stock, 32k"], rows, 2) if rows else ""


def gpu_attention(record: Record) -> str:
    speeds = {line["what"]: line["gb_per_s"] for line in record["results"] if line["what"] != "attention"}
    rows = []
    for line in record["results"]:
        if line["what"] != "attention" or line["n_q"] == 4:
            continue
        amount, unit = (line["gb"], "GB/s") if line["n_q"] == 1 else (line["tflop"], "TFLOP/s")
        rate = f"{amount / (line['fused_us'] * 1e-6):,.0f} {unit}"
        stock = ["–", "–"] if line["flash_us"] is None else [f"{line['flash_us']:.1f}", f"{line['ratio']:.2f} ×"]
        counts = [str(line["n_q"]), f"{line['n_kv']:,}"]
        rows.append([line["shape"], line["kv"], *counts, f"{line['fused_us']:.1f}", rate, *stock])
    return (
        f"{record['n_rounds']} rounds. A copy moves {speeds['copy']:,.0f} GB/s, bytes read and written; decoding's "
        f"product of Q4_0 matrices and a vector reads {speeds['product']:,.0f} GB/s of matrices. "
        "[attention.json](performance/cuda/attention.json)\n\n"
        + table(["shape", "KV", "queries", "cells", "ours", "is", "stock", "stock / ours"], rows, 2)
    )


def gpu_correct(records: dict[str, Record]) -> str:
    lines = []
    if record := records.get(GPU + "operations"):
        lines.append(
            f"The operation against float64 on random inputs: {record['n_run']:,} cases, {record['n_failed']} failed, "
            f"{record['n_declined']} declined; largest NMSE {max(record['worst_nmse'].values()):.1e}."
        )
    if record := records.get(GPU + "models"):
        largest = max(error for _, error in record["worst_nmse"].values())
        lines.append(
            f"Tiny random models of {record['n_models']} architectures with all layers there, against the CPU, stock "
            f"operations and themselves: {len(record['failures'])} failures; largest NMSE {largest:.1e}."
        )
    else:
        lines.append("Not run to the end there: every architecture as a tiny random model (the part `models`).")
    for r in records.get(GPU + "loss", {"results": []})["results"]:
        lines.append(
            f"`{r['model']}`, {r['n_tokens']:,} tokens with a window of {records[GPU + 'loss']['window']}, "
            f"{r['kv_type']} KV: {r['mean_gpu']:.4f} nats per token, on the CPU {r['mean_cpu']:.4f}; a token differs "
            f"by {r['mean_difference']:.4f} on average, by {r['max_difference']:.2f} at most."
        )
    return "".join(f"- {line}\n" for line in lines)


BLOCKS: dict[str, pages.Block] = {
    "summary": summary,
    "positions": block("positions", positions),
    "latency": block("latency", latency),
    "busy": block("busy", busy),
    "memory": memory,
    "neighbor": neighbor,
    "avx2": avx2,
    "gpu-card": card,
    "gpu-decode": lambda records: gpu_models(records, "decode"),
    "gpu-prefill": lambda records: gpu_models(records, "prefill"),
    "gpu-attention": block(GPU + "attention", gpu_attention),
    "gpu-correct": gpu_correct,
    "made-up": block("made-up-cells", made_up),
    "machines": machines,
    "details": details,
}


# --- plot -------------------------------------------------------------------------------------------------------------


def plot(records: dict[str, Record], folder: Path) -> None:
    """Decode speed against stream position. Raises ImportError, in one sentence, without matplotlib."""
    if "positions" not in records:
        return
    results = results_of(records["positions"])
    pyplot = plots.load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")

    def line(cache: str, label: str, color: str, style: str = "-o") -> None:
        """The faster setting at each position; position 0 is drawn at 256, as the axis is logarithmic."""
        side = pick(results, cache=cache)
        depths = sorted({r.contender.depth for r in side})
        best = [fastest(pick(side, depth=depth)).tokens_per_second for depth in depths]
        x = [max(depth, 256) for depth in depths]
        axes.plot(x, list(map(statistics.median, best)), style, color=color, label=label, markersize=4)
        axes.fill_between(x, list(map(min, best)), list(map(max, best)), color=color, alpha=0.15, linewidth=0)

    c = pick(results, cache="window")[0].contender
    line("lambda", f"Λ, {c.n_global} + {c.window - c.n_global}", "tab:blue")
    line("full", "stock, full attention", "tab:red")
    line("window", f"stock, n_ctx {c.window}, at its end", "tab:green", "s")
    axes.set_xscale("log", base=2)
    ticks = sorted({max(r.contender.depth, 256) for r in results if r.contender.cache != "window"})
    names = {256: "0", 512: "512", 1_000_000: "1M"}
    axes.set_xticks(ticks, [names.get(tick, f"{tick // 1024}k") for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(xlabel="stream position, tokens", ylabel="tokens per second")
    axes.set_title("Decode speed, Llama-3.2-1B shape, Q4_0, f16 KV", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend()
    plots.save(figure, folder / PLOT)


def load(folder: Path) -> dict[str, Record]:
    gpu = pages.load_records(folder / "cuda")
    gpu = {GPU + name: record for name, record in gpu.items()}
    avx2 = {AVX2 + name: record for name, record in pages.load_records(folder / "avx2").items()}
    return pages.load_records(folder) | pages.load_records(folder / "neighbor") | avx2 | gpu


if __name__ == "__main__":
    sys.exit(pages.main("performance", BLOCKS, "make bench", load, plot))
