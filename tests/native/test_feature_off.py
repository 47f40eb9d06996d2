"""With the feature off, the patched llama.cpp is llama.cpp: the same bits from a library built of the same source."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from reference import models, tiny_models
from repository import STOCK, SUPPORT
from test_selector import write, write_blocks

from lminf_edge.native import LIBRARY_NAMES, library_folder


def probe(library: Path, *arguments: str) -> list[str]:
    command = [sys.executable, str(SUPPORT / "stock_probe.py"), *arguments]
    environment = os.environ | {"LLAMA_CPP_LIB_PATH": str(library)}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()


def test_feature_off_is_bit_identical(tmp_path: Path, nano_path: str) -> None:
    if not any((STOCK / name).exists() for name in LIBRARY_NAMES):
        pytest.fail("There is no stock library to compare with: make stock")
    ours = library_folder()
    assert ours is not None
    tiny = [str(tiny_models.write(name, tmp_path)) for name in ("llama", "mpt", "phi3", "gptneox", "qwen3moe")]
    # adapters that tokens turn on, and queries that select a few tokens or blocks
    tiny += [str(models.write("graniteswitch", tmp_path)), str(write(tmp_path, 36)), str(write_blocks(tmp_path, 6))]
    for arguments, n_cases in ((["--quantized", nano_path], 8), (tiny, 4 * len(tiny))):
        expected = probe(STOCK, *arguments)
        assert len({line.split()[-1] for line in expected}) == n_cases  # the digests tell the cases apart
        assert probe(ours, *arguments) == expected
