"""Files whose metadata contradicts itself or their tensors end in one sentence and a status, in every command."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from reference import models, random_model
from reference.gguf_file import copy_without_numbers
from served import Served, serve

from lminf_edge import Llama, LMInfConfig
from lminf_edge.cli import main
from lminf_edge.errors import ModelError
from lminf_edge.evaluate import token_nll
from lminf_edge.text.logprobs import LEAST_LOGPROB, LogprobReporter

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


@pytest.mark.parametrize("n_bytes", [20, 600, 1000, 5000, 60_000, 100_000, 3_000_000, -1])
def test_so_is_a_file_that_was_cut(
    capfd: pytest.CaptureFixture[str], nano_path: str, tmp_path: Path, n_bytes: int
) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(Path(nano_path).read_bytes()[:n_bytes])
    expected = f"{path} is cut short or damaged: download or convert it again."
    with pytest.raises(ValueError, match=re.escape(expected)):
        Llama(str(path), lminf=True, verbose=False)
    for command in (["generate", "-p", "abc"], ["info"], ["serve", "--port", "0", "--disk", "0"]):
        capfd.readouterr()
        assert main([*command, "-m", str(path)]) == 1
        assert capfd.readouterr().err == f"error: {expected}\n"


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


# --- no numbers -------------------------------------------------------------------------------------------------------

NO_NUMBERS = "gives no numbers"
BROKEN, FINE = "a\x07b", "The ferry left at six"  # the first has the token that is NaN


@pytest.fixture(scope="module")
def broken(nano_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """nano, where texts with a bell come to NaN."""
    path = tmp_path_factory.mktemp("models") / "broken.gguf"
    llm = Llama(nano_path, vocab_only=True, verbose=False)
    token = llm.tokenize(b"\x07", add_bos=False)[-1]
    llm.close()
    copy_without_numbers(nano_path, path, token)
    return str(path)


@pytest.fixture(scope="module")
def served(broken: str) -> Iterator[Served]:
    with serve(broken, lminf=LMInfConfig(n_global=4, n_local=128)) as served:
        yield served


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": BROKEN}),
        ("/v1/completions", {"prompt": BROKEN, "temperature": 0, "logprobs": 2}),
        ("/v1/completions", {"prompt": BROKEN, "logit_bias": {"5": 1}, "grammar": 'root ::= "a"'}),
        ("/completion", {"prompt": BROKEN, "n_probs": 2, "post_sampling_probs": True}),
        ("/completion", {"prompt": BROKEN, "mirostat": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": BROKEN}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": BROKEN}], "max_tokens": 4}),
        ("/v1/responses", {"input": BROKEN}),
    ],
)
def test_no_numbers_are_the_models_fault(served: Served, path: str, body: dict[str, Any], stream: bool) -> None:
    answer = httpx.post(served.url + path, json={**body, "stream": stream}, timeout=60)
    assert answer.status_code == (200 if "event" in answer.headers["content-type"] else 500)
    assert NO_NUMBERS in answer.text
    assert "NaN" not in answer.text.replace("(NaN or infinity)", "")


def test_echo_is_no_exception(served: Served) -> None:
    body = {"prompt": BROKEN, "echo": True, "logprobs": 2, "max_tokens": 1}
    answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "model_error"


def test_others_go_on_without_numbers(served: Served) -> None:
    body = {"prompt": FINE, "max_tokens": 60, "temperature": 0}
    expected = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    answers: list[Any] = []

    def ask() -> None:
        for _ in range(4):
            answers.append(httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).json())

    asking = threading.Thread(target=ask)
    asking.start()
    while asking.is_alive():
        broken = httpx.post(f"{served.url}/v1/completions", json={"prompt": BROKEN}, timeout=60)
        assert broken.status_code == 500
    asking.join()
    assert [answer["choices"][0]["text"] for answer in answers] == [expected] * 4


def test_no_numbers_in_the_library(broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = Llama(broken, lminf=True, verbose=False)
    tokens = llm.tokenize(BROKEN.encode())

    def sampled() -> None:
        llm.reset()
        llm.eval(tokens)
        llm.sample()

    for call in (
        lambda: llm(BROKEN),
        lambda: llm(BROKEN, temperature=0.0),
        lambda: llm(BROKEN, echo=True, logprobs=1, max_tokens=1),
        lambda: list(llm.generate(tokens)),
        lambda: token_nll(llm, tokens),
        sampled,
    ):
        with pytest.raises(ModelError, match=NO_NUMBERS):
            call()
    llm.reset()
    assert llm(FINE, max_tokens=4)["choices"][0]["text"]
    llm.close()
    text = tmp_path / "text.txt"
    text.write_text(BROKEN * 20)
    for command in (["ppl", "-f", str(text)], ["ppl", "--stock", "-f", str(text)], ["generate", "-p", BROKEN]):
        assert main([*command, "-m", broken]) == 1
        assert NO_NUMBERS in capsys.readouterr().err.splitlines()[-1]


def test_what_cannot_be_has_a_log_probability(nano_path: str) -> None:
    llm = Llama(nano_path, vocab_only=True, verbose=False)
    logits = np.full(llm.n_vocab(), -np.inf, dtype=np.float32)
    logits[100] = 1.0
    entry = LogprobReporter(llm, 2, 0).entry(200, b"x", logits)
    assert entry is not None
    assert entry.logprob == LEAST_LOGPROB
    assert entry.top is not None
    assert sorted(entry.top.values()) == [LEAST_LOGPROB, 0.0]
    llm.close()
