"""The section of docs/performance.md about GPUs, from what benchmarks/gpu.py measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lminf_edge.bench.alternate import Ratio, Result, ratio
from lminf_edge.cli.common import human_bytes

Record = dict[str, Any]
Table = Callable[..., str]

NAMES = {"llama-3.2-1b": "Llama-3.2-1B", "qwen3-0.6b": "Qwen3-0.6B", "llama-2-7b": "Llama-2-7B"}


def load(folder: Path) -> dict[str, Record]:
    records = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json")))
    return {record["experiment"]: record for record in records}


def times(value: Ratio) -> str:
    return f"{value.median:.2f} × ({value.min:.2f} – {value.max:.2f})"


def speed(result: Result) -> str:
    return f"{result.median:,.0f}"


def models(records: dict[str, Record], test: str, table: Table) -> str:
    """Λ with a full window beside stock with as many tokens, and with 32k."""
    rows = []
    for shape, name in NAMES.items():
        for kv_type in ("f16", "q8_0"):
            record = records.get(f"{test}-{shape}-{kv_type}")
            if record is None:
                continue
            results = [Result.from_json(value) for value in record["results"]]
            ours = [r for r in results if r.contender.cache == "lambda"]
            stock = {r.contender.depth: r for r in results if r.contender.cache == "full"}
            far = stock[max(stock)]
            for full in (r for r in ours if r.contender.depth):
                window = full.contender.window
                (empty,) = (r for r in ours if r.contender.window == window and not r.contender.depth)
                same = stock[window]
                rows.append(
                    [
                        name,
                        kv_type,
                        f"{window:,}",
                        speed(full),
                        speed(same),
                        times(ratio(full, same)),
                        speed(far),
                        times(ratio(full, far)),
                        speed(empty),
                        speed(stock[0]),
                        f"{human_bytes(full.kv_bytes)} / {human_bytes(far.kv_bytes)}",
                    ]
                )
    if not rows:
        return ""
    header = [
        "model",
        "KV",
        "window",
        "Λ",
        "stock, as many",
        "ratio",
        "stock, 32k",
        "ratio",
        "Λ, empty",
        "stock, empty",
    ]
    return table([*header, "KV size: Λ / stock, 32k"], rows, 2)


def attention(record: Record, table: Table) -> str:
    speeds = {line["what"]: line["gb_per_s"] for line in record["results"] if line["what"] != "attention"}
    rows = []
    for line in record["results"]:
        if line["what"] != "attention" or line["n_q"] == 4:
            continue
        seconds = line["fused_us"] * 1e-6
        stock = line["flash_us"]
        rate = f"{line['gb'] / seconds:,.0f} GB/s" if line["n_q"] == 1 else f"{line['tflop'] / seconds:,.0f} TFLOP/s"
        rows.append(
            [line["shape"], line["kv"], str(line["n_q"]), f"{line['n_kv']:,}", f"{line['fused_us']:.1f}", rate]
            + (["–", "–"] if stock is None else [f"{stock:.1f}", f"{line['ratio']:.2f} ×"])
        )
    return (
        f"The operation alone, microseconds per layer, {record['n_rounds']} rounds; stock is `FLASH_ATTN_EXT` on the "
        "same K and V. GB/s counts K and V once. "
        f"A copy moves {speeds['copy']:,.0f} GB/s, bytes read and written; decoding's product of Q4_0 matrices and a "
        f"vector reads {speeds['product']:,.0f} GB/s of matrices. [attention.json](performance/cuda/attention.json)\n\n"
        + table(["shape", "KV", "queries", "cells", "ours", "is", "stock", "stock / ours"], rows, 2)
    )


def correctness(records: dict[str, Record]) -> list[str]:
    lines = []
    if "operations" in records:
        record = records["operations"]
        lines.append(
            f"The operation against float64 on random inputs: {record['n_run']:,} cases, {record['n_failed']} failed, "
            f"{record['n_declined']} declined; largest NMSE {max(record['worst_nmse'].values()):.1e}."
        )
    if "models" in records:
        record = records["models"]
        largest = max(error for _, error in record["worst_nmse"].values())
        lines.append(
            f"Tiny random models of {record['n_models']} architectures with all layers there, against the CPU, stock "
            f"operations and themselves: {len(record['failures'])} failures; largest NMSE {largest:.1e}."
        )
    else:
        lines.append("Not run to the end there: every architecture as a tiny random model (the part `models`).")
    if "loss" in records:
        window = records["loss"]["window"]
        for r in records["loss"]["results"]:
            lines.append(
                f"`{r['model']}`, {r['n_tokens']:,} tokens with a window of {window}, {r['kv_type']} KV: "
                f"{r['mean_gpu']:.4f} nats per token, on the CPU {r['mean_cpu']:.4f}; a token differs by "
                f"{r['mean_difference']:.4f} on average, by {r['max_difference']:.2f} at most."
            )
    return lines


TEXT = """One card was measured, and a fast one. At equal numbers of tokens the fused attention is slower there than
stock flash attention in decoding: a window of 1,024 takes it some 15 µs per layer, in which memory is hardly busy, and
stock 5 to 8. What a bounded window saves shows against a long context only, and most in the 7B model. In prefill the
operation alone is faster than stock where each query head has K and V of its own, slower where heads share them.
Quantized K and V are converted by each block anew, which costs most. With a window of 1,024 Λ's micro-batches have 256
tokens, stock's 512.

Stock is the pinned llama.cpp, built for the same card, with flash attention. Λ stands at twice the window, all of it
computed; "as many" is stock with as many tokens as the window has, "32k" with 32,768. Tokens per second, medians of
{n_rounds} rounds in turn, ratios within a round (least – most), Q4_0 weights, random.
"""


def section(folder: Path, table: Table) -> str:
    """Markdown; "" where no GPU was measured."""
    records = load(folder)
    if not records:
        return ""
    first = next(iter(records.values()))
    machine, card = first["machine"], first["machine"]["card"]
    measured = [record for name, record in records.items() if name.startswith(("decode-", "prefill-"))]
    n_rounds = min((record["n_rounds"] for record in measured), default=0)
    parts: Sequence[str] = [
        f"## On a GPU: {card['name']}\n",
        f"{machine['date']}: {card['name']}, {card['memory']}, driver {card['driver']}, {card['compiler']}; "
        f"{machine['upstream']}, commit {machine['commit'] or 'not known'}. `make gpu` builds, tests and measures this "
        "again on the machine's own card.\n",
        TEXT.format(n_rounds=n_rounds),
        "### Decode, 64 tokens\n",
        models(records, "decode", table),
        "### Prefill, 512 tokens\n",
        models(records, "prefill", table),
        *(["### Attention\n", attention(records["attention"], table)] if "attention" in records else []),
        "### Right there, too\n",
        "\n".join(f"- {line}" for line in correctness(records)) + "\n",
    ]
    return "\n".join(part for part in parts if part)
