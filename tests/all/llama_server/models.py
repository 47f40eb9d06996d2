"""The models of llama-server's tests, as far as they are at hand without a network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from reference.gguf_file import copy_with

ROOT = Path(__file__).resolve().parents[3]
# the same model, if a test asks for none: it is about something else
STORIES = ("ggml-org/test-model-stories260K", "ggml-org/models/tinyllamas/stories260K.gguf", "")
INFILL = "ggml-org/test-model-stories260K-infill"


def find(repo: str | None, file: str | None) -> Path:
    """The model a test asks for by its repository and file. Skips the test if it is not here."""
    name = "/".join(part for part in (repo, file) if part)
    if name in STORIES:
        return Path(os.environ["LMINF_STORIES"])
    if name == INFILL:
        target = Path("infill.gguf")
        if (
            not target.exists()
        ):  # some of its tokens as those for infill: the answers mean nothing, nor do llama-server's
            keys = {f"tokenizer.ggml.{name}_token_id": 3 + i for i, name in enumerate(("prefix", "suffix", "middle"))}
            copy_with(os.environ["LMINF_STORIES"], target, keys)
        return target
    pytest.skip(f"the model {name} is not at hand")
