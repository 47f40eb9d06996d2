"""The openai and anthropic packages for JavaScript, and the page's own tests."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from served import serve

from lminf_edge import LMInfConfig
from lminf_edge.server import Settings

HERE = Path(__file__).parent


def run(*command: str, cwd: Path = HERE) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("file", ["openai_client.mjs", "responses_client.mjs", "anthropic_client.mjs"])
def test_the_clients(nano_path: str, file: str) -> None:
    with serve(nano_path, Settings(model_name="nano"), lminf=LMInfConfig(n_global=4, n_local=128)) as served:
        assert run("node", file, served.url).strip() == "ok"


@pytest.mark.parametrize("file", sorted(path.name for path in (HERE / "page").glob("*.mjs")))
def test_the_scripts_of_the_page(file: str) -> None:
    run("node", "--test", file, cwd=HERE / "page")
