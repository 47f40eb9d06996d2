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


class SpanMean:
    """The mean of a series over positions [start, end), taken block by block."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end
        self._sum, self._n = 0.0, 0

    def add(self, position: int, values: np.ndarray) -> None:
        """`values` are those from `position` on."""
        inside = values[max(self.start - position, 0) : max(self.end - position, 0)]
        self._sum += float(inside.sum())
        self._n += len(inside)

    @property
    def mean(self) -> float:
        assert self._n == self.end - self.start
        return self._sum / self._n


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
    skipped = args.span // 10
    n_between = (args.tokens - 1 - args.span - skipped) // len(text) * len(text)
    early, late = (SpanMean(start, start + args.span) for start in (skipped, skipped + n_between))
    if n_between <= 0:
        parser.error("give more --tokens, or a smaller --span or --text-tokens: the text must come round at least once")

    begun = time.perf_counter()
    warm_bytes = n_nan = 0
    for position, nll in nll_blocks(llm, text, args.tokens):
        early.add(position, nll)
        late.add(position, nll)
        n_nan += int(np.isnan(nll).sum())
        done = position + len(nll)
        if not warm_bytes and done >= args.warm:
            warm_bytes = resident_bytes()
        if done % 50_176 < llm.n_batch:
            rate = done / (time.perf_counter() - begun)
            print(
                f"{done:>9} tokens  {resident_bytes() / 2**20:7.1f} MiB  {nll.mean():.3f} nats  {rate:6.0f} tok/s",
                flush=True,
            )
    seconds = time.perf_counter() - begun
    end_bytes = resident_bytes()
    info = llm.stream_info()

    figures = {
        "tokens": args.tokens,
        "text_tokens": len(text),
        "seconds": seconds,
        "tokens_per_second": args.tokens / seconds,
        "nan": n_nan,
        "span": args.span,
        "early_start": early.start,
        "early_loss": early.mean,
        "late_start": late.start,
        "late_loss": late.mean,
        "warm_tokens": args.warm,
        "warm_bytes": warm_bytes,
        "end_bytes": end_bytes,
        "kv_bytes": info.kv_bytes,
        "rebases": info.rebases,
        "max_graph_position": info.max_graph_position,
    }
    print(
        f"\n{args.tokens} tokens in {seconds:.0f} s, {n_nan} NaN, {info.rebases} rebases, "
        f"no graph position above {info.max_graph_position}\n"
        f"loss of the same {args.span} tokens: {early.mean:.4f} from {early.start} on, "
        f"{late.mean:.4f} from {late.start} on ({late.mean / early.mean - 1:+.3%})\n"
        f"resident memory: {warm_bytes / 2**20:.2f} MiB after {args.warm} tokens, "
        f"{end_bytes / 2**20:.2f} MiB at the end ({end_bytes / warm_bytes - 1:+.2%}); "
        f"KV cache {info.kv_bytes / 2**20:.2f} MiB"
    )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
