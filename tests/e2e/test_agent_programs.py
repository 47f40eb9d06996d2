"""Codex and Claude Code themselves against a server with SmolLM2: sessions of several turns, offline.

The model says nonsense and calls no tools. No request may fail, and only what is new may be read.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Served, serve

from lminf_edge import LMInfConfig
from lminf_edge.cli.agents import AGENTS
from lminf_edge.server import Settings, arguments
from lminf_edge.server.errors import ApiError

HERE = Path(__file__).parent
SMOL = HERE.parents[1] / "build" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
BIN = HERE / "node_modules" / ".bin"

pytestmark = pytest.mark.skipif(not SMOL.exists(), reason="make real-models downloads it")


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the server refuses."""
    messages: list[str] = []
    answer = ApiError.response

    def noted(error: ApiError, path: str) -> Any:
        messages.append(f"{path}: {error.message}")
        return answer(error, path)

    monkeypatch.setattr(ApiError, "response", noted)
    return messages


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Served]:
    """A server whose model ends its turns soon: agents ask for tens of thousands of tokens, and it does not mind."""
    bias = arguments.token_bias
    monkeypatch.setattr(arguments, "token_bias", lambda llm, pairs: {**bias(llm, pairs), llm.token_eos(): 8.0})
    more: Any = {"n_threads": 2, "n_threads_batch": 2, "folder": tmp_path / "kept"}
    with serve(str(SMOL), Settings(model_name="smol"), lminf=LMInfConfig(10, 1014, prefill="tail"), **more) as served:
        yield served


def program(name: str) -> str:
    found = shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed: npm install {AGENTS[name].package} in tests/e2e")
    if name == "claude" and (installer := HERE / "node_modules/@anthropic-ai/claude-code/install.cjs").exists():
        subprocess.run(["node", installer], check=True, capture_output=True, timeout=60)  # npm may leave it out
    return found


def run(served: Served, home: Path, name: str, *more: str) -> str:
    """Runs an agent as `lminf-edge launch` would, with nothing of the user's."""
    setup = AGENTS[name].setup(served.url, "smol", "none")
    own = {"HOME": str(home), "CODEX_HOME": str(home), "CLAUDE_CONFIG_DIR": str(home), "PATH": os.environ["PATH"]}
    quiet = {"DISABLE_TELEMETRY": "1", "DISABLE_ERROR_REPORTING": "1", "DISABLE_AUTOUPDATER": "1", "IS_SANDBOX": "1"}
    done = subprocess.run(
        [program(name), *setup.arguments, *more],
        cwd=home,
        env={**own, **quiet, **setup.environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def n_processed(served: Served) -> int:
    """Tokens that were read since the start."""
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    kinds = ("lminf_prefilled_tokens_total", "lminf_skipped_tokens_total")
    return sum(int(float(line.split()[1])) for line in lines if line.startswith(kinds))


def test_a_session_of_codex(served: Served, refused: list[str], tmp_path: Path) -> None:
    always = ("exec", "--skip-git-repo-check")
    run(served, tmp_path, "codex", *always, "Say hello.")
    first = n_processed(served)
    assert first > 2000
    for question in ("And again.", "Once more."):
        before = n_processed(served)
        run(served, tmp_path, "codex", *always, "resume", "--last", question)
        assert n_processed(served) - before < 300
    assert refused == []


def test_a_session_of_claude_code(served: Served, refused: list[str], tmp_path: Path) -> None:
    def ask(*more: str) -> None:
        answer = json.loads(run(served, tmp_path, "claude", "--output-format", "json", *more))
        assert answer["is_error"] is False, answer

    ask("-p", "Say hello.")
    first = n_processed(served)
    assert first > 1000
    for question in ("And again.", "Once more."):
        before = n_processed(served)
        ask("-c", "-p", question)
        # a side request in between, as for a title, on a server of two slots
        body: Any = {"model": "x", "max_tokens": 4, "system": f"Title of {question}"}
        httpx.post(f"{served.url}/v1/messages", json={**body, "messages": [{"role": "user", "content": "Hello"}]})
        assert n_processed(served) - before < 300
    assert refused == []
