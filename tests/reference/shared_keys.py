"""Gemma 4 in float64 numpy: its last layers have no keys of their own and attend to those of an earlier layer."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from reference.gguf_file import Array
from reference.rule import Rope, Rule
from reference.transformer import Architecture, Block, Transformer


class Gemma4(Transformer):
    """gemma4, without embeddings per layer and without experts."""

    known: ClassVar = {"gemma4": Architecture(gelu=True, sliding_base=10000.0, root_scale=True)}

    def layer(self, x: Array, block: Block) -> Array:
        """One block, its output scaled as a whole."""
        if block.layer == 0:
            self.cached: dict[int, tuple[Array, Array]] = {}
        return super().layer(x, block) * self.tensors.get(block.at + "layer_output_scale.weight", np.ones(1))

    def heads(self, x: Array, block: Block) -> tuple[Array, Array, Array]:
        """Queries, keys and values; heads of sliding layers have a size of their own."""
        at = block.at
        size = len(self.tensors[at + "attn_q_norm.weight"])
        q = self.norm(self.linear(x, at + "attn_q").reshape(len(x), -1, size), at + "attn_q_norm")
        n_own = self.n_layer - int(self.key("attention.shared_kv_layers", 0))
        if block.layer >= n_own:
            # the last two layers with keys are a sliding one and one that is not
            return q, *self.cached[n_own - (2 if self.slides(block.layer) else 1)]
        k = self.linear(x, at + "attn_k").reshape(len(x), -1, size)
        v = self.linear(x, at + "attn_v").reshape(len(x), -1, size) if at + "attn_v.weight" in self.tensors else k
        self.cached[block.layer] = self.norm(k, at + "attn_k_norm"), self.unit(v)
        return q, *self.cached[block.layer]

    def score(self, dots: Array) -> Array:
        """q.k as it is: both are normed."""
        return dots

    def rope(self, n_ctx: int, rule: Rule, sliding: bool = False) -> Rope:
        """The rotation; sliding layers turn heads of another size and have no factors."""
        n_rot = int(self.key("rope.dimension_count_swa" if sliding else "rope.dimension_count", 0) or self.head_size)
        base = float(self.key("rope.freq_base_swa", 10000.0) if sliding else self.key("rope.freq_base"))
        frequencies = base ** (-2.0 * np.arange(n_rot // 2) / n_rot)
        return Rope(frequencies if sliding else frequencies / self.tensors["rope_freqs.weight"])
