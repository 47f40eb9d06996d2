"""The models of llama-server's tests, as far as they are at hand without a network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
STORIES = ("ggml-org/test-model-stories260K", "ggml-org/models/tinyllamas/stories260K.gguf")


def find(repo: str | None, file: str | None) -> Path:
    """The model a test asks for by its repository and file. Skips the test if it is not here."""
    name = "/".join(part for part in (repo, file) if part)
    if name in STORIES:
        return Path(os.environ["LMINF_STORIES"])
    pytest.skip(f"the model {name} is not at hand")
