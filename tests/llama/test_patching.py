"""Programs that know nothing of this package: what they get of llama_cpp, in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

import lminf_edge
from lminf_edge import native, startup
from lminf_edge.errors import UserError

# a Python without what the package has installed to run at its start would not tell what an installed one does
START = f"import runpy; runpy.run_path({startup.__file__!r}, run_name='_lminf_edge_startup')\n"
PROGRAM = """
from llama_cpp import Llama
llm = Llama(path, n_ctx=128, verbose=False, n_threads=1, logits_all=False)
print(type(llm).__name__, llm.n_ctx(), llm("Anna", max_tokens=200, temperature=0.0)["usage"]["completion_tokens"])
"""


def run(script: str, **env: str) -> tuple[int, str, str]:
    """Exit status, output and errors of a program whose `path` is the embedded model."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("LMINF") and "LIB_PATH" not in key}
    library = str(native.library_folder())
    process = subprocess.run(
        [sys.executable, "-c", f"path = {str(MODEL)!r}\n" + script],
        env={**kept, "LMINF_LIB_PATH": library, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    return process.returncode, process.stdout.strip(), process.stderr.strip()


MODEL = Path(native.__file__).parent / "models" / "nano.gguf"


def test_lminf_1_makes_a_program_endless() -> None:
    assert run(START + PROGRAM, LMINF="1") == (0, "PatchedLlama 128 200", "")


def test_parameters_come_from_the_environment() -> None:
    script = "print(llm.scheduler.window.n_global, llm.scheduler.window.max_distance, llm.scheduler.window.sink_mode)"
    env = {"LMINF_N_GLOBAL": "6", "LMINF_N_LOCAL": "50", "LMINF_MAX_DISTANCE": "40", "LMINF_SINK_MODE": "order"}
    status, output, errors = run(START + PROGRAM + script, LMINF="1", **env)
    assert (status, output.split("\n"), errors) == (0, ["PatchedLlama 56 200", "6 40 order"], "")


def test_recall_comes_from_the_environment() -> None:
    window = "llm.scheduler.window"
    script = f"print({window}.n_recall, {window}.recall_index, {window}.archive_type_v)"
    env = {"LMINF_N_LOCAL": "50", "LMINF_N_RECALL": "7", "LMINF_RECALL_INDEX": "exact", "LMINF_ARCHIVE_TYPE_V": "f16"}
    status, output, errors = run(START + PROGRAM + script, LMINF="1", **env)
    assert (status, output.split("\n")[1], errors) == (0, "7 exact f16", "")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("N_GLOBAL", "x", "LMINF_N_GLOBAL must be a whole number"),
        ("N_LOCAL", "0", "n_local must be 1 or more"),
        ("SINK_MODE", "x", "sink_mode must be one of"),
        ("RECALL_RULE", "x", "recall_rule must be one of"),
    ],
)
def test_parameters_that_make_no_sense(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv(f"LMINF_{name}", value)
    with pytest.raises(UserError, match=message):
        lminf_edge.patch()


@pytest.mark.parametrize("value", ["0", ""])
def test_without_lminf_1_it_is_llama_cpp_with_our_library(value: str) -> None:
    script = "import os, sys; print(os.environ.get('LLAMA_CPP_LIB_PATH'), 'lminf_edge' in sys.modules)"
    status, output, errors = run(START + "import llama_cpp\nprint(llama_cpp.Llama)\n" + script, LMINF=value)
    assert (status, output.split("\n"), errors) == (0, ["<class 'llama_cpp.llama.Llama'>", "None False"], "")


@pytest.mark.parametrize("first", ["from lminf_edge import Llama", "import lminf_edge", "import llama_cpp"])
def test_lminf_1_whatever_is_imported_first(first: str) -> None:
    script = (
        "\nimport llama_cpp, lminf_edge"
        "\nassert type(llama_cpp.Llama(path, n_ctx=64, verbose=False)).__name__ == 'PatchedLlama'"
        "\nassert type(lminf_edge.Llama(path, n_ctx=64, verbose=False)).__name__ == 'Llama'"
        "\nassert isinstance(lminf_edge.Llama(path, n_ctx=64, verbose=False), llama_cpp.Llama)"
        "\nassert llama_cpp.llama.Llama is llama_cpp.Llama"
    )
    assert run(START + first + script, LMINF="1") == (0, "", "")


def test_patch_and_unpatch() -> None:
    script = (
        "import lminf_edge, inspect, pickle, warnings; lminf_edge.patch(n_global=4, n_ctx=96)\n"
        + PROGRAM
        + "import llama_cpp\n"
        "assert issubclass(llama_cpp.Llama, lminf_edge.Llama)\n"
        "assert llm.scheduler.window.n_global == 4\n"
        "assert inspect.signature(llama_cpp.Llama) == inspect.signature(lminf_edge.Llama)\n"
        "class Mine(llama_cpp.Llama): pass\n"
        "mine = Mine(path, verbose=False)\n"
        "assert mine.n_ctx() == 96 and not isinstance(llm, Mine)\n"
        "copy = pickle.loads(pickle.dumps(llm))\n"
        "assert copy.n_ctx() == 96 and type(copy) is type(llm)\n"
        "lminf_edge.unpatch(); lminf_edge.unpatch()\n"
        "stock = llama_cpp.Llama(path, n_ctx=64, verbose=False)\n"
        "assert not isinstance(stock, lminf_edge.Llama) and isinstance(llm, llama_cpp.Llama)\n"
        "assert llama_cpp.llama.Llama is llama_cpp.Llama\n"
    )
    assert run(script) == (0, "PatchedLlama 96 200", "")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_local": 0}, "n_local must be 1 or more"),
        ({"n_locl": 3}, "There is no parameter n_locl"),
        ({"n_ctx": 100, "n_local": 90}, "Give only one of n_ctx"),
        ({"n_ctx": "a"}, "n_ctx must be"),
    ],
)
def test_patch_refuses_what_makes_no_sense(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        lminf_edge.patch(**parameters)


def test_the_window_is_no_longer_than_the_training_length() -> None:
    assert run(START + PROGRAM.replace("n_ctx=128", "n_ctx=100000"), LMINF="1") == (0, "PatchedLlama 512 200", "")
    assert run(START + PROGRAM.replace("n_ctx=128", "n_ctx=0"), LMINF="1") == (0, "PatchedLlama 512 200", "")


def test_a_model_without_a_lambda_cache_is_loaded_as_it_would_be(tmp_path: Path) -> None:
    from reference import models

    path = models.write("gpt2", tmp_path)
    program = f"path = {str(path)!r}\n" + "from llama_cpp import Llama\nllm = Llama(path, n_ctx=64, verbose=False)\n"
    status, output, errors = run(
        START + program + "llm.eval([1, 2, 3]); print(llm.has_stream, llm.n_tokens)", LMINF="1"
    )
    assert (status, output) == (0, "False 3")
    assert errors.count("UserWarning: llama_cpp.Llama without a Λ cache") == 1
    assert "learned absolute positions" in errors


def test_no_file_is_still_no_file() -> None:
    status, _, errors = run(START + "from llama_cpp import Llama; Llama('/nowhere.gguf')", LMINF="1")
    assert status == 1
    assert "Model path does not exist: /nowhere.gguf" in errors.rpartition("\n")[2]


def test_children_inherit_nothing() -> None:
    script = (
        "import os, subprocess, sys; before = dict(os.environ)\n"
        "import lminf_edge; assert dict(os.environ) == before\n"
        "from lminf_edge import Llama; assert dict(os.environ) == before\n"
    )
    assert run(script) == (0, "", "")
    assert run(script, LLAMA_CPP_LIB_PATH="/nowhere") == (0, "", "")


def test_it_runs_at_the_start_of_python() -> None:
    """What CMakeLists.txt installs, as it installs it."""
    text = (ROOT / "CMakeLists.txt").read_text()
    assert "install(FILES lminf_edge.pth DESTINATION .)" in text
    assert "install(FILES lminf_edge/startup.py DESTINATION . RENAME _lminf_edge_startup.py)" in text
    site = Path(native.library_folder() or "").parent.parent
    if not (site / "lminf_edge.pth").exists():
        pytest.skip("the package was installed before it had this file")
    assert run(PROGRAM, LMINF="1") == (0, "PatchedLlama 128 200", "")
    assert (site / "_lminf_edge_startup.py").read_text() == Path(startup.__file__).read_text()
