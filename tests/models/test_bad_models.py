"""Files whose metadata contradicts itself or their tensors end in one sentence and a status, in every command."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reference import models, random_model

from lminf_edge import Llama
from lminf_edge.cli import main

ENTRY = Path(sys.executable).with_name("lminf-edge")

COMMANDS = (
    ["generate", "-p", "abc"],
    ["chat", "-p", "abc"],
    ["serve", "--port", "0", "--disk", "0"],
    ["passkey"],
    ["bench"],
)

# what llama.cpp says itself
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma4", {"attention.sliding_window_pattern": [1, 0, 1]}, "has wrong shape"),
    ("gemma4", {"attention.sliding_window_pattern": [0] * 6}, "has wrong shape"),
    ("gemma4", {"attention.shared_kv_layers": 7}, "not found"),
    ("gemma3", {"attention.key_length": 0}, "has wrong shape"),
    ("lfm2", {"attention.head_count_kv": [2]}, "wrong array length; expected 4, got 1"),
    ("jamba", {"attention.head_count_kv": [0, 2]}, "wrong array length; expected 3, got 2"),
    ("jamba", {"attention.head_count_kv": [2, 0, 2]}, "not found"),
    ("qwen35", {"full_attention_interval": 1}, "has wrong shape"),
    ("qwen35", {"rope.dimension_sections": [2, 1]}, "wrong array length; expected 4, got 2"),
    ("mamba", {"ssm.state_size": 0}, "has wrong shape"),
    # where it would divide by zero, or abort
    ("qwen35", {"full_attention_interval": 0}, "claims that one layer in 0 has full attention"),
]
# what it aborts on, with a stack trace if nothing is done about it
ABORTED: list[tuple[str, dict[str, Any], str]] = [
    ("rwkv7", {"token_shift_count": 1}, "token_shift_count == 2"),
    # in several threads, when it computes
    ("qwen35", {"rope.dimension_sections": [20, 10, 10, 0]}, "sect_dims <= ne0"),
]


def write(name: str, keys: dict[str, Any], folder: Path) -> str:
    """A model whose metadata says something else than its tensors."""
    model = models.BY_NAME[name]
    return str(random_model.write(name, dataclasses.replace(model, keys=model.keys | keys), folder))


@pytest.mark.parametrize(("name", "keys", "words"), REFUSED)
def test_a_contradiction_is_one_sentence(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, name: str, keys: dict[str, Any], words: str
) -> None:
    path = write(name, keys, tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("abc")
    with pytest.raises(ValueError, match=words):
        Llama(path, lminf=True, verbose=False)
    for command in (*COMMANDS, ["ppl", "-f", str(text)], ["info"]):
        capfd.readouterr()
        assert main([*command, "-m", path]) == 1
        output = capfd.readouterr()
        (line,) = output.err.splitlines()
        assert line.startswith(f"error: {path}")
        assert words in line
        assert output.out == ""


@pytest.mark.parametrize(("name", "words"), [("bert", "reads its whole input at once"), ("gpt2", "absolute positions")])
def test_so_is_a_model_without_a_stream(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, name: str, words: str
) -> None:
    path = str(models.write(name, tmp_path))
    text = tmp_path / "text.txt"
    text.write_text("abc")
    for command in (*COMMANDS, ["ppl", "-f", str(text)]):
        capfd.readouterr()
        assert main([*command, "-m", path]) == 1
        output = capfd.readouterr()
        (line,) = output.err.splitlines()
        assert f"'{name}'" in line or words in line or "not causal" in line
        assert output.out == ""
    assert main(["info", "-m", path]) == 1
    output = capfd.readouterr()
    assert output.err == ""
    assert words in output.out


@pytest.mark.parametrize(("name", "keys", "words"), ABORTED)
def test_what_llama_cpp_aborts_on_is_one_sentence_too(
    tmp_path: Path, name: str, keys: dict[str, Any], words: str
) -> None:
    path = write(name, keys, tmp_path)
    done = subprocess.run(
        [ENTRY, "generate", "-m", path, "-p", "abc", "-n", "3"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: llama.cpp cannot go on")]
    assert lines
    assert words in lines[0]
    assert "Traceback" not in done.stderr
