#!/usr/bin/env python3
"""Sets up what `make` needs: .venv with the tools and this project, built and editable.

With --stock also llama.cpp without our patches, which the tests compare ours with; with --tools the tools alone. Every
step is skipped while its inputs have the contents they had when it last succeeded, so running this again costs a tenth
of a second. Standard library only: this is what runs first on a fresh machine. Output goes to build/setup.log.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = ROOT / "build" / "setup.log"
PYPROJECT = ROOT / "pyproject.toml"

PIP = (str(PYTHON), "-m", "pip", "--disable-pip-version-check")


class SetupError(Exception):
    """One sentence for the user."""


def check_machine() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 (this runs before anything has checked)
        raise SetupError(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12")
    compiler = os.environ.get("CXX")
    names = shlex.split(compiler)[:1] if compiler else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, names)):
        raise SetupError(
            f"No C++ compiler found ({', '.join(names)}): "
            "install one, e.g. `apt install g++` or `xcode-select --install`."
        )
    if not shutil.which("git"):
        raise SetupError("git is needed to apply the patches to llama.cpp: install it, e.g. `apt install git`.")


def run(command: Sequence[str], failure: str, env: Mapping[str, str] | None = None, progress: bool = False) -> None:
    """Runs a command with its output in the log; `progress` shows ninja's count of finished build steps.

    Raises SetupError with the "error: ..." sentence that our own scripts end with, else with `failure` and what the
    compiler or pip had to say.
    """
    lines: list[str] = []
    shown = time.monotonic()
    with LOG.open("a") as log:
        log.write(f"\n$ {shlex.join(command)}\n")
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            lines.append(line.rstrip())
            step = re.match(r"\s*\[(\d+)/(\d+)\]", line) if progress else None
            if step and (sys.stdout.isatty() or time.monotonic() - shown > 15):
                shown = time.monotonic()
                end = "\r" if sys.stdout.isatty() else "\n"
                print(f"  compiled {step[1]} of {step[2]} files", end=end, flush=True)
    if process.wait():
        if lines and lines[-1].startswith("error: "):
            raise SetupError(lines[-1].removeprefix("error: "))
        compiler = [line.strip() for line in lines if re.search(r":\d+: (fatal )?error:|CMake Error", line)][:5]
        pip = [line for line in lines if line.startswith("ERROR: ")][-1:]
        raise SetupError("\n  ".join([f"{failure} (all output: {LOG.relative_to(ROOT)})", *(compiler or pip)]))


def digest(paths: Iterable[Path]) -> str:
    sha256 = hashlib.sha256(sys.version.encode())
    for path in sorted(path for path in paths if path.is_file()):
        sha256.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return sha256.hexdigest()


class Step:
    """A step that is over when its stamp in .venv holds the digest of its inputs."""

    def __init__(self, name: str, inputs: Iterable[Path]) -> None:
        self.stamp = VENV / f"{name}.stamp"
        self.digest = digest(inputs)

    def is_done(self) -> bool:
        return self.stamp.exists() and self.stamp.read_text() == self.digest

    def done(self) -> None:
        self.stamp.write_text(self.digest)


def build_stock() -> None:
    """llama.cpp without our patches, in build/stock: what the tests and benchmarks compare with."""
    inputs = [ROOT / "patches" / "upstream.txt", ROOT / "CMakeLists.txt", ROOT / "scripts" / "upstream.py"]
    stock = Step("stock", inputs)
    if stock.is_done():
        return
    print("building stock llama.cpp to compare with (once)", flush=True)
    tools = {"PATH": f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}"}
    folder = str(ROOT / "build" / "stock")
    configure = ["cmake", "-S", str(ROOT), "-B", folder, "-G", "Ninja", "-DLMINF_STOCK=ON"]
    run([*configure, f"-DPython_EXECUTABLE={PYTHON}"], "Could not configure stock llama.cpp.", env=tools)
    run(["cmake", "--build", folder], "The build of stock llama.cpp failed.", env=tools, progress=True)
    stock.done()


@functools.cache
def begin() -> None:
    """Before the first step that has something to do."""
    check_machine()
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_text("")


def setup_tools() -> None:
    tools = Step("tools", [PYPROJECT])
    if tools.is_done():
        return
    begin()
    if not PYTHON.exists():
        print("creating .venv", flush=True)
        run(
            [sys.executable, "-m", "venv", str(VENV)],
            "Could not create .venv: on Debian and Ubuntu the package python3-venv is missing.",
        )
    print("installing the build tools", flush=True)
    run([*PIP, "install", "scikit-build-core>=0.10", "cmake>=3.21", "ninja"], INDEX_FAILURE)
    tools.done()


def setup() -> None:
    hook = [ROOT / "lminf_edge.pth", ROOT / "lminf_edge" / "startup.py"]  # installed by CMake
    native = [
        *hook,
        *ROOT.glob("native/**/*"),
        *ROOT.glob("patches/*"),
        ROOT / "CMakeLists.txt",
        ROOT / "scripts/upstream.py",
    ]
    project = Step("project", [PYPROJECT, *native])
    setup_tools()
    if not project.is_done():
        begin()
        print("fetching llama.cpp", flush=True)
        run([str(PYTHON), "scripts/upstream.py", "fetch"], "Could not fetch llama.cpp.")
        print("building (a few minutes the first time, seconds after that)", flush=True)
        started = time.monotonic()
        run(
            [*PIP, "install", "--verbose", "--no-build-isolation", "--no-deps", "--editable", "."],
            "The build failed.",
            progress=True,
        )
        run([*PIP, "install", "lminf-edge[dev]"], INDEX_FAILURE)
        print(f"built in {time.monotonic() - started:.0f} s", flush=True)
        project.done()


INDEX_FAILURE = "pip could not install what is needed: can the package index be reached?"


def main() -> int:
    try:
        if "--tools" in sys.argv[1:]:
            setup_tools()
            return 0
        setup()
        if "--stock" in sys.argv[1:]:
            build_stock()
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
