"""Hides a fact in a long text and asks for it at the end: by length of the text and place of the fact.

The fact is a five-digit number, or what --task says. Models with a chat template are asked by it. Decoding is greedy;
the first number of an answer has to be the right one, and a word has to occur in it. A fact "in reach" is one that can
still be attended to until the answer ends: in the window, or among the first n_global tokens. With --blind nothing is
told: what is right then was guessed.

Ctrl-C ends the measurement and prints the results so far.

--json prints
  task, blind, lengths, depths, trials (prompts per cell)
  window     {"n_global", "n_local", "max_distance"}
  recall     what the policy of that name recalls, in the names of LMInfConfig; null if it is not among them
  recall_last  of a prompt, the tokens at its end that recall; null: all
  policies   {"lminf": {"trials", "correct", "accuracy", "cells"}, ...}, where cells are
             [{"length", "depth" (0..1), "trials" (answers: a prompt may ask for several), "correct", "accuracy",
             "in_reach" (share of the trials), "correct_in_reach" (how many of those were right)}, ...]
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lminf_edge.cli.common import (
    CommandError,
    check_output,
    load,
    model_header,
    print_json,
    read_text,
    require_vocabulary,
)
from lminf_edge.cli.demo import python_documentation
from lminf_edge.cli.options import add_compute, add_model, add_window
from lminf_edge.cli.policies import EPILOG as POLICIES_EPILOG
from lminf_edge.cli.policies import policies, set_up
from lminf_edge.cli.ppl import INTERRUPTED
from lminf_edge.cli.progress import Progress
from lminf_edge.cli.values import expand_home, file_path, number, whole_number
from lminf_edge.config import Window
from lminf_edge.evaluate.passkey import MAX_ANSWER, Cell, measure
from lminf_edge.evaluate.policies import POLICIES, recall_of
from lminf_edge.evaluate.prompts import Prompts
from lminf_edge.evaluate.tasks import TASKS
from lminf_edge.models import embedded_models

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

EPILOG = (
    "tasks:\n" + "\n".join(f"  {name:<15} {task.summary}" for name, task in TASKS.items()) + f"\n\n{POLICIES_EPILOG}"
)
HELP = "what the model can retrieve from a long text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--policies",
        metavar="P,...",
        type=policies,
        default=[POLICIES["full"], POLICIES["lminf"]],
        help="all that there are for the model, or some of the policies below; default full,lminf",
    )
    parser.add_argument(
        "--lengths",
        metavar="N,...",
        type=_lengths,
        help="tokens of a prompt; default: a half, one, two and four times the window",
    )
    parser.add_argument(
        "--depths",
        metavar="P,...",
        type=_depths,
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        help="where the fact is told, in percent of the text before it; default 0,25,50,75,100",
    )
    parser.add_argument("--trials", metavar="N", type=whole_number(1), default=5, help="for each of them; default 5")
    parser.add_argument(
        "--task",
        "--template",
        choices=TASKS,
        metavar="T",
        help="what is hidden, of the tasks below; default: prose for an embedded model, else paper",
    )
    parser.add_argument("--blind", action="store_true", help="do not tell the fact, to see how much is guessed")
    parser.add_argument(
        "-f",
        "--file",
        metavar="FILE",
        type=expand_home,
        help="UTF-8 text around the fact, - for stdin; default: Python's documentation; not with the task paper",
    )
    parser.add_argument(
        "--full-tokens",
        metavar="N",
        type=whole_number(1),
        help="full attention is given no prompts longer than N tokens; default: all",
    )
    parser.add_argument(
        "--recall-last",
        metavar="N",
        type=whole_number(1),
        help="of a prompt only the last N tokens recall, and the answer: long texts are read much faster; default: all",
    )
    parser.add_argument("--seed", metavar="N", type=whole_number(0), default=0, help="of facts and places; default 0")
    parser.add_argument("--plot", metavar="FILE", type=file_path, help="draw heat maps: .png, .svg or .pdf")
    add_window(parser)
    add_compute(parser, stock=False)


def _lengths(text: str) -> list[int]:
    parse = whole_number(1)
    return sorted({parse(part) for part in text.split(",")})


def _depths(text: str) -> list[float]:
    parse = number(0, 100)
    return sorted({parse(part) / 100 for part in text.split(",")})


def run(args: argparse.Namespace) -> int:
    path, _ = model_header(args.model)
    if args.plot:
        from lminf_edge.evaluate.plots import check_plot

        check_output(args.plot)
        check_plot(args.plot)
    setup = set_up(args)
    args.policies = setup.able(args.policies)
    lengths = args.lengths or [setup.window.size * factor // 2 for factor in (1, 2, 4, 8)]
    most = args.full_tokens or max(lengths)
    asked = {policy.name: [n for n in lengths if policy.name != "full" or n <= most] for policy in args.policies}
    compared = [policy for policy in args.policies if asked[policy.name]]
    setup.check(compared, max(asked.get("full") or [0]) + MAX_ANSWER)
    task = args.task or ("prose" if args.model in embedded_models() else "paper")
    prose = "" if task == "paper" else read_text(args.file) if args.file else python_documentation()
    if task != "paper" and not prose.split():
        raise CommandError(f"{args.file} has no words in it.")

    cells: dict[str, list[Cell]] = {}
    status = 0
    with contextlib.closing(load(path, vocab_only=True)) as vocabulary:
        require_vocabulary(vocabulary)
        made = Prompts(vocabulary, task, prose, args.seed, args.blind)
        for length in lengths:
            made.prompt(length, 0.0, 0)  # says whether it is too short
        try:
            with Progress("cells") as progress:
                progress.expect(sum(map(len, asked.values())) * len(args.depths))
                for policy in compared:
                    cells[policy.name] = []
                    progress.begin(policy.name)
                    with setup.reader(policy, max(asked[policy.name]) + MAX_ANSWER) as reader:
                        for length in asked[policy.name]:
                            for depth in args.depths:
                                prompts = [made.prompt(length, depth, trial) for trial in range(args.trials)]
                                cells[policy.name].append(
                                    measure(reader, prompts, vocabulary.detokenize, length, depth, args.recall_last)
                                )
                                progress.at(len(cells[policy.name]))
        except KeyboardInterrupt:
            if not any(cells.values()):
                raise
            status = INTERRUPTED
    cells = {name: measured for name, measured in cells.items() if measured}

    if args.json:
        print_json(
            {
                "task": task,
                "blind": args.blind,
                "lengths": lengths,
                "depths": args.depths,
                "trials": args.trials,
                "window": _window_report(setup.window),
                "recall": recall_of(setup.window) if any(policy.recalls for policy in compared) else None,
                "recall_last": args.recall_last,
                "policies": {name: policy_report(measured) for name, measured in cells.items()},
            }
        )
    else:
        _print_tables(cells, lengths, args.depths, setup.window)
    if args.plot:
        from lminf_edge.evaluate.plots import plot_passkey

        window = f"window {setup.window.n_global} + {setup.window.n_local}"
        plot_passkey(args.plot, cells, f"{task.capitalize()}, {Path(args.model).stem}, {window}")
    return status


def _window_report(window: Window) -> dict[str, int]:
    return {"n_global": window.n_global, "n_local": window.n_local, "max_distance": window.max_distance}


def policy_report(cells: Sequence[Cell]) -> dict[str, Any]:
    """As --json prints it."""
    trials, correct = sum(cell.trials for cell in cells), sum(cell.correct for cell in cells)
    return {
        "trials": trials,
        "correct": correct,
        "accuracy": correct / trials,
        "cells": [
            {
                "length": cell.length,
                "depth": cell.depth,
                "trials": cell.trials,
                "correct": cell.correct,
                "accuracy": cell.accuracy,
                "in_reach": cell.in_reach,
                "correct_in_reach": cell.found,
            }
            for cell in cells
        ],
    }


def _print_tables(
    cells: dict[str, list[Cell]], lengths: Sequence[int], depths: Sequence[float], window: Window
) -> None:
    print(f"right answers; in brackets where most were out of reach of {window.n_global} + {window.n_local} tokens\n")
    for name, measured in cells.items():
        print(f"{name:<15} {'fact told at'}")
        print(f"{'tokens':>15} " + " ".join(f"{depth:>7.0%}" for depth in depths))
        for length in lengths:
            row = [cell for cell in measured if cell.length == length]
            if not row:
                continue
            print(f"{length:>15} " + " ".join(f"{_cell(cell):>7}" for cell in row))
        reachable, found = sum(cell.reachable for cell in measured), sum(cell.found for cell in measured)
        n_lost = sum(cell.trials for cell in measured) - reachable
        n_luck = sum(cell.correct for cell in measured) - found
        shares = [("in reach", found, reachable), ("out of reach", n_luck, n_lost)]
        print(f"{'':15} right {', '.join(f'{where} {right} of {all_}' for where, right, all_ in shares if all_)}\n")


def _cell(cell: Cell) -> str:
    return f"{cell.accuracy:.0%} " if cell.in_reach >= 0.5 else f"({cell.accuracy:.0%})"
