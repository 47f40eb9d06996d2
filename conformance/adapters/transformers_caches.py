"""Transformers' caches on a CPU, of the version that is installed: `pip install torch transformers`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from implementation import Implementation
from oracle import UNSEEN, Array, Table
from vectors import Vectors

from adapters.names import is_tied, weights

Matrix = npt.NDArray[np.float32]
VERSIONS = {"torch": version("torch"), "transformers": version("transformers")}


def halves(matrix: Matrix, size: int) -> Matrix:
    """Rows of heads of this size: Transformers turns p and p + size / 2, where GGUF files have neighbours."""
    heads = matrix.reshape(-1, size // 2, 2, matrix.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(matrix.shape)


def model_of(vectors: Vectors, sliding: int | None, attention: str) -> Any:
    """Llama; with a sliding window Mistral, which is the same model."""
    oracle = vectors.oracle
    settings: dict[str, Any] = {
        "hidden_size": oracle.key("embedding_length"),
        "num_hidden_layers": oracle.n_layer,
        "intermediate_size": oracle.key("feed_forward_length"),
        "num_attention_heads": oracle.n_head,
        "num_key_value_heads": oracle.key("attention.head_count_kv"),
        "head_dim": oracle.head_size,
        "rms_norm_eps": oracle.epsilon,
        "vocab_size": len(oracle.tensors["token_embd.weight"]),
        "rope_theta": oracle.key("rope.freq_base", 10000.0),
        "max_position_embeddings": 4096,
        "tie_word_embeddings": is_tied(oracle),
        "attn_implementation": attention,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config = (
        transformers.MistralConfig(**settings, sliding_window=sliding)
        if sliding
        else transformers.LlamaConfig(**settings)
    )
    model = (transformers.MistralForCausalLM if sliding else transformers.LlamaForCausalLM)(config)
    state = {}
    for name, tensor in weights(oracle):
        turns = "q_proj" in name or "k_proj" in name
        state[name] = torch.from_numpy(halves(tensor, oracle.head_size) if turns else tensor)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval().float()


def static(model: Any, n: int) -> Any:
    if version("transformers") >= "5":
        return transformers.StaticCache(config=model.config, max_cache_len=n)
    return transformers.StaticCache(
        config=model.config, max_batch_size=1, max_cache_len=n, device="cpu", dtype=torch.float32
    )


def dynamic(model: Any, n: int) -> Any:
    return (
        transformers.DynamicCache(config=model.config)
        if version("transformers") >= "5"
        else transformers.DynamicCache()
    )


def sink(model: Any, n: int, size: int, keep: int) -> Any:
    return transformers.SinkCache(size, keep)


def moved_keys(n: int, size: int, keep: int, n_prompt: int = 0) -> Table:
    """What SinkCache does, by our reading of it; n_prompt: in generate().

    From when it is full on, each token moves the keys of the window back by one position. A new key and its query stand
    where the model says: at the number of cached tokens if it is told nothing, but at their true position in
    generate(), so that distances in the window grow by two for each token.
    """
    i, j = np.arange(n)[:, None], np.arange(n)
    last_still = max(n_prompt - 1, size - 2)  # the last query that moves nothing
    position = np.arange(n) if n_prompt else np.minimum(np.arange(n), size)
    moves = np.maximum(i - np.maximum(j, last_still), 0)
    table = position[:, None] - position + np.where(j < keep, 0, moves)
    evicted = (i > last_still) & (j >= keep) & (i - j >= size - keep)
    return np.where((i < j) | evicted, UNSEEN, table)


@torch.no_grad()
def losses(vectors: Vectors, load: Any, make: Any, batch: int) -> Array:
    """Batch by batch through the model's forward, which is told nothing of positions."""
    model, tokens = load(), torch.from_numpy(vectors.tokens.astype(np.int64))
    n = len(tokens)
    cache, parts = make(model, n), []
    for begin in range(0, n - 1, batch):
        end = min(begin + batch, n - 1)
        logits = model(tokens[None, begin:end], past_key_values=cache, use_cache=True).logits[0].double()
        parts.append(-torch.log_softmax(logits, -1)[torch.arange(end - begin), tokens[begin + 1 : end + 1]].numpy())
    return np.concatenate(parts)


class Forced(transformers.LogitsProcessor):
    """Makes generate() choose the tokens of a text, and keeps what they cost."""

    def __init__(self, text: torch.Tensor) -> None:
        self.text = text
        self.losses: list[float] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        token = self.text[input_ids.shape[1]]
        self.losses.append(-float(torch.log_softmax(scores[0].double(), -1)[token]))
        forced = torch.full_like(scores, -torch.inf)
        forced[0, token] = 0.0
        return forced


@torch.no_grad()
def generated(vectors: Vectors, load: Any, make: Any, n_prompt: int) -> Array:
    """What generate() sees after a prompt."""
    model, text = load(), torch.from_numpy(vectors.tokens.astype(np.int64))
    force = Forced(text)
    model.generate(
        text[None, :n_prompt],
        attention_mask=torch.ones(1, n_prompt, dtype=torch.long),
        past_key_values=make(model, len(text)),
        max_new_tokens=len(text) - n_prompt,
        do_sample=False,
        use_cache=True,
        logits_processor=transformers.LogitsProcessorList([force]),
    )
    return np.array(force.losses)


def implementations(vectors: Vectors) -> Iterator[Implementation]:
    window = vectors.cases["window"].parameters["n_local"]
    keep = vectors.cases["sinks"].parameters["n_global"]
    for attention in ("eager", "sdpa"):
        llama = partial(model_of, vectors, None, attention)
        mistral = partial(model_of, vectors, window, attention)
        for name, make in (("DynamicCache", dynamic), ("StaticCache", static)):
            for model, case, of in ((llama, "full", "Llama"), (mistral, "window", "Mistral, sliding_window=G + L")):
                for batch in (1, 7, 64):
                    compute = partial(losses, vectors, model, make, batch)
                    yield Implementation(f"{name}, {of}", f"batches of {batch}, {attention}", case, compute)
                compute = partial(generated, vectors, model, make, 200)
                yield Implementation(f"{name}, {of}", f"generate(), a prompt of 200, {attention}", case, compute)
    if not hasattr(transformers, "SinkCache"):
        return
    n, name = len(vectors.tokens), "SinkCache(G + L, G)"
    llama = partial(model_of, vectors, None, "eager")
    make = partial(sink, size=window, keep=keep)
    compute = partial(losses, vectors, llama, make, 1)
    yield Implementation(name, "one by one", "sinks", compute, moved_keys(n, window, keep))
    compute = partial(losses, vectors, llama, make, 7)
    yield Implementation(name, "batches of 7", "sinks", compute)
    for n_prompt, prompt in ((window // 2, "a short prompt"), (200, "a prompt of 200")):
        compute = partial(generated, vectors, llama, make, n_prompt)
        table = moved_keys(n, window, keep, n_prompt)
        yield Implementation(name, f"generate(), {prompt}", "sinks", compute, table)
