"""MLX-LM's caches on a CPU: `pip install mlx-lm mlx-cpu` (on a Mac, without the latter)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
from implementation import Implementation
from mlx_lm.generate import generate_step
from mlx_lm.models import cache, llama
from oracle import UNSEEN, Array, Table
from vectors import Vectors

from adapters.names import is_tied, weights

VERSIONS = {"mlx": version("mlx"), "mlx-lm": version("mlx-lm")}


def model_of(vectors: Vectors) -> Any:
    """MLX's traditional RoPE turns neighbouring dimensions, as GGUF files of Llamas have them."""
    oracle = vectors.oracle
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=oracle.key("embedding_length"),
            num_hidden_layers=oracle.n_layer,
            intermediate_size=oracle.key("feed_forward_length"),
            num_attention_heads=oracle.n_head,
            num_key_value_heads=oracle.key("attention.head_count_kv"),
            head_dim=oracle.head_size,
            rms_norm_eps=oracle.epsilon,
            vocab_size=len(oracle.tensors["token_embd.weight"]),
            rope_theta=oracle.key("rope.freq_base", 10000.0),
            rope_traditional=True,
            tie_word_embeddings=is_tied(oracle),
        )
    )
    model.load_weights([(name, mx.array(tensor)) for name, tensor in weights(oracle)])
    return model


def losses(vectors: Vectors, model: Any, make: Any, batches: Sequence[int]) -> Array:
    """A cache for each layer; tokens in batches of these sizes, the last of them until there are none left."""
    caches = [make() for _ in model.layers]
    parts = []
    for begin, end in bounds(len(vectors.tokens), batches):
        logits = model(mx.array(vectors.tokens[None, begin:end]), cache=caches)[0].astype(mx.float32)
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        parts.append(np.array(logits)[: len(vectors.tokens) - 1 - begin])
    rows = np.concatenate(parts)
    return -rows[np.arange(len(rows)), vectors.tokens[1:]].astype(np.float64)


def bounds(n: int, batches: Sequence[int]) -> Iterator[tuple[int, int]]:
    begin = step = 0
    while begin < n:
        size = batches[min(step, len(batches) - 1)]
        yield begin, min(begin + size, n)
        begin, step = begin + size, step + 1


def generated(vectors: Vectors, model: Any, n_prompt: int, make: Any, size: int | None = None) -> Array:
    """What MLX-LM's own generate_step sees when it is made to choose the tokens of the text, after a prompt."""
    text = vectors.tokens
    found: list[float] = []

    def force(tokens: Any, logits: Any) -> Any:
        at = n_prompt + len(found)
        if at >= len(text):  # it is asked for one more than is taken
            return logits
        found.append(-float(logits[0, int(text[at])] - mx.logsumexp(logits[0])))
        forced = mx.full(logits.shape, -1e9)
        forced[0, int(text[at])] = 0.0
        return forced

    steps = generate_step(
        mx.array(text[:n_prompt]),
        model,
        max_tokens=len(text) - n_prompt,
        max_kv_size=size,
        prompt_cache=[make() for _ in model.layers] if make else None,
        logits_processors=[force],
    )
    for _ in steps:
        pass
    return np.array(found)


def rotating(n: int, size: int, keep: int, batches: Sequence[int]) -> Table:
    """What RotatingKVCache does, by our reading of it.

    One token at a time it is the rule. In a batch, its mask counts columns of the cache back from the query, and the
    columns of the kept tokens are the first: they are masked from the second query of a batch on, one after the other.
    """
    table = np.full((n, n), UNSEEN)
    cells: list[int] = []
    for begin, end in bounds(n, batches):
        del cells[keep : max(keep, len(cells) - size + 1 + keep)]
        offset = len(cells)
        cells += range(begin, end)
        for i in range(begin, end):
            column = offset + i - begin
            seen = np.array(cells[max(0, column - size + 1) : column + 1])
            table[i, seen] = i - seen
    return table


def implementations(vectors: Vectors) -> Iterator[Implementation]:
    model, n = model_of(vectors), len(vectors.tokens)
    keep = vectors.cases["sinks-uncapped"].parameters["n_global"]
    size = vectors.cases["window"].parameters["n_local"]
    for batch in (1, 64):
        compute = partial(losses, vectors, model, cache.KVCache, [batch])
        yield Implementation("KVCache", f"batches of {batch}", "full", compute)
    for batch in (1, 7, 64):
        compute = partial(losses, vectors, model, partial(cache.RotatingKVCache, size), [batch])
        yield Implementation("RotatingKVCache(G + L)", f"batches of {batch}", "window", compute)
    name, make = "RotatingKVCache(G + L, keep=G)", partial(cache.RotatingKVCache, size, keep)
    for batch in (1, 7, 64):
        compute = partial(losses, vectors, model, make, [batch])
        table = rotating(n, size, keep, [batch])
        yield Implementation(name, f"batches of {batch}", "sinks-uncapped", compute, table)
    for n_prompt, prompt in ((size // 2, "a short prompt"), (200, "a prompt of 200")):
        compute = partial(generated, vectors, model, n_prompt, make)
        table = rotating(n, size, keep, [n_prompt - 1, 1])
        yield Implementation(name, f"generate_step, {prompt}", "sinks-uncapped", compute, table)
    compute = partial(generated, vectors, model, 200, None, size)
    yield Implementation("max_kv_size=G + L", "generate_step, a prompt of 200", "sinks-uncapped", compute)
