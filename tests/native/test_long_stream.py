"""30,000 tokens of the million-token benchmark: what long runs find and short ones hide."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

BENCHMARK = ROOT / "benchmarks" / "million.py"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_memory_and_loss_stay_where_they_are(tmp_path: Path) -> None:
    report = tmp_path / "figures.json"
    sizes = ["--tokens", "30000", "--text-tokens", "8000", "--warm", "10000", "--span", "5000"]
    subprocess.run([sys.executable, str(BENCHMARK), *sizes, "--json", str(report)], check=True, capture_output=True)
    figures = json.loads(report.read_text())
    assert figures["nan"] == 0
    assert figures["end_bytes"] < 1.01 * figures["warm_bytes"]
    assert figures["late_start"] - figures["early_start"] == 24_000
    assert figures["late_loss"] == pytest.approx(figures["early_loss"], rel=0.02)
    assert figures["rebases"] > 10
    assert figures["max_graph_position"] < 2048
