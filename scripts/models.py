#!/usr/bin/env python3
"""Writes docs/models.md: what happens to every architecture of the pinned llama.cpp with a Λ cache.

    make models, or: .venv/bin/python scripts/models.py [NAME]...

Builds native/tests/test-archs, which makes a tiny random model of each architecture, runs it for all of them and makes
the page of what it says and of tests/native/architectures.json. With names: prints what it says about those, writes
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".venv" / "bin"
PAGE = ROOT / "docs" / "models.md"
EXPECTED = ROOT / "tests" / "native" / "architectures.json"

Result = dict[str, Any]

# what several threads wait for is slow, and what one process does of its own needs none
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1"}
TIMEOUT = 300  # seconds; a model takes one or two


class ModelsError(Exception):
    """One sentence for the user."""


def expected() -> dict[str, Result]:
    """What each model should come to, by its name: ARCH or ARCH/VARIANT."""
    data: dict[str, Result] = json.loads(EXPECTED.read_text())
    return data


# --- running ----------------------------------------------------------------------------------------------------------


def build() -> Path:
    """The program, built in the folder that `make setup` has built the library in: it is linked with that one."""
    folders = sorted(ROOT.glob("build/py3-none-*/CMakeCache.txt"), key=lambda path: path.stat().st_mtime)
    if not folders:
        raise ModelsError("build/ has no library: make setup.")
    folder = folders[-1].parent
    env = os.environ | {"PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"}
    for command in (
        ["cmake", "-DLMINF_TESTS=ON", str(folder)],
        ["cmake", "--build", str(folder), "--target", "test-archs"],
    ):
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout[-5000:], done.stderr[-5000:], file=sys.stderr)
            raise ModelsError(f"{' '.join(command)} failed.")
    return folder / "bin" / "test-archs"


def names(program: Path) -> list[str]:
    """All models that the program can make."""
    return run(program, "--list").stdout.splitlines()


def run(program: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | ENVIRONMENT
    return subprocess.run([str(program), *args], env=env, capture_output=True, text=True, timeout=TIMEOUT)


def check(program: Path, name: str, *options: str) -> Result:
    """What the program says about a model; a crash is a verdict as well."""
    try:
        done = run(program, *options, name)
    except subprocess.TimeoutExpired:
        return {"name": name, "verdict": "hangs", "why": f"no answer in {TIMEOUT} s"}
    if done.returncode == 0:
        result: Result = json.loads(done.stdout)
        return result
    lines = done.stderr.strip().splitlines() or [""]
    return {"name": name, "verdict": "none" if done.returncode == 1 else "crashes", "why": lines[-1]}


def check_all(program: Path, which: Iterable[str]) -> dict[str, Result]:
    """The same for many, on all cores: each model is a process of its own."""
    which = list(which)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(which, pool.map(lambda name: check(program, name), which), strict=True))


# --- the page ---------------------------------------------------------------------------------------------------------

HEAD = """# Models

Written by `scripts/models.py` (`make models`) from what `native/tests/test-archs` finds: do not edit. `make test` fails
when this page is not what it finds, and when the pinned llama.cpp has an architecture that is not here.

Each architecture is tried as a tiny random model, with a window of 64 tokens and 4 sinks. While the text is shorter
than the window it gives what llama.cpp's own cache gives. Past it, it gives the same with rebased and with plain
positions, alone and beside another sequence, after saving and restoring, after a rollback, and with fused and with
stock operations. Layers are counted by what bounds them:

- **Λ**: full attention in training; sinks and window here.
- **sliding**: a sliding window in training; the same window here.
- **recurrent**: a state of constant size; the same here. It has seen every token once.

A word behind an architecture is a kind of file: `full` is one without the sliding window that others have, `dense` one
without sparse attention, `text` one without M-RoPE, `moe` one with experts. M-RoPE, MLA, a temperature by position,
chunks in place of a sliding window, ALiBi, adapters that tokens turn on and a selection of tokens are noted, and where
attention is computed by stock operations only. Where tokens are selected, no more of them may be in view.

Bytes are those of the tiny model's memory in f16: with a Λ cache, and what llama.cpp's own needs for 10,000 tokens.
The first number stays where it is, whatever the length of the text.
"""

GROUPS = {  # by what else they have: sliding, recurrent layers
    (False, False): "Λ on every layer",
    (True, False): "Λ and sliding layers",
    (False, True): "Λ and recurrent layers",
    (True, True): "Λ, sliding and recurrent layers",
}


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: int = 0) -> str:
    """A table whose last `right` columns are numbers."""
    rule = ["---"] * (len(header) - right) + ["---:"] * right
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows)) + "\n"


def is_shown(name: str, data: Mapping[str, Result]) -> bool:
    """Variants are shown where there are files like them; the others are there to be tested."""
    return "/" not in name or "models" in data[name]


def title(name: str) -> str:
    arch, _, variant = name.partition("/")
    return f"`{arch}`" + (f", {variant}" if variant else "")


def number(value: int) -> str:
    return f"{value:,}"


def running(results: Mapping[str, Result], data: Mapping[str, Result]) -> str:
    parts = []
    for kinds, heading in GROUPS.items():
        rows = []
        for name, result in results.items():
            layers, size = result["layers"], result["bytes"]
            if kinds != (layers["sliding"] > 0, layers["recurrent"] > 0):
                continue
            ours = size["window"] + size["sinks"] + size["sliding"] + size["recurrent"]
            counts = [str(layers[kind] or "") for kind in ("full", "sliding", "recurrent")]
            is_fused = layers["fused"] == layers["full"] + layers["sliding"]
            notes = ", ".join([*result["traits"], *([] if is_fused else ["stock operations"])])
            rows.append(
                [title(name), data[name].get("models", ""), notes, *counts, number(ours), number(size["stock"])]
            )
        header = ("architecture", "models", "notes", "Λ", "sliding", "recurrent", "bytes", "stock bytes")
        if rows:
            parts.append(f"### {heading}\n\n{table(header, rows, right=5)}")
    return "\n".join(parts)


def reason(result: Result) -> str:
    """A refusal without its beginning, which names the architecture."""
    why: str = result["why"]
    return why.split("Λ cache: ", 1)[-1]


def refused(results: Mapping[str, Result], data: Mapping[str, Result]) -> str:
    groups: dict[str, list[str]] = {}
    for name, result in results.items():
        models = data[name].get("models")
        groups.setdefault(reason(result), []).append(title(name) + (f" ({models})" if models else ""))
    return "\n".join(f"- {why}:\n  {', '.join(members)}" for why, members in groups.items()) + "\n"


def page(results: Mapping[str, Result]) -> str:
    data = expected()

    def having(verdict: str) -> dict[str, Result]:
        return {
            name: result for name, result in results.items() if result["verdict"] == verdict and is_shown(name, data)
        }

    def architectures(verdict: str) -> set[str]:
        return {name.partition("/")[0] for name in having(verdict)}

    constant = [[title(name), data[name].get("models", "")] for name in having("constant")]
    unknown = [[title(name), data[name].get("models", ""), data[name]["why"]] for name in having("none")]
    return "\n".join(
        [
            HEAD,
            f"## {len(architectures('runs'))} architectures run\n",
            running(having("runs"), data),
            f"## {len(architectures('constant'))} need no Λ cache\n",
            "Recurrent on every layer: constant already. `lminf=True`, the command line and the server run them as they"
            " are.\n",
            table(("architecture", "models"), constant),
            f"## {len(architectures('refused') - architectures('runs'))} are refused\n",
            refused(having("refused"), data),
            f"## {len(architectures('none'))} are no models of their own\n",
            table(("architecture", "models", "what it is"), unknown),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", metavar="NAME", nargs="*", help="ARCH or ARCH/VARIANT")
    args = parser.parse_args()
    try:
        program = build()
        results = check_all(program, args.names or names(program))
        if args.names:
            for result in results.values():
                print(json.dumps(result, ensure_ascii=False, indent=2))
            return 0
        unknown = results.keys() - expected().keys()
        if unknown:
            raise ModelsError(
                f"{EXPECTED.relative_to(ROOT)} does not say what to expect of {', '.join(sorted(unknown))}."
            )
        PAGE.write_text(page(results))
        print(f"wrote {PAGE.relative_to(ROOT)}")
    except ModelsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
