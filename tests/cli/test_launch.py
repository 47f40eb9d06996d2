"""lminf-edge launch, with scripts in the agents' place."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import MakeHub
from fake_hub import REPO
from served import serve

from lminf_edge import LMInfConfig
from lminf_edge.cli import main
from lminf_edge.cli.agents import AGENTS
from lminf_edge.server import Settings

# writes down what it was given, and asks the server that it was told of
AGENT = """#!{python}
import json, os, re, sys, urllib.request
given = " ".join(sys.argv) + " ".join(os.environ.values())
file = next((open(arg).read() for arg in sys.argv if arg.endswith("config.yaml")), "")
url = re.search(r"http://127.0.0.1:[0-9]+", os.environ.get("ANTHROPIC_BASE_URL", "") + file + given)[0]
with urllib.request.urlopen(urllib.request.Request(url + "/v1/models", headers={{"X-Api-Key": "secret"}})) as answer:
    model = json.load(answer)["data"][0]["id"]
told = {{"arguments": sys.argv[1:], "model": model, "url": url, "file": file, "given": given}}
open({path!r}, "w").write(json.dumps(told))
sys.exit(7)
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the agents write down what they were given."""
    path = tmp_path / "told.json"
    for agent in AGENTS.values():
        script = tmp_path / agent.command
        script.write_text(AGENT.format(python=sys.executable, path=str(path)))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("LMINF_API_KEY", raising=False)
    return path


def read(path: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(path.read_text())
    return told


def test_against_a_running_server(nano_path: str, told: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(nano_path, Settings(model_name="tiny", api_keys=("secret",)), lminf=LMInfConfig(4, 64)) as served:
        for name in AGENTS:
            assert main(["launch", name, "--url", f"{served.url}/v1", "--api-key", "secret", "--", "-p", "hello"]) == 7
            found = read(told)
            assert found["arguments"][-2:] == ["-p", "hello"]
            assert found["url"] == served.url
            assert "tiny" in found["given"] + found["file"]
            assert "secret" in found["given"] + found["file"]
        assert main(["launch", "codex", "--url", served.url, "--api-key", "other"]) == 1
        assert "another key" in capsys.readouterr().err


def test_starts_a_server(nano_path: str, told: Path, tmp_path: Path) -> None:
    options = f"--n-local 64 --alias tiny --parallel 1 --threads 1 --folder {tmp_path / 'kept'}"
    assert main(["launch", "claude", "-m", nano_path, "--url", "http://127.0.0.1:9", "--serve", options]) == 7
    assert read(told)["model"] == "tiny"


def test_a_model_of_the_hub_is_downloaded_first(
    make_hub: MakeHub,
    nano_path: str,
    told: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In sight, and only if a server has to be started."""
    made = make_hub(files={"Nano-Q8_0.gguf": Path(nano_path).read_bytes()})
    monkeypatch.setattr("lminf_edge.models.cache_folder", lambda: tmp_path / "cache")
    nowhere = ["--hf", REPO, "--url", "http://127.0.0.1:9"]
    assert main(["launch", "codex", *nowhere, "--json"]) == 0
    assert 'model="Nano-Q8_0"' in json.loads(capsys.readouterr().out)["command"]
    assert main(["launch", "codex", "--hf", "someone/else", *nowhere[2:], "--print"]) == 1
    assert "someone/else" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    options = f"--n-local 64 --parallel 1 --threads 1 --folder {tmp_path / 'kept'}"
    for shown in (True, False):
        assert main(["launch", "claude", *nowhere, "--serve", options]) == 7
        assert read(told)["model"] == "Nano-Q8_0"
        said = capsys.readouterr().err
        assert (f"downloading Nano-Q8_0.gguf of {REPO}" in said) == shown
        assert ("] 6 of 6 MB" in said) == shown
    made.status = 500
    with serve(nano_path, Settings(model_name="tiny"), lminf=LMInfConfig(4, 64)) as served:
        made.asked.clear()
        assert main(["launch", "codex", "--hf", REPO, "--url", served.url]) == 7
    assert made.asked == []


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_the_server_ends_with_it(nano_path: str, told: Path, tmp_path: Path) -> None:
    agent = tmp_path / "claude"
    agent.write_text(agent.read_text().replace("sys.exit(7)", "import time; time.sleep(60)"))
    options = f"--n-local 64 --parallel 1 --threads 1 --folder {tmp_path / 'kept'}"
    command = [sys.executable, "-m", "lminf_edge", "launch", "claude", "-m", nano_path, "--url", "http://127.0.0.1:9"]
    process = subprocess.Popen([*command, "--serve", options])
    end = time.monotonic() + 60
    while not told.exists() or not told.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(httpx.ConnectError):
        httpx.get(read(told)["url"])


def test_refusals(told: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = ["--url", "http://127.0.0.1:9"]
    assert main(["launch", "codex", *nowhere]) == 1
    assert "-m MODEL or --hf USER/REPO" in capsys.readouterr().err
    assert main(["launch", "codex", *nowhere, "-m", str(tmp_path / "none.gguf")]) == 1
    assert "none.gguf" in capsys.readouterr().err
    (tmp_path / "codex").unlink()
    os.environ["PATH"] = str(tmp_path)
    assert main(["launch", "codex", *nowhere]) == 1
    assert "npm install -g @openai/codex" in capsys.readouterr().err


def test_printing(capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = ["--url", "http://127.0.0.1:9", "-m", "some/model.gguf"]
    assert main(["launch", "codex", *nowhere, "--print", "--", "exec", "say hello"]) == 0
    printed = capsys.readouterr().out
    assert "export LMINF_API_KEY=none" in printed
    assert printed.rstrip().endswith("exec 'say hello'")
    assert main(["launch", "continue", *nowhere, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["command"] == ["cn", "--config", "{folder}/config.yaml"]
    assert json.loads(shown["files"]["config.yaml"])["models"][0]["model"] == "model"
