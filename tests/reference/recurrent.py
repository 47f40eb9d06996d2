"""Models that mix attention with recurrent layers, in float64 numpy, token after token.

The Λ rule is about attention alone: a recurrent layer sees every token once, whatever the window.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from reference.gguf_file import Array
from reference.transformer import Architecture, Block, Transformer, sigmoid, silu


def causal_convolution(x: Array, kernel: Array) -> Array:
    """Every channel of x[n_tokens, n_channels] with its own kernel[n_channels, width], the newest token last in it."""
    width = kernel.shape[1]
    padded = np.concatenate([np.zeros((width - 1, x.shape[1])), x])
    return np.asarray(sum(padded[i : i + len(x)] * kernel[:, i] for i in range(width)))


def delta_rule(q: Array, k: Array, v: Array, decay: Array, beta: Array) -> Array:
    """The gated delta rule (Yang et al., arXiv 2412.06464, section 3) over a whole stream.

    Each head has a memory: it decays, what it gives for k moves towards v by the share beta, and the answer is what it
    gives for q.
    q, k, v: [n_tokens, n_head, size]; decay, beta: [n_tokens, n_head]. Returns [n_tokens, n_head, size].
    """
    memory = np.zeros((q.shape[1], k.shape[2], v.shape[2]))
    out = np.empty_like(v)
    for t in range(len(q)):
        memory *= decay[t, :, None, None]
        missing = v[t] - np.einsum("hkv,hk->hv", memory, k[t])
        memory += np.einsum("hk,hv->hkv", k[t], beta[t, :, None] * missing)
        out[t] = np.einsum("hkv,hk->hv", memory, q[t])
    return out


class Qwen35(Transformer):
    """qwen35: layers of the gated delta rule, and layers of attention whose output is gated."""

    known: ClassVar = {"qwen35": Architecture(interleaved=True)}

    def attention(self, x: Array, block: Block) -> Array:
        """Either of both kinds, output projection included."""
        if block.at + "ssm_out.weight" in self.tensors:
            return self.linear_attention(x, block.at)
        _, gate = self.queries_and_gate(x, block)
        return self.linear(self.attended(x, block) * sigmoid(gate), block.at + "attn_output")

    def projections(self, x: Array, block: Block) -> tuple[Array, Array, Array]:
        """Queries, keys and values."""
        q, _ = self.queries_and_gate(x, block)
        return q, self.linear(x, block.at + "attn_k"), self.linear(x, block.at + "attn_v")

    def queries_and_gate(self, x: Array, block: Block) -> tuple[Array, Array]:
        """Both [n_tokens, n_head * head_size]: the matrix of queries has the gate of each head behind its query."""
        both = self.linear(x, block.at + "attn_q").reshape(len(x), self.n_head, 2, self.head_size)
        return both[:, :, 0].reshape(len(x), -1), both[:, :, 1].reshape(len(x), -1)

    def linear_attention(self, x: Array, at: str) -> Array:
        """The delta rule on x[n_tokens, n_embd], output projection included."""
        size, n_key, n_value = (
            int(self.key("ssm." + name)) for name in ("state_size", "group_count", "time_step_rank")
        )
        mixed = silu(causal_convolution(self.linear(x, at + "attn_qkv"), self.tensors[at + "ssm_conv1d.weight"]))
        q, k, v = (part.reshape(len(x), -1, size) for part in np.split(mixed, [n_key * size, 2 * n_key * size], axis=1))
        q, k = (y / np.sqrt((y * y).sum(axis=2, keepdims=True) + self.norm_epsilon) for y in (q, k))
        # value heads take the key heads in turn
        q, k = (np.tile(y, (1, n_value // n_key, 1)) for y in (q, k))
        softplus = np.logaddexp(0, self.linear(x, at + "ssm_alpha") + self.tensors[at + "ssm_dt.bias"])
        decay = np.exp(self.tensors[at + "ssm_a"] * softplus)
        beta = sigmoid(self.linear(x, at + "ssm_beta"))
        out = self.norm(delta_rule(q / math.sqrt(size), k, v, decay, beta), at + "ssm_norm")
        gate = silu(self.linear(x, at + "attn_gate"))
        return self.linear(out.reshape(len(x), -1) * gate, at + "ssm_out")


class LFM2(Transformer):
    """lfm2: layers of a short gated convolution, and layers of attention."""

    known: ClassVar = {"lfm2": Architecture()}

    def attention(self, x: Array, block: Block) -> Array:
        """Either of both kinds, output projection included."""
        at = block.at + "shortconv."
        if at + "conv.weight" not in self.tensors:
            return super().attention(x, block)
        before, after, y = np.split(self.linear(x, at + "in_proj"), 3, axis=1)
        return self.linear(after * causal_convolution(before * y, self.tensors[at + "conv.weight"]), at + "out_proj")

    def slides(self, layer: int) -> bool:
        """In a file with a window, every layer of attention slides."""
        return bool(self.key("attention.sliding_window", 0))

    def norm(self, x: Array, name: str) -> Array:
        """RMSNorm; the last norm has another name in these files."""
        return super().norm(x, "token_embd_norm" if name == "output_norm" else name)
