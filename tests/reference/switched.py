"""Granite Switch in float64 numpy: Granite whose tokens turn adapters on.

A router is one head that attends to all tokens so far: those of adapters score its gain and have the number of their
adapter as value, the others score as much below 0 and have 0. What it sees, rounded, is the adapter that a token is
computed with. That is no attention to what a text says, so the Λ rule is not about it: it sees every token once.
"""

from __future__ import annotations

from os import PathLike
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from reference.gguf_file import Array
from reference.transformer import Architecture, Block, Tokens, Transformer, softmax


class Switched(Transformer):
    """graniteswitch: each projection has a low-rank pair for each adapter, and one, the first, for none."""

    known: ClassVar = {"graniteswitch": Architecture(rope="adjacent")}

    def __init__(self, path: str | PathLike[str]) -> None:
        super().__init__(path)
        self.adapters: npt.NDArray[np.integer[Any]] = np.zeros(0, dtype=np.int64)  # of each token embedded last

    def embed(self, tokens: Tokens) -> Array:
        """[n_tokens, n_embd]; a token that turns an adapter on has the embedding of another one."""
        numbers = self.numbers(tokens)
        self.adapters = np.rint(self.route(numbers)).astype(np.int64)
        substitutes = np.array([0, *self.key("adapters.token_ids_substitute")])
        return super().embed(np.where(numbers > 0, substitutes[numbers], tokens))

    def numbers(self, tokens: Tokens) -> npt.NDArray[np.int64]:
        """[n_tokens]: which adapter each of them turns on, from 1 on; 0 for none."""
        own = np.asarray(tokens)[:, None] == np.array(self.key("adapters.token_ids_activate"))
        return np.where(own.any(axis=1), own.argmax(axis=1) + 1, 0)

    def route(self, numbers: npt.NDArray[np.int64]) -> Array:
        """[n_tokens]: what the router sees of adapters' numbers[n_tokens]."""
        gain = float(self.key("adapters.router_gain", 15.0))
        scores = np.where(numbers > 0, gain, -gain)
        return np.array([softmax(scores[: i + 1]) @ numbers[: i + 1] for i in range(len(numbers))])

    def adapted(self, x: Array, name: str) -> Array:
        """What each token's adapter adds to the matrix `name` times x[n_tokens, n_in]."""
        down = np.einsum("tri,ti->tr", self.tensors[name + ".lora_a"][self.adapters], x)
        return np.asarray(np.einsum("tor,tr->to", self.tensors[name + ".lora_b"][self.adapters], down))

    def projections(self, x: Array, block: Block) -> tuple[Array, Array, Array]:
        """Queries, keys and values, which come from one matrix."""
        q, k, v = super().projections(x, block)
        added_q, added_k, added_v = (self.adapted(x, block.at + name) for name in ("attn_q", "attn_k", "attn_v"))
        return q + added_q, k + added_k, v + added_v

    def linear(self, x: Array, name: str, expert: int | None = None) -> Array:
        """As in others, with what adapters add."""
        out = super().linear(x, name, expert)
        return out + self.adapted(x, name) if name + ".lora_a" in self.tensors else out
