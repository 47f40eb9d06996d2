"""Finding and loading the native library, in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lminf_edge import native


def run(script: str, **env: str) -> tuple[int, str]:
    """Exit status and last line of the error output of a Python program."""
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_LIB_PATH")}
    process = subprocess.run(
        [sys.executable, "-c", script], env={**environment, **env}, capture_output=True, text=True, check=False
    )
    return process.returncode, process.stderr.strip().rpartition("\n")[2]


@pytest.fixture
def folder() -> str:
    found = native.library_folder()
    assert found is not None
    return str(found)


def test_importing_the_package_loads_nothing(folder: str) -> None:
    script = "import lminf_edge, sys; assert not {'llama_cpp', 'numpy'} & set(sys.modules), sys.modules"
    assert run(script, LMINF_LIB_PATH=folder) == (0, "")


def test_either_import_first_is_fine_after_the_package(folder: str) -> None:
    script = "import lminf_edge, llama_cpp; from lminf_edge import Llama; assert issubclass(Llama, llama_cpp.Llama)"
    assert run(script, LMINF_LIB_PATH=folder) == (0, "")


def test_llama_cpp_imported_first_is_fine_if_it_has_our_library(folder: str) -> None:
    assert run("import llama_cpp; from lminf_edge import Llama", LLAMA_CPP_LIB_PATH=folder) == (0, "")


def test_stock_llama_cpp_imported_first() -> None:
    script = (
        "import sys, types\n"
        "stock = types.ModuleType('llama_cpp.llama_cpp')\n"
        "stock._lib = object()\n"
        "sys.modules['llama_cpp.llama_cpp'] = stock\n"
        "import lminf_edge"
    )
    status, error = run(script)
    assert status == 1
    assert error.startswith("ImportError: llama_cpp was imported before lminf_edge")
    assert error.endswith("import lminf_edge first.")


def test_no_library_in_the_folder(tmp_path: Path) -> None:
    status, error = run("import lminf_edge; print('fine'); from lminf_edge import Llama", LMINF_LIB_PATH=str(tmp_path))
    assert status == 1
    assert error.startswith("ImportError: There is no llama.cpp library in")


def test_a_library_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "libllama.so").write_bytes(b"nonsense")
    (tmp_path / "libllama.dylib").write_bytes(b"nonsense")
    status, error = run("from lminf_edge import Llama", LMINF_LIB_PATH=str(tmp_path))
    assert status == 1
    assert error.startswith("ImportError: The llama.cpp library in")


def test_structs_match_the_header(folder: str) -> None:
    assert native.load().default_params().n_local == 4096
    assert native.load().default_params().n_global == 10
    assert native.load().default_params().n_slack == -1
