"""The package attention_sinks on a CPU: `pip install torch transformers==4.35.2 attention_sinks`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version

import attention_sinks
import numpy as np
import torch
from implementation import Implementation
from oracle import UNSEEN, Array, Table
from vectors import Vectors

from adapters.transformers_caches import VERSIONS as OTHERS
from adapters.transformers_caches import model_of

VERSIONS = OTHERS | {"attention_sinks": version("attention_sinks")}


@torch.no_grad()
def losses(vectors: Vectors, keep: int, size: int, batch: int) -> Array:
    with tempfile.TemporaryDirectory() as folder:
        model_of(vectors, None, "eager").save_pretrained(folder)
        model = attention_sinks.AutoModelForCausalLM.from_pretrained(
            folder, attention_sink_size=keep, attention_sink_window_size=size
        )
    tokens = torch.from_numpy(vectors.tokens.astype(np.int64))
    past, parts = None, []
    for begin in range(0, len(tokens) - 1, batch):
        end = min(begin + batch, len(tokens) - 1)
        out = model(tokens[None, begin:end], past_key_values=past, use_cache=True)
        past = out.past_key_values
        costs = -torch.log_softmax(out.logits[0].double(), -1)
        parts.append(costs[torch.arange(end - begin), tokens[begin + 1 : end + 1]].numpy())
    return np.concatenate(parts)


def evicted_after(n: int, keep: int, size: int, batch: int) -> Table:
    """Keys are evicted after a batch, so that its queries see what was left before, and the batch up to themselves."""
    table = np.full((n, n), UNSEEN)
    cells: list[int] = []
    for begin in range(0, n, batch):
        for i in range(begin, min(begin + batch, n)):
            cells.append(i)
            table[i, cells] = np.arange(len(cells))[::-1]
        del cells[keep : max(keep, len(cells) - size)]
    return table


def implementations(vectors: Vectors) -> Iterator[Implementation]:
    n, parameters = len(vectors.tokens), vectors.cases["sinks"].parameters
    keep, n_local = parameters["n_global"], parameters["n_local"]
    for size, said in ((n_local, "L"), (n_local - 1, "L - 1")):
        for batch in (1, 7):
            compute = partial(losses, vectors, keep, size, batch)
            table = evicted_after(n, keep, size, batch)
            name = f"attention_sink_size=G, attention_sink_window_size={said}"
            yield Implementation(name, f"batches of {batch}", "sinks", compute, table)
