"""This project's build: every policy as `lminf-edge ppl` runs it, with f32 weights and an f32 cache."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

from implementation import Implementation
from oracle import Array
from vectors import Case, Vectors

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from reference.gguf_file import copy_as_f32

import lminf_edge
from lminf_edge.config import Attention, LMInfConfig, Window, resolve
from lminf_edge.evaluate import token_nll
from lminf_edge.evaluate.policies import POLICIES

VERSIONS = {"lminf-edge": lminf_edge.__version__}
BATCHES = (1, 7, 64)
F32 = 0  # enum ggml_type
_folder = tempfile.TemporaryDirectory(prefix="conformance-")


@cache
def as_f32(path: Path) -> Path:
    """ggml rounds activations to the type of the weights that they meet."""
    copy = Path(_folder.name) / path.name
    copy_as_f32(path, copy)
    return copy


def window_of(case: Case, attention: Attention, n_tokens: int) -> Window:
    settings = {"n_global": 0, "n_local": n_tokens} | case.parameters  # full attention has no window
    config = LMInfConfig(
        **settings,  # type: ignore[arg-type]
        attention=attention,
        n_recall=n_tokens if case.policy == "recall" else 0,
        recall_index="exact",
        archive_type_k="f32",
        archive_type_v="f32",
    )
    return resolve(config, None, n_tokens)


def losses(vectors: Vectors, case: Case, attention: Attention, n_batch: int) -> Array:
    policy, tokens = POLICIES[case.policy], vectors.tokens
    window = window_of(case, attention, len(tokens))
    arguments = policy.arguments(window, len(tokens), n_batch, on_gpu=False)
    arguments |= {"n_batch": n_batch, "n_threads": 1, "n_threads_batch": 1, "type_k": F32, "type_v": F32}
    with contextlib.closing(lminf_edge.Llama(as_f32(vectors.model), verbose=False, **arguments)) as llm:
        return token_nll(policy.reader(llm, window), tokens)


def implementations(vectors: Vectors) -> Iterator[Implementation]:
    for case in vectors.cases.values():
        ours = POLICIES[case.policy].sink_mode is not None
        # what is recalled is chosen for a whole micro-batch: only one at a time, all that has left the window is
        for n_batch in BATCHES if case.policy != "recall" else (1,):
            for attention in ("fused", "stock") if ours else ("stock",):
                name = f"Λ cache, {attention} operations" if ours else "llama.cpp's own cache"
                compute = partial(losses, vectors, case, attention, n_batch)
                yield Implementation(name, f"batches of {n_batch}", case.name, compute)
