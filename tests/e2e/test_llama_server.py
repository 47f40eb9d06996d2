#!/usr/bin/env python3
"""llama-server's own tests, from the pinned sdist, against `lminf-edge serve`.

Every one of them passes but those in llama_server/left_out.txt, each with its reason; those do not pass. Files that are
left out as a whole are about what is not here, and are not run. To see what does what, with pytest's options to choose
some:

    python tests/e2e/test_llama_server.py [-k NAME] [-x]
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ADAPTER = HERE / "llama_server"
ROOT = HERE.parents[1]
PARTS = ("tools/server/tests/", "models/templates/", "models/ggml-vocab-bert-bge.gguf")


@dataclass(frozen=True)
class Outcome:
    """Of one of llama-server's tests: "passed", "failed" or "skipped", and why."""

    id: str
    outcome: str
    reason: str


def stories() -> Path | None:
    """llama-server's test model, which is not ours to pass on."""
    shared = Path(os.environ.get("LMINF_SHARED") or ROOT.parent / "shared")
    found = (folder / "stories260K.gguf" for folder in (shared / "models", ROOT / "build" / "models"))
    return next((path for path in found if path.is_file()), None)


def unpack(folder: Path) -> Path:
    """The tests and what they read, with our conftest.py; returns the folder to run them in."""
    [sdist] = (ROOT / "build" / "upstream").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        for member in archive:
            name = member.name.partition("/vendor/llama.cpp/")[2]
            if member.isfile() and name.startswith(PARTS):
                source = archive.extractfile(member)
                assert source is not None
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(source.read())
    tests = folder / "tools" / "server" / "tests"
    for file in ADAPTER.glob("*.py"):
        shutil.copy(file, tests)
    return tests


def run(folder: Path, model: Path, *arguments: str) -> list[Outcome]:
    """Runs the tests in `folder`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    results = folder / "results.json"
    environment = os.environ | {"LMINF_STORIES": str(model), "LMINF_TEST_PORT": str(port), "OMP_WAIT_POLICY": "passive"}
    environment |= {"LMINF_TEST_RESULTS": str(results), "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-m", "pytest", "unit", "-q", "-p", "no:cacheprovider", "-m", "not slow", *arguments]
    command += [f"--ignore=unit/{entry}" for entry in left_out() if is_file(entry)]
    with (folder / "output.txt").open("w") as output:
        subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=output, timeout=1200)
    assert results.exists(), (folder / "output.txt").read_text()[-2000:]
    return [Outcome(**each) for each in json.loads(results.read_text())]


def left_out() -> dict[str, str]:
    """The beginnings of the ids of tests that are left out, and why: a line with the reason, then the ids, indented."""
    table, reason = {}, ""
    for line in (ADAPTER / "left_out.txt").read_text().splitlines():
        if line.startswith(" "):
            table[line.strip()] = reason
        elif line.strip():
            reason = line.strip()
    return table


def is_file(entry: str) -> bool:
    return "::" not in entry


def covers(entry: str, test: str) -> bool:
    """Whether an id of the table, a test or one with its parameters, is that of `test` or begins it."""
    return test == entry or test.startswith(f"{entry}[")


@pytest.mark.skipif(stories() is None, reason="stories260K.gguf is neither in the shared folder nor in build/models")
def test_llama_servers_own_tests(tmp_path: Path) -> None:
    model = stories()
    assert model is not None
    table = left_out()
    wrong, used = [], set()
    for each in run(unpack(tmp_path), model):
        entries = [entry for entry in table if covers(entry, each.id)]
        used.update(entries)
        if entries and each.outcome == "passed":
            wrong.append(f"passes, but is in the table: {each.id}")
        elif not entries and each.outcome != "passed":
            wrong.append(f"{each.outcome}: {each.id}: {each.reason}")
    wrong += [f"no test is called {entry}" for entry in table.keys() - used if not is_file(entry)]
    assert not wrong, "\n".join(wrong)


def main() -> int:
    model = stories()
    if model is None:
        print("stories260K.gguf is neither in the shared folder nor in build/models.")
        return 1
    table = left_out()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for each in run(unpack(Path(folder)), model, *sys.argv[1:]):
            entries = [entry for entry in table if covers(entry, each.id)]
            counts[each.outcome if not entries else f"left out, {each.outcome}"] += 1
            why = ": ".join(part for part in (table[entries[0]] if entries else "", each.reason) if part)
            print(f"{each.outcome:8}{'*' if entries else ' '} {each.id}{': ' + why if why else ''}")
    print("* in the table.", ", ".join(f"{n} {name}" for name, n in sorted(counts.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
