"""Which llama_cpp a process has where another one is installed as well: the rule of lminf_edge/startup.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

from lminf_edge import startup

STOCK = ROOT / "build" / "stock" / "bin"
MODEL = ROOT / "lminf_edge" / "models" / "nano.gguf"

# a package that knows nothing of us, and checks what it is given
PACKAGE = """
import llama_cpp
from llama_cpp import Llama, LlamaGrammar

def version():
    return llama_cpp.__version__

def accepts(llm):
    return isinstance(llm, Llama) and isinstance(llm, llama_cpp.llama.Llama) and issubclass(type(llm), Llama)
"""

ANSWER = "llm = Llama(path, n_ctx=64, verbose=False)\nassert llm('Anna', max_tokens=3)['choices'][0]['text']\n"
HAS_OURS = "hasattr(llama_cpp.llama_cpp._lib, 'lminf_set_next')"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with another version of llama_cpp, its own library in it, and a package that uses it."""
    if not any(STOCK.glob("libllama.*")):
        pytest.skip("build/stock has no library: make stock")
    copy = startup.copy_of_llama_cpp()
    assert copy is not None
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(copy, folder / "llama_cpp", ignore=shutil.ignore_patterns("__pycache__"))
    main = folder / "llama_cpp" / "__init__.py"
    main.write_text(main.read_text() + '\n__version__ = "0.0.1"\n')
    (folder / "llama_cpp" / "lib").symlink_to(STOCK)
    (folder / "package.py").write_text(PACKAGE)
    return folder


def run(folder: Path, script: str, **env: str) -> tuple[int, str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("LMINF") and "LIB_PATH" not in key}
    # what the .pth file does at the start of Python, from the sources
    start = "from runpy import run_path; run_path(startup, run_name='_lminf_edge_startup')\n"
    names = f"startup, path = {startup.__file__!r}, {str(MODEL)!r}\n"
    process = subprocess.run(
        [sys.executable, "-c", names + start + script],
        env={**kept, "PYTHONPATH": str(folder), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    return process.returncode, process.stdout.strip(), process.stderr.strip()


def test_without_us_it_is_the_installed_one(site: Path) -> None:
    script = f"import llama_cpp, package, sys\nprint(package.version(), {HAS_OURS}, 'lminf_edge' in sys.modules)\n"
    assert run(site, script + "from llama_cpp import Llama\n" + ANSWER) == (0, "0.0.1 False False", "")


def test_with_us_it_is_ours_for_everybody(site: Path) -> None:
    script = (
        "import lminf_edge, package, llama_cpp\nfrom lminf_edge import Llama\n"
        + ANSWER
        + f"print(package.version() == '0.0.1', {HAS_OURS}, package.accepts(llm), package.Llama in Llama.__mro__)\n"
        "stock = package.Llama(path, n_ctx=64, verbose=False)\n"
        "assert package.accepts(stock) and not isinstance(stock, Llama)\n"
    )
    assert run(site, script) == (0, "False True True True", "")


def test_with_lminf_1_it_is_ours(site: Path) -> None:
    script = "import package, llama_cpp\nfrom llama_cpp import Llama\n" + ANSWER
    script += f"print(package.version() == '0.0.1', {HAS_OURS}, package.accepts(llm), type(llm).__name__)"
    assert run(site, script, LMINF="1") == (0, "False True True PatchedLlama", "")


def test_the_installed_one_first_is_refused_in_a_sentence(site: Path) -> None:
    status, _, errors = run(site, "import package, lminf_edge")
    assert status == 1
    assert errors.endswith("import lminf_edge first.")


@pytest.mark.parametrize("has_llama_cpp", [True, False])
def test_without_another_it_is_ours(site: Path, tmp_path: Path, has_llama_cpp: bool) -> None:
    """Nor is one that was installed without a library another one."""
    shutil.copy(site / "package.py", tmp_path)
    if has_llama_cpp:
        shutil.copytree(site / "llama_cpp", tmp_path / "llama_cpp", ignore=shutil.ignore_patterns("lib"))
    script = f"import llama_cpp, package\nprint(package.version() == '0.0.1', {HAS_OURS})\n"
    assert run(tmp_path, script + "from llama_cpp import Llama\n" + ANSWER) == (0, "False True", "")
