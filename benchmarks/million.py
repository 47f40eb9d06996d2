"""One million tokens through the embedded model: memory, loss and speed from the first token to the last.

    .venv/bin/python benchmarks/million.py [--tokens N] [--json FILE]

The text is English prose that every Python brings along, over and over, in one stream. What must not happen over such
a length: growing memory, NaN, a loss that drifts. So the loss near the end is compared with that of the same text near
the beginning, and resident memory at the end with that at --warm tokens.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import time
from pathlib import Path

import numpy as np

from lminf_edge import Llama, LMInfConfig
from lminf_edge.evaluate import nll_blocks


def resident_bytes() -> int:
    """Resident memory of this process. Raises RuntimeError where there is no /proc (Linux has it)."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("Resident memory can only be read from /proc/self/status.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--text-tokens", type=int, help="repeat only so many tokens of the text (default: all)")
    parser.add_argument("--warm", type=int, default=50_000, help="tokens after which memory may not grow any more")
    parser.add_argument("--span", type=int, default=100_000, help="tokens whose loss is compared, from 10 %% of it on")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()

    llm = Llama("nano", lminf=LMInfConfig(n_global=10, n_local=256), verbose=False)
    prose = llm.tokenize("\n".join(pydoc_data.topics.topics.values()).encode(), add_bos=False)
    text = np.array(prose, dtype=np.int32)[: args.text_tokens]

    # the same text twice, whole repetitions apart
    early = args.span // 10
    late = early + (args.tokens - 1 - args.span - early) // len(text) * len(text)
    if late <= early:
        parser.error("give more --tokens, or a smaller --span or --text-tokens: the text must come round at least once")

    losses = np.full(args.tokens, np.inf)  # all of its memory is taken now
    begun = time.perf_counter()
    warm_bytes = 0
    for position, nll in nll_blocks(llm, text, args.tokens):
        done = position + len(nll)
        losses[position:done] = nll
        if not warm_bytes and done >= args.warm:
            warm_bytes = resident_bytes()
        if done % 50_176 < llm.n_batch:
            rate, mib = done / (time.perf_counter() - begun), resident_bytes() / 2**20
            print(f"{done:>9} tokens  {mib:7.1f} MiB  {nll.mean():.3f} nats  {rate:6.0f} tok/s", flush=True)
    seconds = time.perf_counter() - begun
    info = llm.stream_info()
    figures = {
        "tokens": args.tokens,
        "text_tokens": len(text),
        "seconds": seconds,
        "tokens_per_second": args.tokens / seconds,
        "nan": int(np.isnan(losses).sum()),
        "span": args.span,
        "early_start": early,
        "early_loss": float(losses[early : early + args.span].mean()),
        "late_start": late,
        "late_loss": float(losses[late : late + args.span].mean()),
        "warm_tokens": args.warm,
        "warm_bytes": warm_bytes,
        "end_bytes": resident_bytes(),
        "kv_bytes": info.kv_bytes,
        "rebases": info.rebases,
        "max_graph_position": info.max_graph_position,
    }
    text_of_figures = json.dumps(figures, indent=2) + "\n"
    print(text_of_figures, end="")
    if args.json:
        args.json.write_text(text_of_figures)


if __name__ == "__main__":
    main()
