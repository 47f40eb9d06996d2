"""Continues a prompt of any length, for as long as you like.

The text goes to stdout as it comes, figures to stderr at the end. Ctrl-C ends it.

--json prints, at the end and instead of the text itself,
  text, finish_reason ("length", "stop" or "interrupted")
  prompt_tokens, tokens (generated), prompt_seconds, seconds (generating), tokens_per_second
  stream: position, evicted, sink_cells, window_cells, kv_bytes, rebases, max_graph_position (null with --stock)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time

from lminf_edge.cli.common import add_compute, add_model, add_window, human_bytes, open_model, print_json, read_text, whole_number

HELP = "continue a prompt, without end if you like"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", metavar="TEXT")
    prompt.add_argument("-f", "--file", metavar="FILE", help="UTF-8 text with the prompt, - for stdin")
    parser.add_argument(
        "-n", "--tokens", metavar="N", type=whole_number(-1), default=128, help="tokens to generate, -1 without end; default 128"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-text token")
    group = parser.add_argument_group("sampling")
    group.add_argument("--temp", metavar="T", type=float, default=0.8, help="temperature, 0 always the likeliest; default 0.8")
    group.add_argument("--top-k", metavar="K", type=int, default=40, help="default 40, 0 off")
    group.add_argument("--top-p", metavar="P", type=float, default=0.95, help="default 0.95, 1 off")
    group.add_argument("--min-p", metavar="P", type=float, default=0.05, help="default 0.05, 0 off")
    group.add_argument("--repeat-penalty", metavar="R", type=float, default=1.0, help="default 1, off")
    group.add_argument("--seed", metavar="S", type=whole_number(0), help="default: another one each time")
    add_window(parser)
    add_compute(parser)


def run(args: argparse.Namespace) -> int:
    prompt = args.prompt if args.file is None else read_text(args.file)
    with contextlib.closing(open_model(args)) as llm:
        n_prompt = n_tokens = 0
        pieces: list[str] = []
        finish_reason = "length"
        started = first = time.perf_counter()
        try:
            if args.tokens != 0:
                chunks = llm.create_completion(
                    prompt,
                    max_tokens=args.tokens,
                    temperature=args.temp,
                    top_k=args.top_k,
                    top_p=args.top_p,
                    min_p=args.min_p,
                    repeat_penalty=args.repeat_penalty,
                    seed=args.seed,
                    logit_bias={llm.token_eos(): float("-inf")} if args.ignore_eos else None,
                    stream=True,
                )
                for chunk in chunks:
                    if n_prompt == 0:
                        n_prompt, first = llm.n_tokens, time.perf_counter()
                    choice = chunk["choices"][0]
                    finish_reason = choice["finish_reason"] or finish_reason
                    if args.json:
                        pieces.append(choice["text"])
                    else:
                        print(choice["text"], end="", flush=True)
        except KeyboardInterrupt:
            finish_reason = "interrupted"
        ended = time.perf_counter()
        # the last token is sampled, but not processed any more
        n_tokens = max(llm.n_tokens - n_prompt + 1, 0) if n_prompt else 0
        stream = None if args.stock else llm.stream_info()
    prompt_seconds, seconds = first - started, ended - first
    rate = (n_tokens - 1) / seconds if n_tokens > 1 and seconds > 0 else 0.0
    if args.json:
        print_json(
            {
                "text": "".join(pieces),
                "finish_reason": finish_reason,
                "prompt_tokens": n_prompt,
                "tokens": n_tokens,
                "prompt_seconds": prompt_seconds,
                "seconds": seconds,
                "tokens_per_second": rate,
                "stream": stream and dataclasses.asdict(stream),
            }
        )
        return 0
    print(flush=True)
    figures = f"prompt {n_prompt} tokens in {prompt_seconds:.1f} s; generated {n_tokens} tokens, {rate:.1f} per second"
    if stream is not None:
        figures += f"; position {stream.position}, {stream.evicted} evicted, KV cache {human_bytes(stream.kv_bytes)}"
    print(f"[{figures}]", file=sys.stderr)
    return 0
