"""Reports whether a GGUF model can have a Λ cache, and what that costs.

--json prints
  model, architecture, n_ctx_train, supported, refusal (a sentence, or null)
and, null without support,
  attention: its implementation here, "fused" or "stock"
  kv_bytes_per_token: {"f16": bytes, ...} for each number format
  window: n_global, n_local, max_distance, n_slack, n_ubatch, kv_type, kv_bytes for the settings given, as estimated
  stock_kv_bytes: what full attention takes at its training length
  recommended: the settings to use, as command line options
"""

from __future__ import annotations

import argparse
from typing import Any

from lminf_edge.cli.common import (
    KV_TYPE_NUMBERS,
    add_model,
    add_window,
    human_bytes,
    model_header,
    print_json,
    resolved_window,
)
from lminf_edge.cli.probe import probe
from lminf_edge.config import kv_bytes, physical_memory
from lminf_edge.gguf_header import Header

HELP = "whether a model is supported, and what its cache costs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_window(parser)


def run(args: argparse.Namespace) -> int:
    path, header = model_header(args.model)
    kv_type = KV_TYPE_NUMBERS[args.kv_type]
    refusal, attention = probe(path, kv_type, args.attention)
    report: dict[str, Any] = {
        "model": path,
        "architecture": header.architecture,
        "n_ctx_train": header.n_ctx_train,
        "supported": refusal is None,
        "refusal": refusal,
        "attention": attention,
        "kv_bytes_per_token": None,
        "window": None,
        "stock_kv_bytes": None,
        "recommended": None,
    }
    if refusal is None:
        report.update(costs(args, header, kv_type))
    if args.json:
        print_json(report)
        return 0
    print(f"model           {path}")
    print(f"architecture    {header.architecture}, trained on {header.n_ctx_train} tokens")
    print(f"supported       {'yes' if refusal is None else 'no: ' + refusal}")
    if refusal is not None:
        return 0
    window = report["window"]
    print(f"attention       {attention}")
    print(f"KV cache        {human_bytes(report['kv_bytes_per_token'][args.kv_type])} per token in {args.kv_type}")
    print(
        f"this window     first {window['n_global']} and last {window['n_local']} tokens: "
        f"{human_bytes(window['kv_bytes'])}, however long the stream"
    )
    print(f"full attention  {human_bytes(report['stock_kv_bytes'])} at {header.n_ctx_train} tokens")
    print(f"recommended     {report['recommended']}")
    return 0


def costs(args: argparse.Namespace, header: Header, kv_type: int) -> dict[str, Any]:
    """The part of the report for supported models: for others the header does not tell."""
    window = resolved_window(args, header)
    n_ubatch = window.default_ubatch()
    return {
        "kv_bytes_per_token": {name: kv_bytes(header, number, 1) for name, number in KV_TYPE_NUMBERS.items()},
        "window": {
            "n_global": window.n_global,
            "n_local": window.n_local,
            "max_distance": window.max_distance,
            "n_slack": window.n_slack,
            "n_ubatch": n_ubatch,
            "kv_type": args.kv_type,
            "kv_bytes": window.kv_bytes(header, kv_type, kv_type, n_ubatch),
        },
        "stock_kv_bytes": kv_bytes(header, kv_type, header.n_ctx_train),
        "recommended": recommend(header, args.n_global),
    }


def recommend(header: Header, n_global: int) -> str:
    """The largest window up to 4096 tokens and the training length that takes at most a quarter of the memory."""
    size = min(4096, header.n_ctx_train or 4096)
    memory = physical_memory()
    f16 = KV_TYPE_NUMBERS["f16"]
    while memory is not None and size > 256 and kv_bytes(header, f16, size) > memory // 4:
        size //= 2
    n_local = max(size - n_global, 1)
    return f"--n-global {n_global} --n-local {n_local} --kv-type f16"
