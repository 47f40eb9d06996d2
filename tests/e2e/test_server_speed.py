"""The server's benchmarks, little of everything, and the page made of them."""

from __future__ import annotations

import json
from pathlib import Path

from benchmark_script import run_benchmark


def test_figures_and_page(tmp_path: Path) -> None:
    figures, page = tmp_path / "server-performance", tmp_path / "server-performance.md"
    names = ["first_token", "agent", "unseen", "cold", "memory", "hostile", "mixed"]  # parallel's model has 700 MB
    only = [argument for name in names for argument in ("--only", name)]
    run_benchmark("server_speed.py", "--tiny", "--minutes", 0.1, "--out", figures, *only)
    run_benchmark("server_report.py", "--figures", figures, "--page", page)
    records = {path.stem: json.loads(path.read_text()) for path in figures.glob("*.json")}
    assert set(records) == set(names)
    short, long = records["cold"]["conversations"]
    n_more = long["tokens"] - short["tokens"]
    assert long["state_bytes"] - short["state_bytes"] <= 4 * n_more  # the tokens
    assert records["mixed"]["n_errors"] == 0
    assert all(f"`{name}`" in page.read_text() for name in names)
