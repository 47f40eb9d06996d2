"""Fills docs/server-performance.md with the figures of benchmarks/server_speed.py.

make bench-server-report, or: .venv/bin/python benchmarks/server_report.py [--figures DIR] [--page FILE]
"""

from __future__ import annotations

import sys

import pages
from pages import Record, block, machines, table

from lminf_edge.cli.common import human_bytes


def spread(value: Record, form: str = "{:.1f}", unit: str = "", factor: float = 1) -> str:
    return pages.spread([factor * value[name] for name in ("median", "least", "most")], form, unit)


def milliseconds(value: Record) -> str:
    return spread(value, unit=" ms", factor=1000)


def seconds_of(value: Record) -> str:
    return spread(value, "{:.2f}", " s")


def times(value: Record) -> str:
    return spread(value, "{:.2f}", " ×")


def met(is_met: bool) -> str:
    return "met" if is_met else "**not met**"


def loaded(record: Record) -> str:
    """A warning if other programs had the machine meanwhile."""
    busy = record.get("load", 0) > record["cores"] + 0.5
    return f"\nThe machine was not idle: {record['load']:.1f} programs wanted its cores.\n" if busy else ""


# --- blocks -----------------------------------------------------------------------------------------------------------


def first_token(record: Record) -> str:
    rows = []
    for model in record["models"]:
        lengths = [f"{each['tokens']:,}" for each in model["conversations"]]
        for turn in model["turns"]:
            firsts = zip(lengths, turn["seconds"].values(), strict=True)
            rows.append([
                f"`{model['model']}`, window {model['window']}",
                f"{turn['n_words']} words, {turn['tokens_read']['median']:.0f} tokens",
                *(f"{n}: {milliseconds(seconds)}" for n, seconds in firsts),
                times(turn["ratio"]), f"{turn['ratio_of_medians']:.2f} ×", met(turn["ratio_of_medians"] <= 1.2),
            ])  # fmt: skip
    header = ["", "the new message", "tokens of the history: first text", "", "ratio", "of the medians", "target"]
    return table(header, rows) + loaded(record)


def agent(record: Record) -> str:
    rows = []
    for model in record["models"]:
        ratio = model["ratio_of_medians"]
        turns = zip(model["turns"], model["sessions"], strict=True)
        rows.append([
            f"`{model['model']}`, window {model['window']}, {model['n_threads']} threads",
            f"{model['sessions'][0]['tokens_read']['median']:,.0f} tokens",
            *(f"turn {n}, {each['tokens']:,} tokens: {seconds_of(each['seconds'])}" for n, each in turns),
            times(model["ratio"]), f"{ratio:.2f} ×", met(ratio <= 1.2),
        ])  # fmt: skip
    return table(["", "read per turn", "first text", "", "ratio", "of the medians", "target"], rows) + loaded(record)


def unseen(record: Record) -> str:
    rows = []
    for model in record["models"]:
        ratio = model["ratio_of_medians"]
        ends = (["", "", ""], [times(model["ratio"]), f"{ratio:.2f} ×", met(ratio <= 1.3)])
        for run, end in zip(model["runs"], ends, strict=True):
            counts = [f"{run[name]['median']:,.0f}" for name in ("tokens", "processed")]
            name = f"`{model['model']}`, window {model['window']}"
            rows.append([name, *counts, milliseconds(run["seconds"]), *end])
    header = ["", "tokens of the history", "processed", "first text", "ratio", "of the medians", "target"]
    return table(header, rows) + loaded(record)


def cold(record: Record) -> str:
    rows = [
        [
            f"{each['tokens']:,} tokens", milliseconds(each["hot_seconds"]), milliseconds(each["cold_seconds"]),
            f"{1000 * each['read_seconds']['median']:.2f} ms", times(each["of_limit"]),
            met(each["of_limit"]["median"] < 1), f"{each['state_bytes']:,}", f"{each['n_states']}",
        ]
        for each in record["conversations"]
    ]  # fmt: skip
    header = ["conversation", "hot", "cold", "reading the file", "cold / (2 hot + reading)", "target"]
    return table([*header, "largest file, bytes", "files"], rows)


def memory(record: Record) -> str:
    before, budget = record["before"], human_bytes(record["budget_bytes"])
    rows = []
    for i, (sample, share) in enumerate(zip(record["samples"], record["over_budget"], strict=True)):
        taken = human_bytes(sample["resident"] - before["resident"] + before["accounted"])
        rows.append([str(i + 1), human_bytes(sample["accounted"]), taken, f"{100 * share:.1f} %"])
    return (
        f"{record['conversations']} conversations in turn, `--memory` {budget}; {record['remembered']:.0f} of them are "
        f"remembered at the end. Target: {met(abs(record['over_budget'][-1] - 1) <= 0.05)}.\n\n"
        + table(["round", "accounted for", "taken", "of the budget"], rows)
    )


def parallel(record: Record) -> str:
    rows = [
        [
            f"{each['weights']}, {human_bytes(each['n_bytes'])}, window {each['window']}, "
            f"{record['n_threads']} threads",
            spread(each["one"]), spread(each["four"]), times(each["ratio"]), met(each["ratio"]["median"] >= 1.8),
            times(each["stock_ratio"]),
        ]
        for each in record["weights"]
    ]  # fmt: skip
    return table(["weights", "one", "four", "ratio", "target", "stock, batches of 4 tokens and of 1"], rows)


def hostile(record: Record) -> str:
    rows = []
    for each in record["requests"]:
        before, during = each["before"], each["during"]
        rows.append([
            each["request"], str(each["status"]), f"{each['seconds']:.2f} s",
            *(f"{1000 * gaps['p99']:.0f} ms, {1000 * gaps['most']:.0f} ms" for gaps in (before, during)),
            f"{during['p99'] / before['p99']:.2f} ×", met(during["p99"] <= 2 * before["p99"]),
        ])  # fmt: skip
    header = ["request", "status", "answered in", "gaps before: p99, longest", "meanwhile", "ratio of p99", "target"]
    return table(header, rows) + loaded(record)


def mixed(record: Record) -> str:
    first, after = record["first_token"], record["resident_after_5_minutes"]
    growth = after["most"] / after["least"] - 1
    rows = [
        ["clients, minutes", f"{record['clients']}, {record['minutes']:g}"],
        ["turns", f"{record['turns']:,}"],
        ["turns whose client hung up", f"{record['cancelled']:.0f}"],
        ["errors, beside those provoked", f"{record['n_errors']}: {met(record['n_errors'] == 0)}"],
        ["growth of memory after the first 5 minutes", f"{100 * growth:.1f} %: {met(growth <= 0.02)}"],
        ["tokens of prompts that were known", f"{100 * record['cached']:.1f} %"],
        ["restored from a checkpoint", f"{record['restored']:.0f}, {record['restored_from_files']:.0f} from files"],
        ["first token, median", f"{first['median']:.2f} s"],
        ["first token, 99 of 100 within", f"{first['p99']:.2f} s"],
        ["first token, longest", f"{first['most']:.2f} s"],
    ]
    minutes = [5 * i for i in range(int(record["minutes"] // 5) + 1)]
    nearest = [min(record["samples"], key=lambda sample: abs(sample["minute"] - minute)) for minute in minutes]
    sizes = ["memory", *(human_bytes(each["resident"]) for each in nearest)]
    return table(["", ""], rows) + "\n" + table(["minute", *map(str, minutes)], [sizes]) + loaded(record)


SECTIONS = (first_token, agent, unseen, cold, memory, parallel, hostile, mixed)
BLOCKS: dict[str, pages.Block] = {
    **{make.__name__: block(make.__name__, make) for make in SECTIONS},
    "machines": machines,
}

if __name__ == "__main__":
    sys.exit(pages.main("server-performance", BLOCKS, "make bench-server"))
