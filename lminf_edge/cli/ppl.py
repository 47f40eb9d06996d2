"""Measures how well a model predicts a text, position by position.

The text is one stream: token i + 1 is predicted from tokens 0..i (from those the window leaves, without --stock) and
its loss is -log p in nats. BOS is put in front if the model wants it, and is not scored.

--json prints
  tokens     number of tokens scored: all but the first
  mean_nll   mean loss in nats per token; perplexity is exp(mean_nll)
  buckets    [{"start": s, "end": e, "mean_nll": x}, ...]: mean loss of tokens s + 1 .. e, --bucket tokens each
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys

from lminf_edge.cli.common import (
    CommandError,
    add_compute,
    add_model,
    add_window,
    load,
    model_header,
    open_model,
    print_json,
    read_text,
    tokenize,
    whole_number,
)

HELP = "perplexity of a text, by position"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("-f", "--file", metavar="FILE", required=True, help="UTF-8 text, - for stdin")
    parser.add_argument("--tokens", metavar="N", type=whole_number(2), help="read only the first N tokens of the text")
    parser.add_argument(
        "--bucket", metavar="N", type=whole_number(1), default=512, help="tokens per line of the result; default 512"
    )
    add_window(parser)
    add_compute(parser)


def run(args: argparse.Namespace) -> int:
    from lminf_edge.evaluate import nll_blocks

    path, _ = model_header(args.model)
    text = read_text(args.file)
    with contextlib.closing(load(path, vocab_only=True)) as vocabulary:
        tokens = tokenize(vocabulary, text)[: args.tokens]
    if len(tokens) < 2:
        raise CommandError(f"{args.file} is too short: it has {len(tokens)} token, and at least 2 are needed.")

    n_scored = len(tokens) - 1
    sums = [0.0] * math.ceil(n_scored / args.bucket)
    show_progress = sys.stderr.isatty() and not args.json
    with contextlib.closing(open_model(args, n_ctx_stock=len(tokens))) as llm:
        for start, nll in nll_blocks(llm, tokens):
            for i, loss in enumerate(nll.tolist(), start):
                sums[i // args.bucket] += loss
            if show_progress:
                print(f"\r{start + len(nll)} of {n_scored} tokens", end="", file=sys.stderr)
    if show_progress:
        print(file=sys.stderr)

    buckets = []
    for i, total in enumerate(sums):
        start, end = i * args.bucket, min((i + 1) * args.bucket, n_scored)
        buckets.append({"start": start, "end": end, "mean_nll": total / (end - start)})
    mean_nll = sum(sums) / n_scored
    if not math.isfinite(mean_nll):
        raise CommandError("The model's losses are not finite numbers: its weights are damaged.")
    if args.json:
        print_json({"tokens": n_scored, "mean_nll": mean_nll, "buckets": buckets})
        return 0
    print("    positions         nats per token")
    for bucket in buckets:
        print(f"{bucket['start']:>8} .. {bucket['end']:<8}  {bucket['mean_nll']:.4f}")
    print(f"{n_scored} tokens, {mean_nll:.4f} nats per token, perplexity {math.exp(mean_nll):.2f}")
    return 0
