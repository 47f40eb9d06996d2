"""Compares caches with the vectors.

    python run.py oracle_itself                    # an adapter: a module of adapters/
    python run.py this_build --out results         # and keep what was found
    python run.py --losses mine.json               # losses from anywhere: {"tiny": {"lminf": [...]}, "nano": {...}}
    python run.py --page ../docs/conformance.md    # put what was kept into that page

Ends with status 1 if something that was compared does not conform.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from implementation import Implementation
from vectors import Difference, compare, load_all, nearest

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- {} -->\n", "<!-- end -->"


def from_file(path: Path) -> Any:
    """An adapter that computes nothing."""
    record = json.loads(path.read_text(encoding="utf-8"))

    def implementations(vectors: Any) -> Iterator[Implementation]:
        for case, losses in record.get(vectors.name, {}).items():
            yield Implementation(path.name, "from a file", case, partial(np.asarray, losses))

    return SimpleNamespace(VERSIONS={}, implementations=implementations)


def run(adapter: Any, only: str = "") -> list[dict[str, Any]]:
    """A record for each of the adapter's implementations whose name contains `only`, and prints it."""
    records = []
    for vectors in load_all():
        for one in adapter.implementations(vectors):
            if only not in f"{vectors.name} {one.case} {one.name} {one.how}":
                continue
            record: dict[str, Any] = {"vectors": vectors.name, "name": one.name, "how": one.how, "case": one.case}
            try:
                losses = np.asarray(one.losses(), dtype=np.float64)
                found = compare(losses, vectors.cases[one.case].losses, vectors.tolerance, one.case)
                record["loss"] = float(losses.mean())
                record["found"] = asdict(found)
                near = nearest(losses, vectors)
                if near.conforms and near.case != one.case:
                    record["conforms to"] = asdict(near)
                if one.explained is not None:
                    expected = vectors.oracle.losses(vectors.tokens, one.explained)
                    record["explained"] = asdict(compare(losses, expected, vectors.tolerance, "explained"))
            except Exception as error:  # whatever it is, it is what this implementation does
                record["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(line(record), flush=True)
            records.append(record)
    return records


def conforms(record: dict[str, Any]) -> bool:
    return "found" in record and record["found"]["first"] is None


def line(record: dict[str, Any]) -> str:
    start = f"{record['vectors']}, {record['name']}, {record['how']}: {record['case']}"
    if "error" in record:
        return f"{start}: {record['error']}"
    found = Difference(**record["found"])
    return f"{start}: largest {found.largest:.1e}, mean {found.mean:.1e}, {verdict(record)}"


def verdict(record: dict[str, Any]) -> str:
    if "error" in record:
        return str(record["error"])
    if conforms(record):
        return "the same"
    if "conforms to" in record:
        return f"the same as {record['conforms to']['case']}"
    if "explained" in record:
        explained = Difference(**record["explained"])
        if explained.conforms:
            return "differ, as is said below"
        return f"differ, by {explained.largest:.1e} from what is said below as well"
    return "differ"


def rows(records: list[dict[str, Any]]) -> Iterator[str]:
    """Of a Markdown table: one for all records of a cache that conform, else for each way that the tokens come in.

    It has the largest differences among them.
    """
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        how = "" if conforms(record) else record["how"]
        alike.setdefault((record["name"], record["case"], verdict(record), how), []).append(record)
    yield "| cache | tokens come in | compared with | largest | mean | first token that differs | losses |"
    yield "| --- | --- | --- | ---: | ---: | ---: | --- |"
    for (name, case, said, _), group in alike.items():
        how = "; ".join(dict.fromkeys(record["how"] for record in group))
        found = [Difference(**record["found"]) for record in group if "found" in record]
        if not found:
            yield f"| {name} | {how} | {case} | – | – | – | {said} |"
            continue
        firsts = [str(one.first) for one in found if one.first is not None]
        first = " / ".join(dict.fromkeys(firsts)) or "–"
        largest, mean = max(one.largest for one in found), max(one.mean for one in found)
        yield f"| {name} | {how} | {case} | {largest:.1e} | {mean:.1e} | {first} | {said} |"


def page(text: str, kept: dict[str, dict[str, Any]]) -> str:
    """The text with a new table after each line that names a file of results."""
    for name, record in kept.items():
        begin = BEGIN.format(name)
        if begin not in text:
            raise ValueError(f"the page has no place for {name}: {begin.strip()} ... {END}")
        before, after = text.split(begin)
        versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
        table = "\n".join(rows(record["records"]))
        text = f"{before}{begin}{versions}.\n\n{table}\n{after[after.index(END) :]}"
    return text


def kept_results() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("adapter", nargs="?", help="the name of a module of adapters/")
    parser.add_argument("--losses", metavar="FILE", type=Path, help="instead: losses by vectors and case")
    parser.add_argument("--only", metavar="TEXT", default="", help="implementations with this in their names")
    parser.add_argument("--out", metavar="DIR", type=Path, help="keep what was found as DIR/NAME.json")
    parser.add_argument("--as", metavar="NAME", dest="name", help="its NAME; default: the adapter's")
    parser.add_argument("--page", metavar="FILE", type=Path, help="put what was kept into this page")
    args = parser.parse_args()
    if bool(args.adapter) + bool(args.losses) + bool(args.page) != 1:
        parser.error("give an adapter, --losses or --page")
    if args.page:
        args.page.write_text(page(args.page.read_text(encoding="utf-8"), kept_results()), encoding="utf-8")
        return 0
    warnings.simplefilter("ignore")
    adapter = from_file(args.losses) if args.losses else importlib.import_module(f"adapters.{args.adapter}")
    records = run(adapter, args.only)
    if args.out:
        versions = {"Python": platform.python_version(), **adapter.VERSIONS}
        text = json.dumps({"versions": versions, "records": records}, indent=1, ensure_ascii=False)
        (args.out / f"{args.name or args.adapter}.json").write_text(text + "\n", encoding="utf-8")
    return int(not all(map(conforms, records)))


if __name__ == "__main__":
    sys.exit(main())
