"""Pages whose words are written by hand, with blocks in them that are made of figures."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import ROOT

from lminf_edge.cli.common import human_bytes

Record = dict[str, Any]
Block = Callable[[dict[str, Record]], str]

NOT_MEASURED = "Not measured.\n"


def load_records(folder: Path) -> dict[str, Record]:
    """The files of one folder, by experiment."""
    records = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json")))
    return {record["experiment"]: record for record in records}


def table(header: Sequence[str], rows: Iterable[Sequence[str]], n_left: int = 1) -> str:
    """A Markdown table; the first n_left columns are text, the others numbers."""
    lines = [header, ["---" if i < n_left else "---:" for i in range(len(header))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: Sequence[float], form: str = "{:.2f}", unit: str = " ×") -> str:
    """Median (least – most), of these three."""
    median, least, most = map(form.format, values)
    return f"{median}{unit} ({least} – {most})"


def block(name: str, make: Callable[[Record], str]) -> Block:
    """A block of one experiment."""
    return lambda records: make(records[name]) if name in records else ""


def machines(records: Mapping[str, Record]) -> str:
    """What each experiment ran on, and once what they have in common."""
    rows, details = [], []
    for name, record in records.items():
        machine = record["machine"]
        used = f"{record['n_threads']} threads" if "n_threads" in record else f"{record['cores']} cores"
        row = [
            f"`{name}`",
            machine["date"],
            f"{record['seconds']:.0f} s",
            f"{machine['cpu']}, {used} of {machine['n_cores']}",
        ]
        rows.append([*row, f"{machine['load_before']:.2f}", machine["commit"] or "not known"])
        compilers, build = machine["compiler"], machine["build"] or {}
        flags = [f"{key}={build[key]}" for key in ("CMAKE_CXX_FLAGS_RELEASE", "GGML_NATIVE") if key in build]
        details += [
            f"{machine['cpu']}: {' '.join(machine['features'])}; {human_bytes(machine['memory_bytes'] or 0)} of "
            f"memory, {machine['system']}, OMP_WAIT_POLICY {machine['omp_wait_policy'] or 'not set'}",
            f"{machine['upstream']}, Python {machine['python']}; {compilers['ours'] or 'compiler not known'}; stock: "
            f"{compilers['stock'] or 'compiler not known'}; "
            + (f"the same CMake flags and ggml options ({', '.join(flags)})" if flags else "build settings not known"),
            *(f"ggml: {system}" for system in [record.get("system", {}).get("ours", "").rstrip(" |")] if system),
        ]
    header = ["experiment", "date", "took", "processor", "load before", "commit"]
    return table(header, rows, 4) + "\n" + "".join(f"- {line}\n" for line in dict.fromkeys(details))


def filled(page: Path, blocks: Mapping[str, Block], records: dict[str, Record]) -> str:
    """A page with every block in it made anew: what is between <!-- NAME --> and <!-- end of NAME -->.

    What makes "" says that it was not measured. Raises ValueError if the page has other blocks.
    """
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^<!-- end of ([\w-]+) -->$", text, re.M)
    if sorted(found) != sorted(blocks):
        raise ValueError(f"{page} should have the blocks {', '.join(blocks)}.")
    for name, make in blocks.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}\n{make(records) or NOT_MEASURED}\n{end}{after}"
    return text


def main(
    name: str,
    blocks: Mapping[str, Block],
    remake: str,
    load: Callable[[Path], dict[str, Record]] = load_records,
    draw: Callable[[dict[str, Record], Path], None] | None = None,
) -> int:
    """The command line of a script that fills the blocks of docs/`name`.md from docs/`name`/*.json."""
    page = ROOT / "docs" / f"{name}.md"
    parser = argparse.ArgumentParser()
    parser.add_argument("--figures", metavar="DIR", type=Path, default=ROOT / "docs" / name)
    parser.add_argument("--page", metavar="FILE", type=Path, default=page, help="write it there")
    args = parser.parse_args()
    try:
        records = load(args.figures)
        if not records:
            raise ValueError(f"There are no figures in {args.figures}: {remake} measures them.")
        if draw:
            draw(records, args.figures)
        args.page.write_text(filled(page, blocks, records), encoding="utf-8")
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.page}")
    return 0
