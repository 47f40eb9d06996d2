"""Writes docs/performance.md and its plot from the figures that benchmarks/speed.py measured.

    make bench-report, or: .venv/bin/python benchmarks/report.py [--figures DIR] [--page FILE]

Every number of the page comes from those files; only the words around them are here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import gpu_report
from machine import ROOT

from lminf_edge.bench.alternate import Ratio, Result, fastest, ratio
from lminf_edge.cli.common import human_bytes

PLOT = "decode-speed.png"

# what a reader asks first; each line is left out where its experiment was not run
HEAD = """# Performance

Written by `benchmarks/report.py` from what `benchmarks/speed.py` measured: do not edit. `make bench` measures again
({minutes}), `make bench-report` rewrites this page.

Stock is the pinned llama.cpp without our patches, built from the same source with the same flags. Both are loaded at
once and run in turn, round by round; a ratio is taken within each round, and given as its median with (least – most).
"Better stock" is the faster of stock without and with flash attention (fa). Ours is the fused attention, and on Linux
its cache lies in huge pages, which stock does not ask for; what it is when all memory of both does is shown as well.
Models have the shapes and number formats of real ones, and random weights.
"""

METHOD = """## How it is measured

- Terms are llama-bench's: `pp512` is a prompt of 512 tokens in one batch, `tg32` are 32 tokens one after the other,
  `@ d8192` means with 8192 tokens processed before. No sampling, random token ids, one sequence, n_batch 512;
  n_ubatch is the default of each side, 512 for stock and 128 for ours; for prefill, stock is measured with both (ub).
  Each context runs once, untimed, before its
  first round, and its logits are checked for NaN. Contexts are made anew every two rounds, so that the place of its
  memory cannot favour one throughout.
- "n_ctx 4096" is stock at the same window: a context of 4096 tokens, which the test fills to its last cell. Stock
  cannot go on from there; context shift is not part of its time.
- "Λ, 10 + 4086" is n_global + n_local. A full window means that every cell is in use: those of the window, the slack
  and the micro-batch that the cache is allocated with. `KV size` is what is allocated.
- The cells before a test are made up: {n_computed} tokens are computed, their saved state is stretched to the number of
  cells wanted, and the library reads it back. Positions and number of cells are checked. A Λ stream keeps the sinks
  that were computed.{made_up}
"""

NOT_RUN = """## Not measured

{gpus}
- Other processors than the one above, ARM and Apple's among them: the NEON kernels ran under an emulator only. The AVX2
  kernels were tested, but where the processor has AVX-512, as here, that is what is measured.
- More than {n_threads} threads.
- More than 8 query heads for each KV head, and several tokens decoded at once: both are read by the prefill kernel.
- Weights other than Q4_0 (`lminf-edge bench --weights q8_0|f16`), and real weights (`lminf-edge bench -m model.gguf`).
- Several sequences at once.
"""


NO_CUDA = "- NVIDIA's GPUs: `make gpu` builds, tests and measures on the machine's own card.\n"
OTHER_GPUS = """- Other GPUs. The Metal kernels have been compiled and tested for right results on a CPU; no Mac was at
  hand: `make metal` builds, tests and measures there, and has never been run."""


class Figures:
    """The files of one folder, by experiment."""

    def __init__(self, folder: Path) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob("*.json")):
            record = json.loads(path.read_text())
            self.records[record["experiment"]] = record

    def __contains__(self, name: str) -> bool:
        return name in self.records

    def results(self, name: str) -> list[Result]:
        return [Result.from_json(value) for value in self.records[name]["results"]]


def pick(results: Iterable[Result], **fields: Any) -> list[Result]:
    """Those whose contenders have these properties."""
    return [r for r in results if all(getattr(r.contender, name) == value for name, value in fields.items())]


# --- text -------------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]], n_left: int = 1) -> str:
    """A Markdown table; the first n_left columns are text, the others numbers."""
    lines = [header, ["---" if i < n_left else "---:" for i in range(len(header))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def times(value: Ratio) -> str:
    return f"**{value.median:.2f} ×** ({value.min:.2f} – {value.max:.2f})"


def speed(result: Result) -> str:
    digits = 0 if result.median >= 100 else 1 if result.median >= 10 else 2
    return f"{result.median:.{digits}f}"


def spread(result: Result) -> str:
    digits = 0 if result.median >= 100 else 1 if result.median >= 10 else 2
    return f"{min(result.tokens_per_second):.{digits}f} – {max(result.tokens_per_second):.{digits}f}"


def who(result: Result) -> str:
    c = result.contender
    cells = f", {c.kv_type} KV" if c.kv_type != "f16" else ""
    return f"{'Λ' if c.cache == 'lambda' else f'stock, fa {int(c.flash_attn)}'}{cells}"


def results_table(results: Sequence[Result]) -> str:
    rows = []
    for r in results:
        c = r.contender
        name = "Λ" if c.cache == "lambda" else "stock"
        cells = " computed" if c.prefilled else ""
        rows.append(
            [
                f"{name}, {c.cache_label.removeprefix('Λ ')}{cells}",
                c.kv_type,
                "–" if c.cache == "lambda" else str(int(c.flash_attn)),
                human_bytes(r.kv_bytes),
                c.label + (f", ub {c.n_ubatch}" if c.test == "pp" else ""),
                speed(r),
                spread(r),
            ]
        )
    return table(["cache", "kv", "fa", "KV size", "test", "t/s", "least – most"], rows, 2)


# --- questions and answers --------------------------------------------------------------------------------------------

Answer = tuple[str, str, str, str]  # question, ours, other, ratio


def compare(question: str, ours: Sequence[Result], other: Sequence[Result]) -> Answer:
    a, b = fastest(ours), fastest(other)
    return (
        question,
        f"{speed(a)} t/s ({who(a)})",
        f"{speed(b)} t/s ({who(b)})",
        times(ratio(a, b)),
    )


def decode_answers(figures: Figures, name: str, shape: str) -> list[Answer]:
    results = figures.results(name)
    ours, stock = pick(results, cache="lambda"), pick(results, cache="window")
    depth = max(r.contender.depth for r in ours)
    at_window = pick(ours, depth=depth)
    window = at_window[0].contender.window
    answers = [compare(f"{shape}: decode, full window of {window}, against better stock at {window}", at_window, stock)]
    empty, stock_empty = pick(ours, depth=0), pick(results, cache="full", depth=0)
    if empty:
        answers.append(compare(f"{shape}: the same, against our own speed with an empty cache", at_window, empty))
        answers.append(compare(f"{shape}: empty caches, ours against stock", empty, stock_empty))
        limit = f"{shape}: if attention cost nothing: the faster empty cache against the better stock at {window}"
        answers.append(compare(limit, empty + stock_empty, stock))
    return answers


def huge_page_answers(figures: Figures, name: str, shape: str) -> list[Answer]:
    results = figures.results(name)
    ours = pick(results, cache="lambda")
    at_window = pick(ours, depth=max(r.contender.depth for r in ours))
    window = at_window[0].contender.window
    question = f"{shape}: decode, full window of {window}, all memory of both in huge pages"
    return [compare(question, at_window, pick(results, cache="window"))]


def q8_0_answers(figures: Figures, name: str) -> list[Answer]:
    results = figures.results(name)
    ours = pick(results, cache="lambda")
    q8_0, f16 = pick(ours, kv_type="q8_0"), pick(ours, kv_type="f16")
    window = f16[0].contender.window
    return [
        compare(f"Llama-3.2-1B: decode, full window of {window}, our q8_0 KV against our f16 KV", q8_0, f16),
        compare("the same, our q8_0 KV against stock with q8_0 KV", q8_0, pick(results, cache="window")),
    ]


def position_answers(figures: Figures, name: str) -> list[Answer]:
    results = figures.results(name)
    full = pick(results, cache="full")
    depth = max(r.contender.depth for r in full)
    ours, stock = pick(results, cache="lambda", depth=depth), pick(full, depth=depth)
    if not ours:
        return []
    question, a, b, quotient = compare(f"Llama-3.2-1B: decode at position {depth}, against full attention", ours, stock)
    sizes = [f"{human_bytes(fastest(side).kv_bytes)} of KV" for side in (ours, stock)]
    less = fastest(stock).kv_bytes / fastest(ours).kv_bytes
    return [(question, f"{a}, {sizes[0]}", f"{b}, {sizes[1]}", f"{quotient}, {less:.2f} times less KV memory")]


def far_answers(figures: Figures, name: str) -> list[Answer]:
    near, far = sorted(figures.results(name), key=lambda r: r.contender.depth)
    depths = near.contender.depth, far.contender.depth
    return [compare(f"Llama-3.2-1B: decode at position {depths[1]:,}, against position {depths[0]:,}", [far], [near])]


def prefill_answers(figures: Figures, name: str) -> list[Answer]:
    results = figures.results(name)
    ours = pick(results, cache="lambda")
    deep = pick(ours, depth=max(r.contender.depth for r in ours))
    c = deep[0].contender
    question = f"Llama-3.2-1B: prefill, pp{c.n_tokens} at a full window of {c.window}, against better stock"
    return [compare(question, deep, pick(results, cache="window"))]


def sink_answers(figures: Figures, name: str) -> list[Answer]:
    results = figures.results(name)
    full = [r for r in results if r.contender.depth]
    (with_sinks,) = (r for r in full if r.contender.n_global)
    (without,) = pick(full, n_global=0)
    (empty,) = pick(results, depth=0)
    shares = []
    for a, b, c in zip(*(r.tokens_per_second for r in (with_sinks, without, empty)), strict=True):
        attention = 1 / a - 1 / c  # seconds per token
        shares.append((1 / a - 1 / b) / attention)
    low, _, high = statistics.quantiles(shares, n=4)
    n = with_sinks.contender.n_global
    return [
        (
            f"Share of the sinks in attention time, n_global = {n}",
            f"{1000 / with_sinks.median:.2f} ms per token with, {1000 / without.median:.2f} ms without sinks",
            f"{1000 / empty.median:.2f} ms with an empty cache",
            f"**{statistics.median(shares):.1%}** (middle half of {len(shares)} rounds: {low:.1%} – {high:.1%})",
        )
    ]


ANSWERS: dict[str, Callable[[Figures, str], list[Answer]]] = {
    "decode-llama-3.2-1b": lambda figures, name: decode_answers(figures, name, "Llama-3.2-1B"),
    "decode-llama-3.2-1b-q8_0": q8_0_answers,
    "decode-qwen3-0.6b": lambda figures, name: decode_answers(figures, name, "Qwen3-0.6B"),
    "decode-llama-2-7b": lambda figures, name: decode_answers(figures, name, "Llama-2-7B"),
    "huge-pages-llama-3.2-1b": lambda figures, name: huge_page_answers(figures, name, "Llama-3.2-1B"),
    "huge-pages-llama-2-7b": lambda figures, name: huge_page_answers(figures, name, "Llama-2-7B"),
    "positions": position_answers,
    "far": far_answers,
    "prefill": prefill_answers,
    "sinks": sink_answers,
}

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
    "made-up-cells": "Qwen3-0.6B, cells made up and cells computed",
}


# --- sections ---------------------------------------------------------------------------------------------------------


def summary(figures: Figures) -> str:
    answers = [answer for name, ask in ANSWERS.items() if name in figures for answer in ask(figures, name)]
    return "## In short\n\n" + table(["", "ours", "other", "ratio"], answers, 1).replace("---:", "---")


def latency_section(figures: Figures) -> str:
    if "latency" not in figures:
        return ""
    record = figures.records["latency"]
    c, latency = record["contender"], record["latency"]
    rows = []
    for what, seconds in (("decoding", latency), ("always the same work, one thread", latency["control"])):
        milliseconds = [f"{1000 * seconds[name]:.2f} ms" for name in ("median", "p99", "max")]
        rows.append([what, *milliseconds, f"{seconds['p99'] / seconds['median']:.2f} ×"])
    return (
        "## Time between tokens\n\n"
        f"`nano`, {latency['n_tokens']:,} tokens decoded one after the other in one stream, window {c['window']}, "
        f"{record['n_threads']} threads; the positions were moved back {latency['n_rebase']} times meanwhile. "
        "The second line is as many equal pieces of work, done in turn with the tokens: what the machine adds by "
        "itself.\n\n" + table(["", "median", "p99", "max", "p99 / median"], rows, 1)
    )


def positions_section(figures: Figures) -> str:
    if "positions" not in figures:
        return ""
    results = figures.results("positions")
    rows = []
    for depth in sorted({r.contender.depth for r in results if r.contender.cache != "window"}):
        ours, full = (pick(results, cache=cache, depth=depth) for cache in ("lambda", "full"))
        cells = [f"{depth:,}"]
        for side in (ours, full):
            cells += [speed(fastest(side)), human_bytes(fastest(side).kv_bytes)] if side else ["–", "–"]
        cells.append(times(ratio(fastest(ours), fastest(full))) if ours and full else "–")
        rows.append(cells)
    header = ["stream position", "Λ, t/s", "Λ, KV size", "full attention, t/s", "full attention, KV size", "ratio"]
    return (
        f"## Speed and memory by stream position\n\n![decode speed by stream position](performance/{PLOT})\n\n"
        "Llama-3.2-1B, Q4_0, f16 KV; of each side the faster of without and with flash attention.\n\n"
        + table(header, rows, 0)
    )


def memory_section(figures: Figures) -> str:
    """How far decoding is from the speed at which memory can be read."""
    if "bandwidth" not in figures or "decode-llama-3.2-1b" not in figures:
        return ""
    bandwidth = statistics.median(figures.records["bandwidth"]["bytes_per_second"])
    record = figures.records["decode-llama-3.2-1b"]
    results = figures.results("decode-llama-3.2-1b")
    ours = pick(results, cache="lambda")
    (full,) = [r for r in ours if r.contender.depth]
    (empty,) = pick(ours, depth=0)
    stock = pick(results, cache="window")
    read = stock[0].kv_bytes  # stock allocates the cells of the window and no more
    attention = 1 / full.median - 1 / empty.median
    n_weights = record["model"]["n_bytes"]
    rows = [
        ["weights, once per token", human_bytes(n_weights), f"{1000 * n_weights / bandwidth:.1f} ms",
         f"{1000 / empty.median:.1f} ms (a whole token, empty cache)"],
        ["K and V of the window", human_bytes(read), f"{1000 * read / bandwidth:.1f} ms",
         f"{1000 * attention:.1f} ms (what a full window adds)"],
        ["both", human_bytes(n_weights + read), f"{1000 * (n_weights + read) / bandwidth:.1f} ms",
         f"{1000 / full.median:.1f} ms"],
    ]  # fmt: skip
    return (
        "## How far from memory's speed\n\n"
        f"{record['n_threads']} processes that do nothing but add up numbers read {bandwidth / 1e9:.1f} GB/s together. "
        "Llama-3.2-1B, Q4_0, f16 KV, decode at a full window:\n\n"
        + table(["", "bytes", "at that speed", "measured"], rows, 1)
        + f"\nThat is {(n_weights + read) / bandwidth * full.median:.0%} of memory's speed. All of it would be "
        f"{bandwidth / (n_weights + read) / fastest(stock).median:.2f} times the speed of the better stock here.\n"
    )


def details(figures: Figures) -> str:
    parts = ["## All figures\n"]
    for name, title in TITLES.items():
        if name not in figures:
            continue
        record = figures.records[name]
        model = record["model"]
        parts.append(
            f"### {title}\n\n"
            f"{model['n_params'] / 1e6:,.0f} M weights, {human_bytes(model['n_bytes'])} ({model['weights'].upper()}), "
            f"{record['n_threads']} threads, {record['n_rounds']} rounds, {record['seconds']:.0f} s. "
            f"[{name}.json](performance/{name}.json)\n\n" + results_table(figures.results(name))
        )
    return "\n".join(parts)


def machine_section(figures: Figures) -> str:
    lines = ["## What it was measured on\n"]
    seen: dict[tuple[str, ...], list[str]] = {}
    for name, record in figures.records.items():
        machine = record["machine"]
        compilers, build = machine["compiler"], machine["build"] or {}
        shown = ("CMAKE_BUILD_TYPE", "CMAKE_CXX_FLAGS_RELEASE", "GGML_NATIVE")
        flags = ", ".join(f"{key}={build[key]}" for key in shown if key in build)
        facts = (
            f"{machine['cpu']}, {machine['n_cores']} cores ({' '.join(machine['features'])}), "
            f"{human_bytes(machine['memory_bytes'] or 0)} of memory, {machine['system']}",
            f"{record['n_threads']} threads, OMP_WAIT_POLICY {machine['omp_wait_policy'] or 'not set'}; "
            f"1-minute load average before: {machine['load_before']:.2f}",
            f"ours: {compilers['ours'] or 'compiler not known'}; stock: {compilers['stock'] or 'compiler not known'}; "
            + (f"the same CMake flags and ggml options ({flags})" if flags else "build settings not known"),
            f"ggml: {record['system']['ours'].rstrip(' |')}",
            f"{machine['upstream']}, commit {machine['commit'] or 'not known'}, Python {machine['python']}",
        )
        seen.setdefault((machine["date"], *facts), []).append(name)
    for (date, *lines_), names in seen.items():
        lines.append(f"{date}{': ' + ', '.join(names) if len(seen) > 1 else ''}\n")
        lines += [f"- {line}" for line in lines_]
        lines.append("")
    return "\n".join(lines)


def commands(figures: Figures) -> str:
    return (
        "## Again\n\n```sh\n"
        "make bench                                  # all of it\n"
        "make bench ARGS='--only positions'          # one experiment\n"
        "make bench-report                           # this page from the figures\n"
        "lminf-edge bench --shape llama-3.2-1b       # anywhere: the feature on and off; --stock-lib DIR for stock\n"
        f"```\n\nExperiments: {', '.join(f'`{name}`' for name in figures.records)}.\n"
    )


def made_up_sentence(figures: Figures) -> str:
    if "made-up-cells" not in figures:
        return ""
    results = figures.results("made-up-cells")
    sentences = []
    for made_up in pick(results, prefilled=False):
        c = made_up.contender
        (real,) = pick(results, prefilled=True, cache=c.cache, flash_attn=c.flash_attn)
        sentences.append(f"{who(made_up)} at d{c.depth} {times(ratio(made_up, real)).replace('*', '')}")
    return "\n- Speed with made-up cells over speed with computed ones, Qwen3-0.6B: " + "; ".join(sentences) + "."


def page(figures: Figures, gpu: str) -> str:
    minutes = sum(record["seconds"] for record in figures.records.values()) / 60
    n_threads = max(record["n_threads"] for record in figures.records.values())
    sections = [
        HEAD.format(minutes=f"{minutes:.0f} minutes"),
        summary(figures),
        positions_section(figures),
        latency_section(figures),
        memory_section(figures),
        gpu,
        METHOD.format(n_computed=32, made_up=made_up_sentence(figures)),
        machine_section(figures),
        NOT_RUN.format(n_threads=n_threads, gpus=OTHER_GPUS if gpu else NO_CUDA + OTHER_GPUS),
        commands(figures),
        details(figures),
    ]
    return "\n".join(section for section in sections if section)


# --- plot -------------------------------------------------------------------------------------------------------------


def plot(figures: Figures, path: Path) -> None:
    """Decode speed against stream position. Raises ImportError, in one sentence, without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ImportError("The plot needs matplotlib: pip install 'lminf-edge[plot]'.") from None
    results = figures.results("positions")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")

    def line(side: Sequence[Result], label: str, colour: str, style: str = "-o") -> None:
        """The faster setting at each position; position 0 is drawn at 256, as the axis is logarithmic."""
        depths = sorted({r.contender.depth for r in side})
        best = [fastest(pick(side, depth=depth)) for depth in depths]
        x = [max(depth, 256) for depth in depths]
        axes.plot(x, [r.median for r in best], style, color=colour, label=label, markersize=4)
        low = [min(r.tokens_per_second) for r in best]
        axes.fill_between(x, low, [max(r.tokens_per_second) for r in best], color=colour, alpha=0.15, linewidth=0)

    ours, full, window = (pick(results, cache=cache) for cache in ("lambda", "full", "window"))
    c = window[0].contender
    line(ours, f"Λ, {c.n_global} + {c.window - c.n_global}", "tab:blue")
    line(full, "stock, full attention", "tab:red")
    line(window, f"stock, n_ctx {c.window}, at its end", "tab:green", "s")
    axes.set_xscale("log", base=2)
    ticks = sorted({max(r.contender.depth, 256) for r in results if r.contender.cache != "window"})
    axes.set_xticks(ticks, [_position(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("stream position, tokens")
    axes.set_ylabel("tokens per second")
    axes.set_title("Decode speed, Llama-3.2-1B shape, Q4_0, f16 KV", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})  # the same bytes for the same figures
    pyplot.close(figure)


def _position(tick: int) -> str:
    if tick < 1024:
        return "0" if tick == 256 else str(tick)
    return f"{tick // 1024}k" if tick < 1_000_000 else "1M"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--figures", metavar="DIR", type=Path, default=ROOT / "docs" / "performance")
    parser.add_argument("--page", metavar="FILE", type=Path, default=ROOT / "docs" / "performance.md")
    args = parser.parse_args()
    try:
        figures = Figures(args.figures)
        if not figures.records:
            raise ValueError(f"There are no figures in {args.figures}: make bench measures them.")
        if "positions" in figures:
            plot(figures, args.figures / PLOT)
        args.page.write_text(page(figures, gpu_report.section(args.figures / "cuda", table)))
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
