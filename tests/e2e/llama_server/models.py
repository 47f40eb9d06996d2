"""The models of llama-server's tests, as far as they are at hand without a network."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from reference.gguf_file import copy_with, finish, with_metadata
from reference.random_model import KEYS, N_EMBD, weight
from reference.tiny_models import VALUE_TYPES
from reference.unsupported_models import MODELS

ROOT = Path(__file__).resolve().parents[3]
N_CTX = 512
# the same model, if a test asks for none: it is about something else
STORIES = ("ggml-org/test-model-stories260K", "ggml-org/models/tinyllamas/stories260K.gguf", "")
ENCODERS = (
    "ggml-org/models/bert-bge-small/ggml-model-f16.gguf",
    "ggml-org/models/jina-reranker-v1-tiny-en/ggml-model-f16.gguf",
)
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
    if name in ENCODERS:
        target = Path("encoder.gguf")
        if not target.exists():
            write_encoder(target)
        return target
    pytest.skip(f"the model {name} is not at hand")


def write_encoder(target: Path) -> None:
    """A tiny model with random weights, and the vocabulary of the one that llama-server's tests have."""
    bert = MODELS["bert"].model
    reader = GGUFReader("../../../models/ggml-vocab-bert-bge.gguf")
    writer = with_metadata(reader, target, [name for name in reader.fields if name.startswith("bert.")])
    n_vocab = len(reader.fields["tokenizer.ggml.tokens"].data)
    keys = KEYS | bert.keys | {"vocab_size": n_vocab, "context_length": N_CTX, "block_count": len(bert.blocks)}
    for key, value in keys.items():
        if not key.startswith("tokenizer."):
            writer.add_key_value(f"bert.{key}", value, VALUE_TYPES[type(value)])
    shapes = bert.shapes() | {"token_embd.weight": (n_vocab, N_EMBD), "position_embd.weight": (N_CTX, N_EMBD)}
    shapes |= {"cls.weight": (N_EMBD, N_EMBD), "cls.bias": (N_EMBD,), "cls.output.weight": (1, N_EMBD)}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(name, weight(name, shape, rng))
    finish(writer)
