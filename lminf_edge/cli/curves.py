"""What was measured of a text, by position, and how it is shown."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lminf_edge.evaluate.buckets import Bucket, BucketMeans


@dataclass(frozen=True)
class Stage:
    """A range of positions that has a line of its own below a comparison."""

    name: str
    title: str
    start: int
    end: int


@dataclass
class Curve:
    """What was measured of one policy."""

    nll: BucketMeans
    kl: BucketMeans | None = None
    stages: dict[Stage, BucketMeans] = field(default_factory=dict)


def report(curve: Curve, n_stretches: int | None) -> dict[str, Any]:
    """As --json prints it."""
    result: dict[str, Any] = {
        "tokens": curve.nll.count,
        "mean_nll": curve.nll.mean,
        "buckets": [_bucket_report(bucket, "mean_nll") for bucket in curve.nll.buckets()],
    }
    if curve.stages:
        result["stages"] = {stage.name: means.mean for stage, means in curve.stages.items() if means.count}
    if curve.kl is not None and curve.kl.count:
        result["kl"] = {
            "stretches": n_stretches,
            "tokens": curve.kl.count,
            "mean_kl": curve.kl.mean,
            "buckets": [_bucket_report(bucket, "mean_kl") for bucket in curve.kl.buckets()],
        }
    return result


def _bucket_report(bucket: Bucket, name: str) -> dict[str, Any]:
    return {"start": bucket.start, "end": bucket.end, name: bucket.mean}


def _perplexity(mean_nll: float) -> float:
    """Infinite where it is beyond floating-point numbers: some models mask tokens with the most negative logit."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf


def print_one(one: dict[str, Any]) -> None:
    print("    positions         nats per token")
    for bucket in one["buckets"]:
        print(f"{bucket['start']:>8} .. {bucket['end']:<8}  {bucket['mean_nll']:.4f}")
    print(
        f"{one['tokens']} tokens, {one['mean_nll']:.4f} nats per token, perplexity {_perplexity(one['mean_nll']):.2f}"
    )


def print_table(curves: dict[str, Curve], n_stretches: int | None) -> None:
    widths = {name: max(len(name), 8) for name in curves}

    def line(title: str, values: dict[str, float | None]) -> None:
        cells = (f"{'-' if value is None else f'{value:.4f}':>{widths[name]}}" for name, value in values.items())
        print(f"{title:<20}  {'  '.join(cells)}".rstrip())

    def rows(means: dict[str, BucketMeans | None]) -> None:
        by_name = {name: {b.start: b for b in m.buckets()} if m else {} for name, m in means.items()}
        for start in sorted({start for buckets in by_name.values() for start in buckets}):
            end = max(buckets[start].end for buckets in by_name.values() if start in buckets)
            values = {name: buckets[start].mean if start in buckets else None for name, buckets in by_name.items()}
            line(f"{start:>8} .. {end:<8}", values)

    print(f"{'nats per token':<20}  {'  '.join(f'{name:>{width}}' for name, width in widths.items())}")
    rows({name: curve.nll for name, curve in curves.items()})
    for stage in dict.fromkeys((each.name, each.title) for curve in curves.values() for each in curve.stages):
        means = {name: _stage_mean(curve, stage[0]) for name, curve in curves.items()}
        if any(mean is not None for mean in means.values()):
            line(stage[1], means)
    line("all", {name: curve.nll.mean for name, curve in curves.items()})
    line("perplexity", {name: _perplexity(curve.nll.mean) for name, curve in curves.items()})
    if any(curve.kl for curve in curves.values()):
        print(f"\nKL divergence to full attention, nats, {n_stretches} stretches")
        rows({name: curve.kl for name, curve in curves.items()})
        line("all", {name: curve.kl.mean if curve.kl else None for name, curve in curves.items()})


def _stage_mean(curve: Curve, name: str) -> float | None:
    return next((means.mean for stage, means in curve.stages.items() if stage.name == name and means.count), None)


def write_csv(path: Path, curves: dict[str, Curve]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["policy", "measure", "start", "end", "mean"])
        for name, curve in curves.items():
            for measure, means in (("nll", curve.nll), ("kl", curve.kl)):
                for bucket in means.buckets() if means else ():
                    writer.writerow([name, measure, bucket.start, bucket.end, bucket.mean])
