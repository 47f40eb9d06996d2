"""Continues a prompt of any length, for as long as you like.

The text goes to stdout as it is generated, statistics to stderr at the end. Ctrl-C stops generation. With -n -1, a text
that repeats itself exactly, over and over, ends with finish_reason "length".

--json prints, at the end and instead of the text itself,
  text, finish_reason ("length", "stop" or "interrupted")
  prompt_tokens, tokens (generated), prompt_seconds, seconds (generating), tokens_per_second
  stream: position, evicted, skipped, sink_cells, window_cells, kv_bytes, rebases, max_graph_position, checkpoint_bytes,
  attention (null with no attention), parts: layers by kind and the bytes of each kind, archived, forgotten,
  archive_bytes (null with --stock)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time

from lminf_edge.cli.common import (
    CommandError,
    human_bytes,
    open_model,
    print_json,
    read_text,
    require_vocabulary,
    sampling_params,
)
from lminf_edge.cli.options import add_compute, add_model, add_sampling, add_window
from lminf_edge.cli.values import expand_home, whole_number

HELP = "continue a prompt, for as long as you like"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt")
    prompt.add_argument(
        "-f", "--file", metavar="FILE", type=expand_home, help="UTF-8 text with the prompt, - for stdin"
    )
    parser.add_argument(
        "-n",
        "--tokens",
        metavar="N",
        type=whole_number(-1),
        default=128,
        help="tokens to generate, -1 for no limit; default 128",
    )
    parser.add_argument("--ignore-eos", action="store_true", help="never end the text: no token that ends one is drawn")
    add_sampling(parser)
    add_window(parser)
    add_compute(parser)


def run(args: argparse.Namespace) -> int:
    from lminf_edge.model import eog_tokens
    from lminf_edge.text.tokenizer import prompt_to_tokens

    prompt = args.prompt if args.file is None else read_text(args.file)
    sampling = sampling_params(args)
    with contextlib.closing(open_model(args)) as llm:
        llm.sampling, llm.detect_loops = sampling, args.detect_loops
        require_vocabulary(llm)
        tokens = prompt_to_tokens(llm, prompt, None).tolist()
        if args.stock and len(tokens) >= llm.n_ctx():
            raise CommandError(
                f"The prompt has {len(tokens)} tokens, and full attention has room for {llm.n_ctx()} and the answer, "
                "the training length: give a shorter one, or leave --stock out."
            )
        pieces: list[str] = []
        finish_reason = "length"
        started = time.perf_counter()
        first = None  # time of the first text
        try:
            if args.tokens != 0:
                chunks = llm.create_completion(
                    tokens,
                    max_tokens=args.tokens,
                    **llm.sampling.completion_arguments(),
                    logit_bias=dict.fromkeys(eog_tokens(llm), float("-inf")) if args.ignore_eos else None,
                    stream=True,
                )
                assert not isinstance(chunks, dict)  # a stream
                for chunk in chunks:
                    first = first or time.perf_counter()
                    choice = chunk["choices"][0]
                    finish_reason = choice["finish_reason"] or finish_reason
                    if args.json:
                        pieces.append(choice["text"])
                    else:
                        print(choice["text"], end="", flush=True)
        except KeyboardInterrupt:
            finish_reason = "interrupted"
        ended = time.perf_counter()
        n_prompt = len(tokens)
        # the last of max_tokens is sampled but not processed
        n_generated = max(llm.n_tokens - n_prompt, 0) + (finish_reason == "length" and args.tokens != 0)
        stream = None if args.stock else llm.stream_info()
    prompt_seconds, seconds = (first or ended) - started, ended - (first or ended)
    rate = (n_generated - 1) / seconds if n_generated > 1 else 0.0
    if args.json:
        print_json(
            {
                "text": "".join(pieces),
                "finish_reason": finish_reason,
                "prompt_tokens": n_prompt,
                "tokens": n_generated,
                "prompt_seconds": prompt_seconds,
                "seconds": seconds,
                "tokens_per_second": rate,
                "stream": stream and dataclasses.asdict(stream),
            }
        )
        return 0
    print(flush=True)
    figures = (
        f"prompt {n_prompt} tokens in {prompt_seconds:.1f} s; generated {n_generated} tokens, {rate:.1f} per second"
    )
    if stream is not None:
        figures += f"; position {stream.position}, {stream.evicted} evicted, KV cache {human_bytes(stream.kv_bytes)}"
    print(f"[{figures}]", file=sys.stderr)
    return 0
