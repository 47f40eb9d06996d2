"""The pin, the patches and what a fresh machine is told when something is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD_FILES = ("scripts", "patches", "native", "CMakeLists.txt", "pyproject.toml", "lminf_edge/__init__.py")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What setup needs of this project, never set up."""
    for name in BUILD_FILES:
        target = tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target)
        else:
            shutil.copy(ROOT / name, target)
    return tmp_path / "checkout"


def run(checkout: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # pip and git are to see nothing of this machine but what the test gives them
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "GIT_", "CXX"))}
    return subprocess.run(
        [sys.executable, *command], cwd=checkout, env=inherited | environment, capture_output=True, text=True
    )


def one_sentence(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return result.stderr


def test_the_pin_is_one_line_and_the_dependency_is_the_same() -> None:
    (line,) = (ROOT / "patches" / "upstream.txt").read_text().splitlines()
    requirement, _, digest = line.partition(" --hash=sha256:")
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert f'"{requirement}"' in (ROOT / "pyproject.toml").read_text()


def test_without_a_compiler(checkout: Path, tmp_path: Path) -> None:
    message = one_sentence(run(checkout, "scripts/setup.py", PATH=str(tmp_path)))
    assert message.startswith("error: No C++ compiler found")


def test_without_git(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "c++").touch(mode=0o755)
    message = one_sentence(run(checkout, "scripts/setup.py", PATH=str(tmp_path)))
    assert message.startswith("error: git is needed")


def test_an_archive_with_another_hash(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "llama_cpp_python-0.3.36.tar.gz").write_bytes(b"something else")
    message = one_sentence(
        run(checkout, "scripts/upstream.py", "fetch", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    )
    assert "does not have the sha256 in patches/upstream.txt" in message


def test_an_index_that_cannot_be_reached(checkout: Path, tmp_path: Path) -> None:
    message = one_sentence(
        run(checkout, "scripts/upstream.py", "fetch", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    )
    assert "Could not download llama-cpp-python==0.3.36 from the package index" in message


def test_patches_apply_to_the_pin_and_are_left_alone_when_they_are_in(checkout: Path) -> None:
    """Without fuzz, in order; the second run changes nothing, a changed patch starts again from the pin."""
    (sdist,) = (ROOT / "build" / "upstream").glob("*.tar.gz")
    upstream = checkout / "build" / "upstream"
    upstream.mkdir(parents=True)
    shutil.copy(sdist, upstream)
    assert run(checkout, "scripts/upstream.py", "fetch").returncode == 0
    hooked = upstream / "llama.cpp" / "src" / "llama-graph.cpp"
    times = {path: path.stat().st_mtime_ns for path in hooked.parent.iterdir()}
    assert "lminf-graph.h" in hooked.read_text()
    assert "lminf-graph.h" in (ROOT / "build/upstream/llama.cpp/src/llama-graph.cpp").read_text()

    assert run(checkout, "scripts/upstream.py", "fetch").returncode == 0
    assert {path: path.stat().st_mtime_ns for path in hooked.parent.iterdir()} == times

    (first, *_) = sorted((checkout / "patches").glob("*.patch"))
    first.write_text(first.read_text().replace("kv_unified = false; // a stream", "kv_unified = false; // one stream"))
    assert run(checkout, "scripts/upstream.py", "fetch").returncode == 0
    changed = {path.name for path in hooked.parent.iterdir() if path.stat().st_mtime_ns != times[path]}
    assert changed == {"llama-context.cpp"}  # so that ninja compiles nothing else

    first.write_text(first.read_text().replace("cparams.op_offload = params.op_offload;", "something else;"))
    message = one_sentence(run(checkout, "scripts/upstream.py", "fetch"))
    assert f"{first.name} does not apply" in message
