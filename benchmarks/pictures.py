"""Draws the plots of docs/results.md beside the figures of benchmarks/evidence.py."""

from __future__ import annotations

from pathlib import Path

from measured import (
    Record,
    cells_of,
    curve,
    drift_points,
    is_real,
    kind_of,
    loss_records,
    not_refused,
    recall_records,
    stream_records,
    window_of,
    window_size,
)

from lminf_edge.evaluate import plots
from lminf_edge.evaluate.policies import WITHOUT_RECALL

DIVERGENCE, PASSKEY = "divergence.png", "passkey.png"


def loss_plot(record: Record) -> str:
    return str(record["experiment"]).removesuffix("-f16") + ".png"


def of_kind(name: str, record: Record) -> str:
    """One picture has all real models, and another all toys."""
    return f"{name}{'' if is_real(record) else '-toys'}.png"


def recall_picture(records: dict[str, Record]) -> Record | None:
    """The one that is drawn: of those with several lengths that with most policies, and then with most lengths."""
    found = {}
    for record in recall_records(records):
        if "recall" in record["policies"]:
            n_lengths = len({cell["length"] for cell in record["policies"]["recall"]["cells"]})
            found[n_lengths > 1, len(record["policies"]), n_lengths] = record
    return found[max(found)] if max(found, default=(False,))[0] else None


def draw(everything: dict[str, Record], folder: Path) -> None:
    records = not_refused(everything)
    for record in loss_records(records, "f16"):
        curves = {policy: curve(record, policy) for policy in WITHOUT_RECALL if policy in record["policies"]}
        title = f"{record['model']['name']}, window {window_of(record)}, f16 KV"
        path = folder / loss_plot(record)
        plots.plot_losses(path, curves, record["model"]["n_ctx_train"], window_size(record), title)
    for real in (True, False):
        chosen = kind_of(records, real)
        if found := stream_records(chosen):
            streams = {f"{r['model']['name']}, {r['tokens']:,} tokens": drift_points(r) for r in found}
            title = "Λ stream: the same text, far on and started fresh"
            plots.plot_drift(folder / of_kind("drift", found[0]), streams, title)
        if drawn := recall_picture(chosen):
            cells = {name: cells_of(policy) for name, policy in drawn["policies"].items() if name != "ceiling"}
            what = f"{drawn['settings']['task']}, window {window_of(drawn)}, {drawn['settings']['n_recall']} recalled"
            path = folder / of_kind("recall", drawn)
            plots.plot_passkey(path, cells, f"{drawn['model']['name']}, {what}")
    if kl := records.get("kl-f32") or records.get("kl-f16"):
        policies = {name: (p["edges"], p["bucket_kl"]) for name, p in kl["policies"].items()}
        title = f"Divergence from full attention, {kl['model']['name']}, window {window_of(kl)}"
        plots.plot_divergence(folder / DIVERGENCE, policies, window_size(kl), title)
    if keys := records.get("passkey"):
        cells = {name: cells_of(policy) for name, policy in keys["policies"].items()}
        title = f"Passkey retrieval, {keys['model']['name']}, window {window_of(keys)}"
        plots.plot_passkey(folder / PASSKEY, cells, title)
