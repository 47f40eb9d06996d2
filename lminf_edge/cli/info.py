"""Reports whether a GGUF model can have a Λ cache, and what that costs, from the file without its weights.

Exit status 1 if the model cannot be used.

--json prints
  model, architecture, n_ctx_train, supported, refusal (a sentence, or null)
and, null without support,
  needs_lambda: false for a purely recurrent model, which remembers in a state of constant size and runs as it is
  attention: its implementation here, "fused" or "stock", null if there is none
  layers: {"full", "sliding", "recurrent"}: layers that attend to the window, that have a sliding window of their own,
  and that have a recurrent state
  kv_bytes_per_token: {"f16": bytes, ...} of the window for each number format, null for one the model cannot have
  constant_kv_bytes: bytes beside the window in f16, whatever its size
  window: n_global, n_local, max_distance, n_slack, n_ubatch, kv_type, kv_bytes for the settings given
  recall: null without --recall, else n_recall, distance, archive_tokens, archive_type, and archive_bytes_per_token and
  archive_bytes of one stream, in the host's memory (null if the library does not tell); files: null without --archive,
  else folder, n_segments and bytes of all archives that are there
  stock_kv_bytes: what llama.cpp's own cache takes at the training length
  recommended: the settings to use, as command line options
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lminf_edge.cli.common import (
    KV_TYPE_NUMBERS,
    CommandError,
    describe_layers,
    human_bytes,
    model_header,
    options_named,
    print_json,
    resolved_window,
    weightless,
)
from lminf_edge.cli.options import add_model, add_window
from lminf_edge.config import DEFAULT_WINDOW, IN_MEMORY, Parts, Window, physical_memory, warn_of_window
from lminf_edge.errors import UserError
from lminf_edge.gguf_header import Header

if TYPE_CHECKING:
    from lminf_edge.weightless import Layout, Weightless

HELP = "whether a model is supported, and what its cache costs"

FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_window(parser)


def run(args: argparse.Namespace) -> int:
    path, header = model_header(args.model)
    report: dict[str, Any] = {
        "model": path,
        "architecture": header.architecture,
        "n_ctx_train": header.n_ctx_train,
        "supported": True,
        "refusal": None,
        "needs_lambda": None,
        "attention": None,
        "layers": None,
        "kv_bytes_per_token": None,
        "constant_kv_bytes": None,
        "window": None,
        "recall": None,
        "stock_kv_bytes": None,
        "recommended": None,
    }
    window = resolved_window(args, header)
    kv_type, layout = KV_TYPE_NUMBERS[args.kv_type], None
    with ExitStack() as stack:
        try:
            model = stack.enter_context(weightless(path))
            refusal = model.refusal(kv_type, args.attention)
        except UserError as error:
            if "unknown model architecture" not in str(error):
                raise
            refusal = str(error)
        if refusal is None:
            with options_named():
                layout = model.layout(window, kv_type, window.default_ubatch())
            report.update(costs(args, header, model, window, layout))
        else:
            report.update(supported=False, refusal=refusal)
    if args.json:
        print_json(report)
    else:
        print(f"model           {path}")
        print(f"architecture    {header.architecture}, trained on {header.n_ctx_train} tokens")
        if layout is None:
            print(f"supported       no: {report['refusal']}")
        else:
            print_costs(args, report, layout)
    return 0 if report["supported"] else FAILED


def costs(
    args: argparse.Namespace, header: Header, model: Weightless, window: Window, layout: Layout
) -> dict[str, Any]:
    """The part of the report for supported models. Raises UserError if there is no such window."""
    parts = layout.parts
    layers = {"full": parts.n_layer_full, "sliding": parts.n_layer_sliding, "recurrent": parts.n_layer_recurrent}
    report: dict[str, Any] = {"needs_lambda": not model.is_constant, "attention": layout.attention, "layers": layers}
    if model.is_constant:
        return report | {"constant_kv_bytes": parts.kv_bytes, "stock_kv_bytes": parts.kv_bytes}
    with options_named():
        warn_of_window(window, header.n_ctx_train or DEFAULT_WINDOW, model.n_swa if parts.n_layer_sliding else 0)
    kv_type = KV_TYPE_NUMBERS[args.kv_type]
    n_small = min(256, window.n_local)
    small = replace(window, n_local=n_small, max_distance=n_small)
    layouts: dict[str, Layout | None] = {}
    for name, number in KV_TYPE_NUMBERS.items():
        try:
            layouts[name] = model.layout(small, number)
        except UserError:  # the size of its heads does not divide by that of the format's blocks
            layouts[name] = None
    f16 = layouts["f16"]
    assert f16 is not None
    return report | {
        "kv_bytes_per_token": {name: each and each.bytes_per_token for name, each in layouts.items()},
        "constant_kv_bytes": f16.parts.constant_bytes,
        "window": {
            "n_global": window.n_global,
            "n_local": window.n_local,
            "max_distance": window.max_distance,
            "n_slack": window.n_slack,
            "n_ubatch": window.default_ubatch(),
            "kv_type": args.kv_type,
            "kv_bytes": parts.kv_bytes,
        },
        "recall": recall_report(window, parts, args.archive),
        "stock_kv_bytes": model.stock_bytes(header.n_ctx_train or model.n_ctx_train, kv_type),
        "recommended": recommend(header, f16, model.n_swa if parts.n_layer_sliding else 0, window),
    }


def recall_report(window: Window, parts: Parts, archive: str) -> dict[str, Any] | None:
    """What is recalled, what the archive of a stream takes when it is full, and what archives in files take now; None
    without recall."""
    if window.n_recall == 0:
        return None
    return {
        "n_recall": window.n_recall,
        "distance": window.recall_distance,
        "archive_tokens": parts.n_archive,
        "archive_type": window.archive_type_k,
        "archive_bytes_per_token": parts.archive_token_bytes or None,
        "archive_bytes": parts.n_archive * parts.archive_token_bytes or None,
        "files": None if archive == IN_MEMORY else archive_files(Path(archive)),
    }


def archive_files(folder: Path) -> dict[str, Any]:
    """What the archives in a folder take, of whatever model. Raises CommandError if it cannot be read."""
    from lminf_edge.cache.segments import segment_sizes

    try:
        sizes = segment_sizes(folder)
    except OSError as error:
        raise CommandError(f"The archive in {folder} cannot be read: {error.strerror or error}.") from error
    return {"folder": str(folder), "n_segments": len(sizes), "bytes": sum(sizes)}


def recommend(header: Header, f16: Layout, n_swa: int, window: Window) -> str:
    """The largest window up to 4096 tokens, or up to the window of sliding layers, and up to the training length and
    what the model selects, that takes at most a quarter of the memory."""
    longest = max(4096, n_swa)
    size = min(longest, header.n_ctx_train or longest)
    memory = physical_memory()
    while memory is not None and size > 256 and f16.bytes_per_token * size + f16.parts.constant_bytes > memory // 4:
        size //= 2
    n_local = max(min(size - window.n_global, header.most_local(window.n_global, window.n_recall)), 1)
    return f"--n-global {window.n_global} --n-local {n_local} --kv-type f16"


def print_costs(args: argparse.Namespace, report: dict[str, Any], layout: Layout) -> None:
    parts = layout.parts
    if not report["needs_lambda"]:
        print("supported       yes, as it is: it needs no Λ cache")
        print(f"layers          {describe_layers(parts)}")
        print(f"memory          {human_bytes(parts.kv_bytes)}, however long the stream")
        return
    window = report["window"]
    print("supported       yes")
    print(f"attention       {layout.attention}")
    if parts.n_kinds > 1:
        print(f"layers          {describe_layers(parts)}")
    print(f"KV cache        {human_bytes(report['kv_bytes_per_token'][args.kv_type])} per token in {args.kv_type}")
    print(
        f"this window     first {window['n_global']} and last {window['n_local']} tokens: "
        f"{human_bytes(window['kv_bytes'])}, however long the stream"
    )
    if recall := report["recall"]:
        print(f"recall          {recall['n_recall']} tokens in each layer, of the last {recall['archive_tokens']}")
        if recall["archive_bytes"]:
            print(
                f"archive         {human_bytes(recall['archive_bytes'])} in {recall['archive_type']} per stream, "
                f"{human_bytes(recall['archive_bytes_per_token'])} per token"
            )
        if files := recall["files"]:
            print(f"archive files   {human_bytes(files['bytes'])} in {files['n_segments']} files in {files['folder']}")
    print(f"full attention  {human_bytes(report['stock_kv_bytes'])} at {report['n_ctx_train']} tokens")
    print(f"recommended     {report['recommended']}")
