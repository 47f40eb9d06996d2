"""Runs a script of benchmarks/ in a process of its own."""

from __future__ import annotations

import subprocess
import sys

from repository import ROOT

BENCHMARKS = ROOT / "benchmarks"


def run_benchmark(script: str, *arguments: object, expect: int = 0) -> str:
    """What it printed; its exit status must be `expect`."""
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr
