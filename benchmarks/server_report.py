"""Writes docs/server-performance.md from the figures that benchmarks/server_speed.py measured.

    make bench-server-report, or: .venv/bin/python benchmarks/server_report.py [--figures DIR] [--page FILE]

Every number of the page comes from those files; only the words around them are here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import ROOT
from report import Figures, table

from lminf_edge.cli.common import human_bytes

Record = dict[str, Any]

HEAD = """# Performance of the server

Written by `benchmarks/server_report.py` from what `benchmarks/server_speed.py` measured: do not edit.
`make bench-server` measures again, `make bench-server-report` rewrites this page.

Each figure, but for several conversations at a time, is from a real `lminf-edge serve` and clients that send the whole
history with every turn, as chat front ends do. Figures are medians, with (least – most); ratios are taken within a
round. The model is `nano` unless another is named: where the model takes almost no time, what the server itself takes
shows most.
"""


def spread(value: Record, form: str = "{:.1f}", unit: str = "", factor: float = 1) -> str:
    """Median (least – most)."""
    median, least, most = (form.format(factor * value[name]) for name in ("median", "least", "most"))
    return f"{median}{unit} ({least} – {most})"


def milliseconds(value: Record) -> str:
    return spread(value, unit=" ms", factor=1000)


def times(value: Record) -> str:
    return spread(value, "{:.2f}", " ×")


def met(is_met: bool) -> str:
    return "met" if is_met else "**not met**"


# --- sections ---------------------------------------------------------------------------------------------------------


def first_token(record: Record) -> str:
    rows = []
    for model in record["models"]:
        short, long = (f"{each['tokens']:,}" for each in model["conversations"])
        for turn in model["turns"]:
            seconds = list(turn["seconds"].values())
            rows.append(
                [
                    f"`{model['model']}`",
                    f"{turn['n_words']} words, {turn['tokens_read']['median']:.0f} tokens",
                    f"{short}: {milliseconds(seconds[0])}",
                    f"{long}: {milliseconds(seconds[1])}",
                    times(turn["ratio"]),
                    f"{turn['ratio_of_medians']:.2f} ×",
                    met(turn["ratio_of_medians"] <= 1.2),
                ]
            )
    header = ["", "the new message", "tokens of the history: first text", "", "ratio", "of the medians", "target"]
    return (
        "## The first token of the next turn\n\n"
        "From the moment the request is sent until the first text arrives, in a short conversation and in a long one "
        f"by turns, window {record['models'][0]['window']}, one thread. Target: 1.2 times at most, by the medians.\n\n"
        + table(header, rows)
        + "\nWhat a longer history adds is its way through the socket, JSON, the template and the search for tokens "
        "already known; none of it is read by the model.\n" + loaded(record)
    )


def loaded(record: Record) -> str:
    """A warning if other programs had the machine meanwhile."""
    busy = record.get("load", 0) > record["cores"] + 0.5
    return f"\nThe machine was not idle: {record['load']:.1f} programs wanted its cores.\n" if busy else ""


def unseen(record: Record) -> str:
    rows = []
    for model in record["models"]:
        for run in model["runs"]:
            rows.append(
                [
                    f"`{model['model']}`, window {model['window']}",
                    f"{run['tokens']['median']:,.0f}",
                    f"{run['processed']['median']:,.0f}",
                    milliseconds(run["seconds"]),
                ]
            )
        rows[-2] += ["", "", ""]
        ratio = model["ratio_of_medians"]
        rows[-1] += [times(model["ratio"]), f"{ratio:.2f} ×", met(ratio <= 1.3)]
    return (
        "## A history that was never seen\n\n"
        "First text of the first answer of a new process, one thread, by turns: of a long history the model processes "
        "the sinks and the last two windows. Target: 1.3 times a history of three windows at most, by the medians.\n\n"
        + table(["", "tokens of the history", "processed", "first text", "ratio", "of the medians", "target"], rows)
        + "\nWhat a long history adds is that it is cut into tokens, all of it: for a model as small as `nano` that is "
        "more than the two windows take.\n" + loaded(record)
    )


def cold(record: Record) -> str:
    rows = [
        [
            f"{each['tokens']:,} tokens",
            milliseconds(each["hot_seconds"]),
            milliseconds(each["cold_seconds"]),
            f"{1000 * each['read_seconds']['median']:.2f} ms",
            times(each["of_limit"]),
            f"{each['state_bytes']:,}",
            f"{each['n_states']}",
        ]
        for each in record["conversations"]
    ]
    first, last = record["conversations"]
    per_token = (last["state_bytes"] - first["state_bytes"]) / (last["tokens"] - first["tokens"])
    is_met = all(each["of_limit"]["median"] < 1 for each in record["conversations"])
    size = (
        "as large at both lengths"
        if abs(per_token) < 0.005
        else f"larger by {per_token:.2f} bytes for each token of history"
    )
    header = [
        "conversation",
        "hot",
        "cold",
        "reading the file",
        "cold / (2 hot + reading)",
        "largest file, bytes",
        "files",
    ]
    return (
        "## A conversation comes back from its file\n\n"
        "First token of a turn of 12 words, in a conversation that is in the context (hot) and in one that is in a "
        f"file only (cold). Target: less than twice the hot time and the time to read the file: {met(is_met)}.\n\n"
        + table(header, rows)
        + f"\nA file is {size}. The number of files, here those of two conversations, grows with the logarithm of a "
        "history's length.\n"
    )


def memory(record: Record) -> str:
    budget, before = record["budget_bytes"], record["before"]
    rows = [
        [
            str(i + 1),
            human_bytes(sample["accounted"]),
            human_bytes(sample["resident"] - before["resident"] + before["accounted"]),
            f"{100 * share:.1f} %",
        ]
        for i, (sample, share) in enumerate(zip(record["samples"], record["over_budget"], strict=True))
    ]
    last = record["over_budget"][-1]
    return (
        "## Memory\n\n"
        f"{record['conversations']} conversations in turn, 4 of them in the context, with `--memory` "
        f"{human_bytes(budget)} and no disk. What the process has taken since the first conversations, against what "
        "it accounts for. Target: what the budget says, within 5 %: "
        f"{met(abs(last - 1) <= 0.05)} ({100 * last:.1f} %).\n\n"
        + table(["round", "accounted for", "taken", "of the budget"], rows)
        + f"\nAt the end {record['remembered']:.0f} conversations are remembered; the others were forgotten to stay "
        "within the budget.\n"
    )


def parallel(record: Record) -> str:
    rows = [
        [
            f"{each['weights']}, {human_bytes(each['n_bytes'])}",
            spread(each["one"]),
            spread(each["four"]),
            times(each["ratio"]),
            met(each["ratio"]["median"] >= 1.8),
            times(each["stock_ratio"]),
        ]
        for each in record["weights"]
    ]
    return (
        "## Several conversations at a time\n\n"
        "Tokens per second in all, of random weights in the shape of Llama-3.2-1B with a window of "
        f"{record['weights'][0]['window']}, in the engine, {record['n_threads']} threads. Target: four conversations "
        "at least 1.8 times one.\n\n"
        + table(["weights", "one", "four", "ratio", "target", "stock, batches of 4 tokens and of 1"], rows)
        + "\nThe last column is llama.cpp's own full attention with the same weights, without conversations or an "
        "engine: what its matrix products gain by reading the weights once for four tokens, on these cores.\n"
    )


def mixed(record: Record) -> str:
    first, after = record["first_token"], record["resident_after_5_minutes"]
    growth = after["most"] / after["least"] - 1
    rows = [
        ["turns", f"{record['turns']:,}"],
        ["turns whose client hung up", f"{record['cancelled']:.0f}"],
        ["errors, beside those provoked", f"{record['n_errors']}"],
        ["tokens of prompts that were known", f"{100 * record['cached']:.1f} %"],
        ["restored from a checkpoint", f"{record['restored']:.0f}, {record['restored_from_files']:.0f} from files"],
        ["first token, median", f"{first['median']:.2f} s"],
        ["first token, 99 of 100 within", f"{first['p99']:.2f} s"],
        ["first token, longest", f"{first['most']:.2f} s"],
    ]
    minutes = [5 * i for i in range(int(record["minutes"] // 5) + 1)]
    nearest = [min(record["samples"], key=lambda sample: abs(sample["minute"] - minute)) for minute in minutes]
    return (
        "## A mixed load\n\n"
        f"{record['clients']} clients at once for {record['minutes']:g} minutes, four slots: they talk, in "
        "messages of 5 to 1,500 words, regenerate, edit, hang up, begin anew and send wrong requests. Targets: no "
        f"error but those provoked: {met(record['n_errors'] == 0)}; memory flat after the first 5 minutes, within 2 %: "
        f"{met(growth <= 0.02)} ({100 * growth:.1f} %).\n\n"
        + table(["", ""], rows)
        + "\n"
        + table(["minute", *map(str, minutes)], [["memory", *(human_bytes(each["resident"]) for each in nearest)]])
        + loaded(record)
    )


SECTIONS: dict[str, Callable[[Record], str]] = {
    "first_token": first_token,
    "unseen": unseen,
    "cold": cold,
    "memory": memory,
    "parallel": parallel,
    "mixed": mixed,
}


def machine_section(records: dict[str, Record]) -> str:
    lines = ["## What it was measured on\n"]
    for name, record in records.items():
        machine = record["machine"]
        facts = (
            machine["cpu"],
            f"{record['cores']} of {machine['n_cores']} cores for server and clients together",
            machine["system"],
            f"Python {machine['python']}",
            machine["upstream"],
            f"commit {machine['commit'] or 'not known'}",
        )
        lines.append(f"- `{name}`, {machine['date']}, {record['seconds']:.0f} s: {', '.join(facts)}")
    return "\n".join(lines) + "\n"


def page(records: dict[str, Record]) -> str:
    sections = [make(records[name]) for name, make in SECTIONS.items() if name in records]
    return "\n".join([HEAD, *sections, machine_section(records)])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--figures", metavar="DIR", type=Path, default=ROOT / "docs" / "server-performance")
    parser.add_argument("--page", metavar="FILE", type=Path, default=ROOT / "docs" / "server-performance.md")
    args = parser.parse_args()
    records = Figures(args.figures).records
    if not records:
        print(f"error: There are no figures in {args.figures}: make bench-server measures them.", file=sys.stderr)
        return 1
    args.page.write_text(page(records), encoding="utf-8")
    print(f"wrote {args.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
