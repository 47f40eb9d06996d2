"""One million tokens through the embedded model: memory, loss and speed from the first token to the last.

    .venv/bin/python benchmarks/million.py [--tokens N] [--json FILE]

The text is English prose that every Python brings along, over and over, each time from its beginning but in the same
stream. What must not happen over such a length: growing memory, NaN, a loss that drifts.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import time
from pathlib import Path

import numpy as np

from lminf_edge import Llama, LMInfConfig
from lminf_edge.evaluate.nll import nll_blocks

WARM = 50_000  # tokens after which nothing may grow any more


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmRSS.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()

    llm = Llama("nano", lminf=LMInfConfig(n_global=10, n_local=256), verbose=False)
    text = llm.tokenize("\n".join(pydoc_data.topics.topics.values()).encode(), add_bos=False)
    period = len(text)
    tokens = np.resize(np.array(text, dtype=np.int32), args.tokens)
    nll = np.empty(args.tokens - 1)

    begun = time.perf_counter()
    resident: dict[int, int] = {}
    report = 0
    for start, block in nll_blocks(llm, tokens):
        nll[start : start + len(block)] = block
        position = start + len(block)
        if position >= report:
            resident[position] = resident_bytes()
            rate = position / (time.perf_counter() - begun)
            print(f"{position:>9} tokens  {resident[position] / 2**20:7.1f} MiB  {block.mean():.3f} nats  {rate:6.0f} tok/s")
            report += max(WARM, args.tokens // 20)
    seconds = time.perf_counter() - begun
    resident[args.tokens] = resident_bytes()

    info = llm.stream_info()
    # the same text at another time of the stream: whole repetitions apart
    span = min(100_000, args.tokens // 4)
    late = args.tokens - 1 - span
    early = 10_000 + (late - 10_000) % period
    warm = min((position for position in resident if position >= WARM), default=args.tokens)
    figures = {
        "tokens": args.tokens,
        "text_tokens": period,
        "seconds": seconds,
        "tokens_per_second": args.tokens / seconds,
        "nan": int(np.isnan(nll).sum()),
        "loss_early": float(nll[early : early + span].mean()),
        "loss_late": float(nll[late : late + span].mean()),
        "span": span,
        "resident_warm": resident[warm],
        "resident_end": resident[args.tokens],
        "kv_bytes": info.kv_bytes,
        "rebases": info.rebases,
        "max_graph_position": info.max_graph_position,
    }
    print(
        f"\n{args.tokens} tokens in {seconds:.0f} s, {figures['nan']} NaN, {info.rebases} rebases, "
        f"no graph position above {info.max_graph_position}\n"
        f"loss of the same {span} tokens of text: {figures['loss_early']:.4f} from {early}, "
        f"{figures['loss_late']:.4f} from {late} ({figures['loss_late'] / figures['loss_early'] - 1:+.2%})\n"
        f"resident memory: {resident[warm] / 2**20:.1f} MiB after {warm} tokens, {resident[args.tokens] / 2**20:.1f} MiB "
        f"at the end ({resident[args.tokens] / resident[warm] - 1:+.2%}); KV cache {info.kv_bytes / 2**20:.2f} MiB"
    )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
