"""Runs a text far past the model's training length twice, side by side: with full attention, as llama.cpp does it, and
with the Λ cache. Shows the loss (nats per token: lower is better), the speed and the KV memory of both, live.

Full attention stops at --stock-tokens, as its time and memory grow with every token; the Λ cache continues to --tokens.
With --recall its archive counts as KV memory. Without --file the text is Python's own documentation. --talk lets a real
model, smollm2, answer a question first; it is downloaded on first use.

--json prints, instead of the display,
  model, text, n_ctx_train, n_global, n_local
  buckets   [{"start", "end", "stock", "lminf"}, ...]: of both, null where full attention had stopped,
            {"mean_nll", "tokens_per_second", "kv_bytes" (in use at the end of the bucket)}
  summary   the findings, in sentences
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lminf_edge.cli.common import (
    CommandError,
    human_bytes,
    load,
    model_header,
    options_named,
    print_json,
    read_text,
    recall_of,
    tokenize,
    weightless,
)
from lminf_edge.cli.options import add_model, add_recall
from lminf_edge.cli.screen import BATCH, Screen
from lminf_edge.cli.values import expand_home, whole_number
from lminf_edge.config import KV_TYPE_DEFAULT, LMInfConfig, check_memory
from lminf_edge.errors import UserError

HELP = "full attention and the Λ cache past the training length, side by side"


QUESTION = "Why do lighthouses stand where they stand? Tell me a story about one of their keepers."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, default="nano")
    parser.add_argument("-f", "--file", metavar="FILE", type=expand_home, help="UTF-8 text of your own, - for stdin")
    parser.add_argument("--talk", action="store_true", help="let a real model, smollm2, talk first")
    parser.add_argument(
        "--stock-tokens",
        metavar="N",
        type=whole_number(2),
        default=16384,
        help="where full attention stops; default 16384",
    )
    parser.add_argument(
        "--tokens", metavar="N", type=whole_number(2), default=65536, help="where the Λ cache stops; default 65536"
    )
    parser.add_argument(
        "--seconds",
        metavar="S",
        type=whole_number(2),
        default=60,
        help="end after S seconds, full attention after half of them; default 60",
    )
    parser.add_argument(
        "--n-global", metavar="G", type=whole_number(0), default=LMInfConfig.n_global, help="default 10"
    )
    parser.add_argument("--n-local", metavar="L", type=whole_number(1), help="default: the training length less G")
    add_recall(parser)


# --- a real model -----------------------------------------------------------------------------------------------------


def talk() -> None:
    """Shows that it talks: SmolLM2, past its window of 128 tokens, or nano where that cannot be had."""
    config = LMInfConfig(n_global=10, n_local=118)
    stream: Any
    try:
        llm = load("smollm2", lminf=config)
    except UserError as error:
        print(f"smollm2 cannot be had ({str(error).rstrip('.')}), so nano continues a text instead.\n")
        llm = load("nano", lminf=config)
        stream = llm.create_completion("The lighthouse", max_tokens=200, stream=True)
    else:
        print(f"SmolLM2 135M, with a window of 128 tokens. You ask: {QUESTION}\n")
        messages: Any = [{"role": "user", "content": QUESTION}]
        stream = llm.create_chat_completion(messages, max_tokens=200, repeat_penalty=1.1, stream=True)
    with contextlib.closing(llm):
        for chunk in stream:
            choice = chunk["choices"][0]
            print(choice["text"] if "text" in choice else choice["delta"].get("content", ""), end="", flush=True)
        info = llm.stream_info()
    print(f"\n\n{info.position} tokens, {info.evicted} of them evicted, KV cache {human_bytes(info.kv_bytes)}.\n")


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tally:
    """One reader over one bucket of positions."""

    mean_nll: float
    tokens_per_second: float
    kv_bytes: int  # in use at the end


@dataclass(frozen=True)
class Row:
    start: int
    end: int
    stock: Tally | None
    lminf: Tally


class Side:
    """One of the two models at work on the text."""

    def __init__(self, blocks: Iterator[tuple[int, Any]], n_scored: int) -> None:
        self._blocks = blocks
        self.n_scored = n_scored  # tokens it will score
        self.position = 0
        self.nll: list[float] = []  # of each token
        self.losses: list[float] = []  # sum per block of BATCH tokens
        self.seconds: list[float] = []
        self.kv_bytes: list[int] = []  # in use after each block

    @property
    def done(self) -> bool:
        return self.position >= self.n_scored

    def stop(self) -> None:
        self.n_scored = self.position

    def step(self) -> None:
        started = time.perf_counter()
        start, nll = next(self._blocks)
        self.seconds.append(time.perf_counter() - started)
        self.nll.extend(nll.tolist())
        self.losses.append(float(nll.sum()))
        self.position = start + len(nll)

    def mean_nll(self, start: int, end: int) -> float:
        """Mean loss of positions start..end."""
        return sum(self.nll[start:end]) / (end - start)

    def rate(self, start: int, end: int) -> float:
        """Tokens per second of the blocks that positions start..end are in."""
        first, last = start // BATCH, math.ceil(end / BATCH)
        return (min(last * BATCH, self.position) - first * BATCH) / sum(self.seconds[first:last])


def run(args: argparse.Namespace) -> int:
    from lminf_edge.evaluate import nll_blocks

    if args.talk and not args.json:
        talk()
    path, header = model_header(args.model)
    if not header.n_ctx_train:
        raise CommandError(
            f"{args.model} does not say what length the model was trained on, which demo goes past: try ppl."
        )
    name, text = (args.file, read_text(args.file)) if args.file else ("Python's documentation", python_documentation())
    settings: dict[str, Any] = {"n_batch": BATCH, "n_ubatch": BATCH}
    with contextlib.ExitStack() as stack:
        with options_named():
            config = LMInfConfig(n_global=args.n_global, n_local=args.n_local, **recall_of(args))
        lminf = stack.enter_context(contextlib.closing(load(path, lminf=config, **settings)))
        if lminf.scheduler.model.note:
            raise CommandError(f"There is nothing to compare. {lminf.scheduler.model.note}")
        tokens = tokenize(lminf, text)[: args.tokens + 1]
        if len(tokens) < 2:
            raise CommandError(f"{name} is too short: it has {len(tokens)} token, and at least 2 are needed.")
        n_stock = min(args.stock_tokens, len(tokens) - 1)
        outline = stack.enter_context(weightless(path))

        @functools.cache
        def kv_bytes(n_tokens: int) -> int:
            """What n_tokens take with full attention."""
            return outline.stock_bytes(n_tokens, KV_TYPE_DEFAULT, BATCH)

        check_memory(kv_bytes(n_stock + 1))
        with contextlib.closing(load(path, n_ctx=n_stock + 1, swa_full=False, **settings)) as stock:
            stock_reader = Side(nll_blocks(stock, tokens[: n_stock + 1]), n_stock)
            lminf_reader = Side(nll_blocks(lminf, tokens), len(tokens) - 1)
            screen = Screen(quiet=args.json)
            if not args.json:
                print(f"{name}: {len(tokens) - 1} tokens for {args.model}, trained on {header.n_ctx_train}.\n")
            try:
                started = time.monotonic()
                while not lminf_reader.done and time.monotonic() - started < args.seconds:
                    if time.monotonic() - started > args.seconds / 2:
                        stock_reader.stop()
                    if not stock_reader.done:
                        stock_reader.step()
                    lminf_reader.step()
                    info = lminf.stream_info()
                    lminf_reader.kv_bytes.append(info.kv_bytes + info.archive_bytes)
                    kv_stock = kv_bytes(stock_reader.position)
                    screen.show(stock_reader, lminf_reader, kv_stock, lminf_reader.kv_bytes[-1])
            except KeyboardInterrupt:
                if lminf_reader.position == 0:
                    raise
            screen.leave()
            is_hybrid = lminf.stream_info().parts.n_layer_recurrent > 0
        buckets = [
            Row(
                start,
                end,
                Tally(stock_reader.mean_nll(start, end), stock_reader.rate(start, end), kv_bytes(end))
                if end <= stock_reader.position
                else None,
                Tally(
                    lminf_reader.mean_nll(start, end),
                    lminf_reader.rate(start, end),
                    lminf_reader.kv_bytes[math.ceil(end / BATCH) - 1],
                ),
            )
            for start, end in bucket_edges(header.n_ctx_train, stock_reader.position, lminf_reader.position)
        ]
    summary = summarize(buckets, header.n_ctx_train, is_hybrid, args.n_recall)
    if args.json:
        print_json(
            {
                "model": path,
                "text": name,
                "n_ctx_train": header.n_ctx_train,
                "buckets": [asdict(bucket) for bucket in buckets],
                "summary": summary,
            }
        )
    else:
        print_table(buckets)
        print("\n" + "\n".join(summary))
    return 0


def bucket_edges(n_ctx_train: int, n_stock: int, n_tokens: int) -> Iterator[tuple[int, int]]:
    """Buckets that double in size from the training length on, cut at the ends of both readers."""
    start, end = 0, max(BATCH, n_ctx_train // BATCH * BATCH)
    while start < n_tokens:
        stop = min(end, n_tokens, n_stock if start < n_stock else n_tokens)
        yield start, stop
        start = stop
        while end <= start:
            end *= 2


# --- what was seen ----------------------------------------------------------------------------------------------------


def summarize(buckets: Sequence[Row], n_ctx_train: int, is_hybrid: bool = False, n_recall: int = 0) -> list[str]:
    """The numbers in sentences, and nothing beyond them. is_hybrid: some layers are recurrent."""
    sentences = []
    shared = [(bucket, bucket.stock) for bucket in buckets if bucket.stock is not None]
    last = buckets[-1]
    if shared and shared[-1][0].end > n_ctx_train:
        bucket, stock = shared[-1]
        where = f"At positions {bucket.start} to {bucket.end}"
        difference = stock.mean_nll - bucket.lminf.mean_nll
        ratio = math.exp(abs(difference))
        if difference > 0.02:
            verdict = f"full attention's perplexity is {ratio:.1f} times that of the Λ cache"
        elif difference < -0.02:
            verdict = f"the Λ cache's perplexity is {ratio:.2f} times that of full attention"
        else:
            verdict = "the two predict equally well"
        sentences.append(
            f"{where}, {bucket.end / n_ctx_train:.0f} times the training length, {verdict} "
            f"({stock.mean_nll:.2f} against {bucket.lminf.mean_nll:.2f} nats per token)."
        )
        first, first_stock = shared[0]
        if first is not bucket:
            sentences.append(
                f"Since the first {first.end} tokens full attention went from {first_stock.mean_nll:.2f} "
                f"to {stock.mean_nll:.2f}, "
                f"the Λ cache from {first.lminf.mean_nll:.2f} to {bucket.lminf.mean_nll:.2f}."
            )
        sentences.append(
            f"By then full attention used {human_bytes(stock.kv_bytes)} of KV memory and grows with every token; "
            f"the Λ cache uses {human_bytes(bucket.lminf.kv_bytes)} and "
            f"{'grows until its archive is full' if n_recall else 'stays there'}. "
            f"Speed: {stock.tokens_per_second:.0f} against {bucket.lminf.tokens_per_second:.0f} tokens per second."
        )
    elif last.end > n_ctx_train:
        sentences.append(
            f"Full attention stopped within the {n_ctx_train} tokens the model was trained on: "
            "give larger --stock-tokens or --seconds to see a difference."
        )
    else:
        sentences.append(
            f"The text ends within the {n_ctx_train} tokens the model was trained on: "
            "give a longer one to see a difference."
        )
    if last.stock is None:
        sentences.append(
            f"The Λ cache went on to token {last.end} at {last.lminf.mean_nll:.2f} nats and "
            f"{last.lminf.tokens_per_second:.0f} tokens per second."
        )
    if last.end > n_ctx_train and n_recall:
        sentences.append(f"Of what has left the window, each layer recalls the {n_recall} tokens it looks for most.")
    elif last.end > n_ctx_train:
        sentences.append(
            "It keeps no keys of the middle: what has left the window is only in the states of the recurrent layers."
            if is_hybrid
            else "It does not remember the middle: what has left the window is gone, except for the first tokens."
        )
    return sentences


def print_table(buckets: Sequence[Row]) -> None:
    print(f"{'':19}  {'nats per token':^15}   {'tokens per second':^17}   {'KV memory':^19}")
    print(f"{'positions':>19}  {'full':>7} {'Λ':>7}   {'full':>8} {'Λ':>8}   {'full':>9} {'Λ':>9}")
    for bucket in buckets:
        stock, lminf = bucket.stock, bucket.lminf
        nll, rate, kv = ("-", "-", "-") if stock is None else _cells(stock)
        lminf_nll, lminf_rate, lminf_kv = _cells(lminf)
        print(
            f"{bucket.start:>8} .. {bucket.end:>7}  {nll:>7} {lminf_nll:>7}   {rate:>8} {lminf_rate:>8}   "
            f"{kv:>9} {lminf_kv:>9}"
        )


def _cells(figures: Tally) -> tuple[str, str, str]:
    return f"{figures.mean_nll:.2f}", f"{figures.tokens_per_second:.0f}", human_bytes(figures.kv_bytes)


# --- the text ---------------------------------------------------------------------------------------------------------


def python_documentation() -> str:
    """The prose of the reference that Python brings along for help(): whole sentences, each paragraph once.

    Raises CommandError where Python was installed without it.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise CommandError(
            "This Python comes without its documentation: give a text of your own with --file."
        ) from None
    paragraphs: dict[str, None] = {}  # in order
    for topic in topics.values():
        for paragraph in re.split(r"\n\s*\n", topic):
            words = " ".join(re.sub(r'["*`]', "", paragraph).split())
            if len(words) > 80 and words[0].isupper() and words.endswith(".") and "::" not in words:
                paragraphs[words] = None
    return "\n\n".join(paragraphs)
