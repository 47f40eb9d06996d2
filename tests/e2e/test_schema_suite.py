"""The JSON-Schema-Test-Suite: what it calls invalid no grammar of ours lets through; other schemas are refused.

The suite is in jsonschema's source distribution. A grammar may allow less than its schema does (properties in one
order, none that nobody declared): that costs variety, never validity, so valid instances are counted, not demanded.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import itertools
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from repository import ROOT

from lminf_edge.errors import UserError
from lminf_edge.text.schema import schema_gbnf

# of each draft's groups of tests, and of their valid instances: at least as many are served
SERVED = {
    "draft4": (90, 140),
    "draft6": (112, 180),
    "draft7": (120, 210),
    "draft2019-09": (130, 240),
    "draft2020-12": (125, 250),
}
TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # struct llama_token_data


@pytest.fixture(scope="module")
def suite() -> Path:
    folder = ROOT / "build" / "json-schema-suite"
    if not (folder / "tests").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        wanted = f"jsonschema=={importlib.metadata.version('jsonschema')}"
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "jsonschema"]
        done = subprocess.run([*pip, "-d", folder, wanted], capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"jsonschema's source distribution could not be downloaded: {done.stderr[-200:]}")
        (archive,) = folder.glob("jsonschema-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (folder / archive.name.removesuffix(".tar.gz") / "json" / "tests").rename(folder / "tests")
    return folder / "tests"


class Acceptor:
    """Whether a grammar takes a text, byte by byte, to its end."""

    def __init__(self, model_path: str) -> None:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(model_path.encode(), params)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._eos = llama_cpp.llama_vocab_eos(self._vocab)
        buffer = ctypes.create_string_buffer(64)
        self._tokens: dict[int, int] = {}
        for token in range(llama_cpp.llama_vocab_n_tokens(self._vocab)):
            if llama_cpp.llama_token_to_piece(self._vocab, token, buffer, 64, 0, True) == 1:
                self._tokens.setdefault(buffer.raw[0], token)

    def close(self) -> None:
        llama_cpp.llama_model_free(self._model)

    def __call__(self, gbnf: str, text: str) -> bool:
        grammar = llama_cpp.llama_sampler_init_grammar(self._vocab, gbnf.encode(), b"root")
        assert grammar
        try:
            for byte in text.encode():
                token = self._tokens[byte]
                if not self._allows(grammar, token):
                    return False
                llama_cpp.llama_sampler_accept(grammar, token)
            return self._allows(grammar, self._eos)
        finally:
            llama_cpp.llama_sampler_free(grammar)

    @staticmethod
    def _allows(grammar: Any, token: int) -> bool:
        one = np.array([(token, 1.0, 0.0)], dtype=TOKEN_DATA)
        data = one.ctypes.data_as(llama_cpp.llama_token_data_p)
        llama_cpp.llama_sampler_apply(grammar, llama_cpp.llama_token_data_array(data, 1, -1, False))
        return bool(np.isfinite(one["logit"][0]))


@pytest.fixture(scope="module")
def accepts(nano_path: str) -> Iterator[Acceptor]:
    made = Acceptor(nano_path)
    yield made
    made.close()


def written(value: Any) -> Iterator[str]:
    """A value as models write it: with spaces and without, its properties in any order."""
    yield json.dumps(value, ensure_ascii=False)
    orders = itertools.islice(itertools.permutations(value), 24) if isinstance(value, dict) else [None]
    for order in orders:
        ordered = {name: value[name] for name in order} if order else value
        yield json.dumps(ordered, ensure_ascii=False, separators=(",", ":"))


@pytest.mark.parametrize("draft", SERVED)
def test_nothing_invalid_is_let_through(suite: Path, accepts: Acceptor, draft: str) -> None:
    let_through, n_served, n_valid = [], 0, 0
    for path in sorted((suite / draft).glob("*.json")):
        for group in json.loads(path.read_text(encoding="utf-8")):
            try:
                gbnf = schema_gbnf(group["schema"])
            except UserError:
                continue
            n_served += 1
            for test in group["tests"]:
                taken = any(accepts(gbnf, text) for text in written(test["data"]))
                if taken and not test["valid"]:
                    let_through.append((path.name, group["description"], test["description"]))
                n_valid += taken and test["valid"]
    assert not let_through
    assert n_served >= SERVED[draft][0]
    assert n_valid >= SERVED[draft][1]
