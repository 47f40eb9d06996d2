"""Words that repeat are cut into tokens once: the tokens are those of stock llama.cpp, in its own vocabularies."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TEXT
from pace import within
from repository import ROOT

from lminf_edge import Llama
from lminf_edge.engine.request import RequestCancelled
from lminf_edge.text.tokenizer import LONG_TEXT, CachedTokenizer, control_texts, use_tokenizer

STOCK = ROOT / "build" / "stock" / "bin"
VOCABULARIES = [
    "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2", "llama-bpe", "mpt", "qwen2",
    "qwen35", "refact", "starcoder", "llama-spm", "phi-3", "baichuan",
]  # fmt: skip

TOKENIZE = """
import json, sys
import llama_cpp
for path, texts in json.load(sys.stdin).items():
    llm = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    print(json.dumps([llm._model.tokenize(text.encode(), False, True) for text in texts]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama.cpp's vocabularies, with texts and the tokens that each model's own tokenizer makes of them."""
    sdist = next((ROOT / "build" / "upstream").glob("llama_cpp_python-*.tar.gz"), None)
    if sdist is None:
        pytest.skip("build/upstream has no sdist: make setup")
    folder = tmp_path_factory.mktemp("vocabularies")
    known = [*VOCABULARIES, "bert-bge", "nomic-bert-moe"]
    names = {f"ggml-vocab-{name}.gguf{end}" for name in known for end in ("", ".inp", ".out")}
    with tarfile.open(sdist) as archive:
        for member in archive:
            name = Path(member.name).name
            if name in names and (file := archive.extractfile(member)):
                (folder / name).write_bytes(file.read())
    return folder


def path_of(folder: Path, name: str) -> str:
    return str(folder / f"ggml-vocab-{name}.gguf")


def texts_of(seed: int) -> list[str]:
    """Texts in which most words come more than once: prose, code, numbers, other scripts, any code point."""
    rng = random.Random(seed)
    words = [*TEXT.split(" "), "don't", "DON'T", "  ", "\n", "\n\n", "\t\t", "1234", "12", "x=y;", "->", "日本語",
             "été", "🙂🙂", "e\u0301", "\u00a0", "İstanbul", "привет", "مرحبا", "a" * 100,
             "<|endoftext|>", "</s>", "\u2581", "x\u2581y", ", and", "a.  b"]  # fmt: skip
    words += ["".join(chr(rng.randrange(1, 0xD800)) for _ in range(rng.randrange(1, 6))) for _ in range(40)]
    return ["".join(rng.choice(words) + rng.choice([" ", " ", "", "\n"]) for _ in range(600)) for _ in range(4)]


@pytest.fixture(scope="module")
def stock(folder: Path) -> dict[str, list[list[int]]]:
    if not any(STOCK.glob("libllama.*")):
        pytest.skip("build/stock has no library: make stock")
    asked = {path_of(folder, name): texts_of(i) for i, name in enumerate(VOCABULARIES)}
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(STOCK)}
    made = subprocess.run(
        [sys.executable, "-c", TOKENIZE], input=json.dumps(asked), env=env, capture_output=True, text=True, check=True
    )
    return dict(zip(VOCABULARIES, map(json.loads, made.stdout.splitlines()), strict=True))


@pytest.fixture(params=VOCABULARIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def llm(folder: Path, name: str) -> Iterator[Any]:
    made = Llama(path_of(folder, name), vocab_only=True, verbose=False)
    use_tokenizer(made)
    yield made
    made.close()


def test_tokens_are_those_of_stock_llama_cpp(llm: Any, name: str, stock: dict[str, list[list[int]]]) -> None:
    texts = texts_of(VOCABULARIES.index(name))
    assert [llm.tokenize(text.encode(), False, True) for text in texts] == stock[name]
    assert len(stock[name][0]) > 1000


def test_tokens_are_those_of_the_model(llm: Any, name: str, folder: Path) -> None:
    path = Path(path_of(folder, name))
    if not path.with_suffix(".gguf.out").exists():
        pytest.skip("llama.cpp has no expected tokens for it")
    texts = path.with_suffix(".gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    expected = path.with_suffix(".gguf.out").read_text(encoding="utf-8").splitlines()
    for text, line in zip(texts, expected, strict=False):
        assert llm.tokenize(text.encode(), False, False) == [int(token) for token in line.split()]


def test_pieces_together_are_as_one_by_one(llm: Any) -> None:
    controls = list(control_texts(llm, " ".join(_control_texts(llm))))[:3]
    cached, rng = CachedTokenizer(llm, " ".join(controls), 0), random.Random(1)
    assert len(cached._cuts) == len(controls)
    for text in texts_of(7):
        text = re.sub("[<>]", "", text)  # or it would complete a special token across a cut
        parts = [text[i : i + 37] for i in range(0, len(text), 37)]
        mixed = "".join(part + (rng.choice(controls) if controls else "") for part in parts)
        pieces = cached.split(mixed)
        assert len(pieces) > 50 or not controls
        one_by_one = [llm.tokenize(piece.encode(), False, True) for piece in pieces]
        tokens, found, starts = cached.encode(mixed, False)
        assert found == pieces
        assert [part.tolist() for part in np.split(tokens, starts[1:-1])] == one_by_one
        assert tokens.tolist() == llm.tokenize(mixed.encode(), False, True)


LONG = {
    "a word": "ab" * 100_000,
    "words": " ".join(f"{i:x}" for i in range(100_000)),
    "what is in no vocabulary": "\U00012345" * 150_000,
    "special tokens": "a{special}" * 100_000,
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("qwen2", kind) for kind in ("a word", "words", "special tokens")),
        *(("llama-spm", kind) for kind in ("a word", "words", "what is in no vocabulary")),
        *(("bert-bge", kind) for kind in ("a word", "words")),
        *(("nomic-bert-moe", kind) for kind in ("a word", "words", "what is in no vocabulary")),
    ],
)
def test_tokenizing_stops_when_it_is_cancelled(folder: Path, name: str, kind: str) -> None:
    llm = Llama(path_of(folder, name), vocab_only=True, verbose=False)
    use_tokenizer(llm)
    text = LONG[kind].format(special="<|im_end|>")
    expected = llm.tokenize(text.encode(), False, True)
    n_asked = 0

    def is_cancelled() -> bool:
        nonlocal n_asked
        n_asked += 1
        return n_asked > 2  # it was asked before it began, and once meanwhile

    tokenizer = CachedTokenizer(llm, "", 0)
    with pytest.raises(RequestCancelled):
        tokenizer.tokenize(text, is_cancelled=is_cancelled)
    assert n_asked == 4  # and once why there are no tokens
    assert tokenizer.tokenize(text).tolist() == expected
    llm.close()


@pytest.mark.parametrize("name", ["llama-spm", "phi-3", "qwen2"])
@pytest.mark.parametrize("character", ["\ufffd", "\U00012345", "中", "\n", "é"])
def test_what_has_no_token_takes_the_time_of_its_number(folder: Path, name: str, character: str) -> None:
    llm = Llama(path_of(folder, name), vocab_only=True, verbose=False)
    use_tokenizer(llm)
    expected = llm.tokenize(character.encode() * 64, False, True)
    with within(4):  # a quarter of an hour, were it the square
        tokens = llm.tokenize(character.encode() * 500_000, False, True)
    assert tokens[: len(expected) // 2] == expected[: len(expected) // 2]
    assert llm.detokenize(tokens).strip() == (character.encode() * 500_000).strip()
    llm.close()


def test_special_tokens_take_the_time_of_their_number(folder: Path) -> None:
    llm = Llama(path_of(folder, "qwen2"), vocab_only=True, verbose=False)
    one, *_ = llm.tokenize(b"<|im_end|>", False, True)
    with within(5):  # half a minute, were it the square
        assert llm.tokenize(b"<|im_end|>" * 100_000, False, True) == [one] * 100_000
    llm.close()


def test_a_client_that_hangs_up_does_not_wait_for_the_text_of_another(folder: Path) -> None:
    llm = Llama(path_of(folder, "qwen2"), vocab_only=True, verbose=False)
    use_tokenizer(llm)
    tokenizer = CachedTokenizer(llm, "", 0)
    with tokenizer._long, pytest.raises(RequestCancelled):
        tokenizer.tokenize("a" * (LONG_TEXT + 1), is_cancelled=lambda: True)
    llm.close()


def _control_texts(llm: Any) -> list[str]:
    import llama_cpp

    vocab = llm._model.vocab
    return [llama_cpp.llama_vocab_get_text(vocab, token).decode("utf-8", "replace") for token in range(llm.n_vocab())]
