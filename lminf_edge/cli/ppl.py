"""Measures how well a model predicts a text, position by position.

The text is one stream: token i + 1 is predicted from tokens 0..i (from those the window leaves, without --stock) and
its loss is -log p in nats. BOS is put in front if the model wants it, and is not scored. Ctrl-C ends the measurement
and prints the results so far.

--json prints
  tokens     number of tokens scored: all but the first
  mean_nll   mean loss in nats per token; perplexity is exp(mean_nll)
  buckets    [{"start": s, "end": e, "mean_nll": x}, ...]: mean loss of tokens s + 1 .. e, --bucket tokens each
and with --policies
  policies   {"lminf": {"tokens", "mean_nll", "buckets", "stages"}, ...}: the same for each, on the same tokens;
             stages are mean losses: {"window_not_full", "window_full", "past_training"}, those that were reached
             with --kl also {"kl": {"stretches", "tokens", "mean_kl", "buckets": [{"start", "end", "mean_kl"}, ...]}}:
             KL(full attention || policy) of the predictions after tokens start .. end - 1 of a stretch, in nats
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lminf_edge.cli.common import (
    KV_TYPE_NUMBERS,
    CommandError,
    check_output,
    load,
    model_header,
    open_model,
    print_json,
    read_text,
    tokenize,
    weightless,
)
from lminf_edge.cli.curves import Curve, Stage, print_one, print_table, report, write_csv
from lminf_edge.cli.options import add_compute, add_model, add_window
from lminf_edge.cli.policies import EPILOG, Setup, policies, set_up
from lminf_edge.cli.progress import Progress
from lminf_edge.cli.values import expand_home, file_path, whole_number
from lminf_edge.evaluate.buckets import BucketMeans, even_edges, log_edges
from lminf_edge.evaluate.policies import POLICIES

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

HELP = "perplexity of a text, by position"

INTERRUPTED = 130

BUCKET = 512


@dataclass(frozen=True)
class Text:
    """The text: its tokens, the first n_bos of them BOS; a stream of n_tokens, repeated if need be."""

    tokens: Sequence[int]
    n_bos: int
    n_tokens: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("-f", "--file", metavar="FILE", type=expand_home, required=True, help="UTF-8 text, - for stdin")
    parser.add_argument("--tokens", metavar="N", type=whole_number(2), help="use only the first N tokens of the text")
    parser.add_argument("--repeat", action="store_true", help="repeat a text that ends before --tokens")
    parser.add_argument(
        "--bucket",
        metavar="N",
        type=_bucket,
        help=f"tokens per line of the result, or log: four lines for each power of two; default {BUCKET}, with "
        "--policies log",
    )
    group = parser.add_argument_group("comparing")
    group.add_argument(
        "--policies",
        metavar="P,...",
        type=policies,
        help="all that there are for the model, or some of the policies below, on the same tokens",
    )
    group.add_argument(
        "--full-tokens", metavar="N", type=whole_number(2), help="full attention stops after N tokens; default: all"
    )
    group.add_argument(
        "--kl",
        metavar="N",
        type=whole_number(1),
        help="with --policies, compare the predictions with those of full attention as well, in N stretches of the "
        "text that are as long as the training length",
    )
    group.add_argument("--csv", metavar="FILE", type=file_path, help="write policy, measure, start, end, mean as CSV")
    group.add_argument(
        "--plot",
        metavar="FILE",
        type=file_path,
        help="draw the loss by position: .png, .svg or .pdf (needs matplotlib)",
    )
    add_window(parser)
    add_compute(parser)


def _bucket(text: str) -> int | str:
    return text if text == "log" else whole_number(1)(text)


def run(args: argparse.Namespace) -> int:
    path, header = model_header(args.model)
    _check(args)
    # a model that cannot be used is refused before anything is asked of the text
    setup = set_up(args) if args.policies else None
    if setup is not None:
        args.policies = setup.able(args.policies)
        setup.check(args.policies, n_full=1)
    else:
        _check_alone(args, path, n_tokens=1)
    text = _read_tokens(args, path)

    window = None if setup is None else setup.window
    curves: dict[str, Curve] = {}
    status = 0
    try:
        with Progress() as progress:
            if setup is None:
                if args.stock:
                    _check_alone(args, path, text.n_tokens)
                progress.expect(text.n_tokens - 1)
                with contextlib.closing(open_model(args, n_ctx_stock=text.n_tokens)) as llm:
                    window = None if args.stock else llm.scheduler.window
                    _measure(curves, "full" if args.stock else "lminf", llm, text, args.bucket or BUCKET, progress)
            else:
                _compare(curves, args, setup, text, progress)
    except KeyboardInterrupt:
        if not any(curve.nll.count for curve in curves.values()):
            raise
        status = INTERRUPTED
    curves = {name: curve for name, curve in curves.items() if curve.nll.count}
    if not all(math.isfinite(curve.nll.mean) for curve in curves.values()):
        raise CommandError("The model's losses are not finite numbers: its weights are damaged.")

    reports = {name: report(curve, args.kl) for name, curve in curves.items()}
    if args.json:
        print_json({"policies": reports} if setup else next(iter(reports.values())))
    elif setup is None:
        print_one(next(iter(reports.values())))
    else:
        print_table(curves, args.kl)
    if args.csv:
        write_csv(args.csv, curves)
    if args.plot:
        from lminf_edge.evaluate.plots import plot_losses

        losses = {name: curve.nll.buckets() for name, curve in curves.items()}
        title, size = Path(args.model).stem, 0
        if window is not None:
            title += f", window {window.n_global} + {window.n_local}, {args.kv_type} KV"
            size = window.size
        plot_losses(args.plot, losses, header.n_ctx_train, size, title)
    return status


def _check(args: argparse.Namespace) -> None:
    """Checks the options before anything is measured. Raises CommandError."""
    if args.repeat and args.tokens is None:
        raise CommandError("--repeat needs --tokens: without it there is no end.")
    if args.policies is None:
        for name in ("full_tokens", "kl"):
            if getattr(args, name) is not None:
                raise CommandError(f"--{name.replace('_', '-')} needs --policies.")
    elif args.stock:
        raise CommandError("--stock is the policy full: give only one of --stock and --policies.")
    if args.csv:
        check_output(args.csv)
    if args.plot:
        from lminf_edge.evaluate.plots import check_plot

        check_output(args.plot)
        check_plot(args.plot)


def _check_alone(args: argparse.Namespace, path: str, n_tokens: int) -> None:
    """Raises CommandError if the model cannot run without --policies."""
    kv_type = KV_TYPE_NUMBERS[args.kv_type]
    with weightless(path) as model:
        if not args.stock and (refusal := model.refusal(kv_type, args.attention)):
            raise CommandError(refusal)
        if args.stock and (refusal := model.stock_refusal(kv_type, n_tokens)):
            raise CommandError(f"Full attention cannot run: {refusal}")


# --- measuring --------------------------------------------------------------------------------------------------------


def _read_tokens(args: argparse.Namespace, path: str) -> Text:
    """The text of the command line. Raises CommandError if there is too little of it."""
    text = read_text(args.file)
    with contextlib.closing(load(path, vocab_only=True)) as vocabulary:
        tokens = tokenize(vocabulary, text)[: args.tokens]
        n_bos = int(vocabulary._model.add_bos_token())
    if len(tokens) < 2:
        raise CommandError(f"{args.file} is too short: it has {len(tokens)} token, and at least 2 are needed.")
    return Text(tokens, n_bos, args.tokens if args.repeat else len(tokens))


def _stages(setup: Setup, n: int) -> list[Stage]:
    """Those that a stream of n losses reaches. The training length may be the window, less or more, or not known."""
    size, n_train = setup.window.size, setup.header.n_ctx_train
    stages = [Stage("window_not_full", "window not full", 0, size), Stage("window_full", "window full", size, n)]
    if n_train:
        stages.append(Stage("past_training", "past training", n_train, n))
    return [stage for stage in stages if stage.start < min(stage.end, n)]


def _measure(
    curves: dict[str, Curve],
    name: str,
    source: Any,
    text: Text,
    bucket: int | str,
    progress: Progress,
    stages: Sequence[Stage] = (),
) -> None:
    """Adds the losses of a text to the curve of that name; source is a model or a reader."""
    from lminf_edge.evaluate import nll_blocks

    means = BucketMeans(_edges(text.n_tokens - 1, bucket))
    curves[name] = Curve(means, stages={stage: BucketMeans([stage.start, stage.end]) for stage in stages})
    progress.begin(name)
    for start, nll in nll_blocks(source, text.tokens, text.n_tokens, text.n_bos):
        means.add(start, nll)
        for stage, inside in curves[name].stages.items():
            skipped = max(stage.start - start, 0)
            inside.add(start + skipped, nll[skipped : max(stage.end - start, 0)])
        progress.at(start + len(nll))


def _edges(n: int, bucket: int | str) -> list[int]:
    return log_edges(n) if isinstance(bucket, str) else even_edges(n, bucket)


def _compare(curves: dict[str, Curve], args: argparse.Namespace, setup: Setup, text: Text, progress: Progress) -> None:
    """Fills `curves`, policy by policy. Raises CommandError, before it measures anything, if one of them cannot run."""
    size = setup.window.size
    if text.n_tokens <= size:
        raise CommandError(
            f"{args.file} is too short: it has {text.n_tokens} tokens, and policies differ only once the window of "
            f"{size} is full: give a longer text, or a smaller --n-local."
        )
    n_full = min(text.n_tokens, args.full_tokens or text.n_tokens)
    stretches = stretches_of(args.kl, setup, text) if args.kl else []
    setup.check([policy for policy in args.policies if policy.name == "full"], n_full)
    if stretches:
        setup.check([POLICIES["full"]], len(stretches[0]))
    bucket = args.bucket or "log"
    parts = {policy: replace(text, n_tokens=n_full) if policy.name == "full" else text for policy in args.policies}
    n_compared = len(stretches) * sum(policy.name != "full" for policy in parts)
    progress.expect(
        sum(part.n_tokens - 1 for part in parts.values()) + n_compared * (len(stretches[0]) if stretches else 0)
    )
    for policy, part in parts.items():
        with setup.reader(policy, part.n_tokens) as reader:
            _measure(curves, policy.name, reader, part, bucket, progress, _stages(setup, part.n_tokens - 1))
    if stretches:
        _diverge(curves, setup, stretches, bucket, progress)


def stretches_of(n: int, setup: Setup, text: Text) -> list[list[int]]:
    """n stretches of the training length, spread evenly over the text, each with its BOS. Raises CommandError."""
    tokens, n_bos = text.tokens, text.n_bos
    n_train = setup.header.n_ctx_train
    if n_train <= setup.window.size:
        raise CommandError(
            f"--kl needs a window smaller than the training length of {n_train}, and it is {setup.window.size}: "
            "give a smaller --n-local."
        )
    length = n_train - n_bos
    last = len(tokens) - length
    if (n - 1) * length > last - n_bos:
        raise CommandError(
            f"--kl {n} needs {n * length + n_bos} tokens and the text has {len(tokens)}: give a longer text or fewer "
            "stretches."
        )
    starts = [n_bos + i * (last - n_bos) // max(n - 1, 1) for i in range(n)]
    return [[*tokens[:n_bos], *tokens[start : start + length]] for start in starts]


def _diverge(
    curves: dict[str, Curve],
    setup: Setup,
    stretches: Sequence[Sequence[int]],
    bucket: int | str,
    progress: Progress,
) -> None:
    from lminf_edge.cache.token_log import as_tokens
    from lminf_edge.evaluate import divergence_blocks

    length = len(stretches[0])
    with setup.reader(POLICIES["full"], length) as reference:
        for name, curve in curves.items():
            if name == "full":
                continue
            curve.kl = BucketMeans(_edges(length, bucket))
            progress.begin(f"{name}, KL")
            with setup.reader(POLICIES[name], length) as reader:
                for i, stretch in enumerate(stretches):
                    for start, kl in divergence_blocks(reference, reader, as_tokens(stretch)):
                        curve.kl.add(start, kl)
                        progress.at(i * length + start + len(kl))
