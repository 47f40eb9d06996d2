"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) in float64 numpy.

Keys and values of all heads come from one latent per token; a part of each key, the same for all heads, is rotated.
Here they are expanded, as the paper defines them. What a cache holds of them is llama.cpp's business.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from reference.gguf_file import Array
from reference.rule import Rope, Rule
from reference.transformer import Architecture, Block, Tokens, Transformer


class Latent(Transformer):
    """deepseek2, with expanded or absorbed matrices in its file, and deepseek32 where it selects all tokens in view."""

    known: ClassVar = {"deepseek2": Architecture(rope="adjacent"), "deepseek32": Architecture(rope="adjacent")}

    @property
    def n_rot(self) -> int:
        """Rotated dimensions, the last ones of a head."""
        return int(self.key("rope.dimension_count"))

    @property
    def key_size(self) -> int:
        """Dimensions of an expanded key; without absorbed matrices in the file that is what it calls the key length."""
        return int(self.key("attention.key_length_mla", self.head_size))

    def heads(self, x: Array, block: Block) -> tuple[Array, Array, Array]:
        """Expanded queries, keys and values."""
        at, n_plain = block.at, self.key_size - self.n_rot
        compressed = self.norm(self.linear(x, at + "attn_q_a"), at + "attn_q_a_norm")
        q = self.linear(compressed, at + "attn_q_b").reshape(len(x), self.n_head, self.key_size)
        latent, turning = np.split(self.linear(x, at + "attn_kv_a_mqa"), [-self.n_rot], axis=1)
        latent = self.norm(latent, at + "attn_kv_a_norm")
        if at + "attn_kv_b.weight" in self.tensors:
            expanded = self.linear(latent, at + "attn_kv_b").reshape(len(x), self.n_head, -1)
            plain, v = np.split(expanded, [n_plain], axis=2)
        else:
            plain = np.einsum("tr,hrd->thd", latent, self.tensors[at + "attn_k_b.weight"])
            v = np.einsum("tr,hdr->thd", latent, self.tensors[at + "attn_v_b.weight"])
        shared = np.broadcast_to(turning[:, None], (len(x), self.n_head, self.n_rot))
        return q, np.concatenate([plain, shared], axis=2), v

    def rope(self, n_ctx: int, rule: Rule, sliding: bool = False) -> Rope:
        """The rotation, which begins behind the part that does not turn."""
        rope = super().rope(n_ctx, rule, sliding)
        return Rope(rope.frequencies, rope.adjacent, rope.magnitude, begin=self.key_size - self.n_rot)

    def score(self, dots: Array) -> Array:
        """q.k to what goes into softmax; DeepSeek scales it by the square of YaRN's magnitude."""
        growth = float(self.key("rope.scaling.yarn_log_multiplier", 0.0)) * math.log(
            float(self.key("rope.scaling.factor", 1.0))
        )
        return dots * (1 + growth) ** 2 / math.sqrt(self.key_size)


class MiniCPM3(Latent):
    """minicpm3: embeddings, branches and what goes into the output projection have scales that are in no file."""

    known: ClassVar = {"minicpm3": Architecture()}

    def embed(self, tokens: Tokens) -> Array:
        """Embeddings times 12."""
        return 12 * super().embed(tokens)

    def attention(self, x: Array, block: Block) -> Array:
        """The branch times 1.4 over the root of the depth."""
        return 1.4 / math.sqrt(self.n_layer) * super().attention(x, block)

    def feed_forward(self, x: Array, at: str) -> Array:
        """The branch times 1.4 over the root of the depth."""
        return 1.4 / math.sqrt(self.n_layer) * super().feed_forward(x, at)

    def head(self, hidden: Array) -> Array:
        """Logits as those of a model of width 256."""
        return super().head(hidden * (256 / hidden.shape[1]))
