"""Llama 4 in float64 numpy: layers that attend within chunks, and layers without RoPE, with a temperature."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from reference.gguf_file import Array
from reference.rule import Rule
from reference.transformer import Architecture, Block, Transformer

N_CHUNK = 8192


class Llama4(Transformer):
    """llama4, without experts."""

    known: ClassVar = {"llama4": Architecture(rope="adjacent", rope_free_every=4, sliding_every=4)}

    def sliding_rule(self, rule: Rule) -> Rule:
        """A chunk, up to the query."""
        return Rule(N_CHUNK, chunk=N_CHUNK)

    def heads(self, x: Array, block: Block) -> tuple[Array, Array, Array]:
        """Queries, keys and values; where they are rotated, queries and keys are normed, which commutes with it."""
        q, k, v = super().heads(x, block)
        return (self.unit(q), self.unit(k), v) if len(block.rope.frequencies) else (q, k, v)

    def temperature(self, block: Block) -> Array:
        """[n_tokens]: the factor on queries of layers without RoPE, which grows every 8192 keys."""
        if len(block.rope.frequencies):
            return np.ones(len(block.positions))
        return np.asarray(1 + 0.1 * np.log(1 + (self.seen(block) + 1) // N_CHUNK))
