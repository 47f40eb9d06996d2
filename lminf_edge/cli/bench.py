"""Measures speed in llama-bench's terms: pp512 is 512 tokens in batches, tg32 are 32 tokens one after the other, and
"@ dN" means with N tokens processed before.

At each depth the Λ cache is measured beside full attention and, past the window, beside llama.cpp with n_ctx = window;
these without and with flash attention (fa), in turn, round by round. Speeds are tokens per second: the median of the
rounds, the least and the most. A ratio compares the faster setting of each side, taken round by round.

The cells before a test are made up from a few real ones, as time does not depend on what they hold, or computed for
kinds of caches where that cannot be done. With --recall the Λ cache is measured with recall and without; an archive of
all tokens before the test is made up from 4,096 real ones, and comes on top of the size that is told. A purely
recurrent model, which needs no Λ cache, is measured alone and at no depth: its speed does not depend on it. Without
--stock-lib the other side is the same library with the feature off, which is bit for bit what stock llama.cpp computes.
--shape makes a model with random weights (needs gguf: pip install 'lminf-edge[bench]').

--json prints
  model, n_params, n_bytes, n_threads, n_gpu_layers, rpc_servers (a list, or null)
  system: {"ours", "stock"}: what the libraries say about themselves
  results   [{"library", "cache", "test", "n_tokens", "depth", "window", "n_global", "flash_attn", "kv_type", "label",
            "kv_bytes", "tokens_per_second": [one per round], "median", "min", "max"}, ...]
  ratios    [{"label", "to": "full", "window" or "recall", "median", "min", "max"}, ...]: the Λ cache's speed,
            without recall, over the other's
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from lminf_edge.bench.contender import KV_TYPE_NUMBERS, Cache, Contender, is_quantized
from lminf_edge.cli.common import (
    CommandError,
    human_bytes,
    model_header,
    options_named,
    print_json,
    recall_of,
    show_note,
    weightless,
)
from lminf_edge.cli.options import add_hub, add_recall, add_rpc
from lminf_edge.cli.values import expand_home, file_path, whole_number
from lminf_edge.config import DEFAULT_WINDOW, LMInfConfig, Recall, default_ubatch

HELP = "speed beside stock llama.cpp"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "-m",
        "--model",
        metavar="M",
        type=expand_home,
        help="path of a GGUF model, or the name of an embedded one (nano, nano-alibi)",
    )
    add_hub(source)
    source.add_argument("--shape", metavar="S", help="random weights: llama-3.2-1b, qwen3-0.6b or llama-2-7b")
    parser.add_argument("--weights", metavar="T", default="q4_0", help="of --shape: q4_0, q8_0 or f16; default q4_0")
    parser.add_argument(
        "--models",
        metavar="DIR",
        type=file_path,
        default=Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lminf-edge",
        help="where models of --shape are kept, 0.4 to 4 GB each in q4_0; default ~/.cache/lminf-edge",
    )
    parser.add_argument(
        "--stock-lib", metavar="DIR", type=file_path, help="folder of a stock llama.cpp library to compare with"
    )
    parser.add_argument(
        "--window",
        metavar="N",
        type=whole_number(1),
        help="n_global + n_local; default min(4096, training length), or what the model selects if that is less",
    )
    parser.add_argument(
        "--n-global", metavar="G", type=whole_number(0), default=LMInfConfig.n_global, help="default 10"
    )
    parser.add_argument("--depth", metavar="N,...", type=_depths, help="tokens before; default 0,window,2*window")
    parser.add_argument("--n-prompt", metavar="N", type=whole_number(0), default=512, help="of pp; default 512, 0 none")
    parser.add_argument("--n-gen", metavar="N", type=whole_number(0), default=32, help="of tg; default 32, 0 none")
    parser.add_argument("--rounds", metavar="N", type=whole_number(1), default=3, help="default 3")
    parser.add_argument("--kv-type", choices=KV_TYPE_NUMBERS, default="f16", help="default f16; quantized ones need fa")
    parser.add_argument("--threads", metavar="N", type=whole_number(1), help="default: half of the logical cores")
    parser.add_argument(
        "--gpu-layers", metavar="N", type=whole_number(-1), help="-1 all; default 0, with --rpc -1, on other machines"
    )
    add_rpc(parser)
    add_recall(parser, in_files=False)


def _depths(text: str) -> list[int]:
    parse = whole_number(0)
    return [parse(part) for part in text.split(",")]


def run(args: argparse.Namespace) -> int:
    from lminf_edge import native
    from lminf_edge.bench.alternate import Bench, fastest, ratio
    from lminf_edge.bench.random_model import find_shape, random_model
    from lminf_edge.model import constant_note

    if args.rpc and args.stock_lib:
        raise CommandError("--rpc needs servers of the library's own build, so leave --stock-lib out.")
    n_gpu_layers = (-1 if args.rpc else 0) if args.gpu_layers is None else args.gpu_layers
    native.load()
    ours = native.library_folder()
    assert ours is not None
    if args.shape is not None:
        name = args.shape
        model = str(random_model(name, find_shape(name), args.models, args.weights))
    else:
        name = model = model_header(args.model)[0]
    _, header = model_header(model)
    with weightless(model) as outline:
        refusal = outline.refusal(KV_TYPE_NUMBERS[args.kv_type])
        is_constant = outline.is_constant
    if refusal:
        raise CommandError(refusal)
    n_most = args.n_global + header.most_local(args.n_global, args.n_recall)
    window = args.window or min(DEFAULT_WINDOW, header.n_ctx_train or DEFAULT_WINDOW, n_most)
    n_threads = args.threads or max(1, (os.cpu_count() or 2) // 2)
    depths = [0, window, 2 * window] if args.depth is None else args.depth
    on_gpu = n_gpu_layers != 0
    if is_constant:
        show_note(constant_note(header.architecture))
        groups = list(plan_constant(args.kv_type, args.n_prompt, args.n_gen))
    else:
        with options_named():
            config = LMInfConfig(**recall_of(args))
        # room for what a test adds
        n_archive = config.n_archive or max(depths) + args.n_prompt + args.n_gen * (args.rounds + 1)
        recall = Recall(**replace(config, n_archive=n_archive).recall_settings())
        sizes = (args.n_prompt, args.n_gen)
        groups = list(plan(depths, window, args.n_global, args.kv_type, *sizes, on_gpu, recall))
    if not groups:
        raise CommandError("There is nothing to measure: give --n-prompt or --n-gen.")

    show_progress = sys.stderr.isatty()
    results, ratios = [], []
    libraries = {"ours": ours, "stock": args.stock_lib or ours}
    with Bench(libraries, model, n_threads, n_gpu_layers, args.rpc or ()) as bench:
        for group in groups:
            measured = bench.measure(group, args.rounds, _progress if show_progress else lambda line: None)
            results += measured
            if is_constant:
                continue
            lambda_ = fastest([result for result in measured if result.contender.cache == "lambda"])
            for other in ("full", "window", "recall"):
                others = [result for result in measured if result.contender.cache == other]
                if others:
                    ratios.append((lambda_.contender.label, other, ratio(lambda_, fastest(others))))
        facts = bench.facts
    if show_progress:
        print("\r\x1b[K", end="", file=sys.stderr)

    if args.json:
        print_json(
            {
                "model": name,
                "n_params": facts["ours"]["n_params"],
                "n_bytes": facts["ours"]["n_bytes"],
                "n_threads": n_threads,
                "n_gpu_layers": n_gpu_layers,
                "rpc_servers": args.rpc,
                "system": {library: fact["system"] for library, fact in facts.items()},
                "results": [result.as_json() for result in results],
                "ratios": [{"label": label, "to": to, **asdict(ratio_)} for label, to, ratio_ in ratios],
            }
        )
        return 0
    other_side = "stock" if args.stock_lib else "off"  # the feature, in the same library
    print(f"{facts['ours']['model']}, {human_bytes(facts['ours']['n_bytes'])}, {n_threads} threads\n")
    print("| cache | library | kv | fa | KV size | test | t/s | min .. max |")
    print("|---|---|---|--:|--:|--:|--:|--:|")
    for result in results:
        c = result.contender
        side = other_side if c.cache in ("full", "window") else "ours"
        print(
            f"| {c.cache_label} | {side} | {c.kv_type} | {int(c.flash_attn)} "
            f"| {human_bytes(result.kv_bytes)} | {c.label} | {result.median:.2f} "
            f"| {min(result.tokens_per_second):.2f} .. {max(result.tokens_per_second):.2f} |"
        )
    print()
    names = {"full": "full attention", "window": f"n_ctx {window}", "recall": f"with {args.n_recall} recalled"}
    for label, to, r in ratios:
        print(f"{label}: the Λ cache is {r.median:.2f} times as fast as {names[to]} ({r.min:.2f} .. {r.max:.2f})")
    return 0


def _progress(line: str) -> None:
    print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


TESTS: tuple[Literal["pp", "tg"], ...] = ("pp", "tg")


def plan_constant(kv_type: str, n_prompt: int, n_gen: int) -> Iterator[list[Contender]]:
    """The tests of a purely recurrent model, which is measured alone: with the Λ cache off or on it is the same."""
    for test, n_tokens in zip(TESTS, (n_prompt, n_gen), strict=True):
        if n_tokens:
            yield [Contender("ours", "state", test, n_tokens, depth=0, kv_type=kv_type)]


def plan(
    depths: Sequence[int],
    window: int,
    n_global: int,
    kv_type: str,
    n_prompt: int,
    n_gen: int,
    on_gpu: bool,
    recall: Recall,
) -> Iterator[list[Contender]]:
    """Groups of contenders that are measured in turn: one for each depth and test."""
    flash = (True,) if is_quantized(kv_type) else (False, True)
    for depth in depths:
        for test, n_tokens in zip(TESTS, (n_prompt, n_gen), strict=True):
            if n_tokens == 0:
                continue
            caches: list[tuple[str, Cache, int]] = [("ours", "lambda", depth), ("stock", "full", depth)]
            if recall.n_recall:
                caches.insert(1, ("ours", "recall", depth))
            if window <= depth and n_tokens < window:
                caches.append(("stock", "window", window - n_tokens))
            yield [
                Contender(
                    *(library, cache, test, n_tokens, at, window, n_global, fa, kv_type),
                    n_ubatch=default_ubatch(window, on_gpu, cache == "recall") if library == "ours" else 512,
                    recall=recall if cache == "recall" else Recall(),
                )
                for library, cache, at in caches
                for fa in (flash[:1] if library == "ours" else flash)  # the fused attention is neither
            ]
