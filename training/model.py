"""Two model families as llama.cpp computes them: `llama` (RoPE, RMSNorm, SwiGLU) and `mpt` (ALiBi, LayerNorm, GELU).

Both are pre-norm decoders without biases, with grouped-query attention and the output matrix tied to the embedding.
Names are those of llama.cpp: n_embd is the width, n_ff the width of the feed-forward layer.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a model; `architecture` is llama.cpp's name for the family, "llama" or "mpt"."""

    architecture: str
    n_vocab: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_ff: int
    head_size: int = 64
    n_ctx: int = 512  # the training window, in tokens
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # llama only
    alibi_max_bias: float = 8.0  # mpt only

    def __post_init__(self) -> None:
        if self.architecture not in ("llama", "mpt"):
            raise ValueError(f"architecture is llama or mpt, not {self.architecture}.")
        if self.n_head % self.n_head_kv:
            raise ValueError(f"n_head ({self.n_head}) is not a multiple of n_head_kv ({self.n_head_kv}).")
        if self.architecture == "mpt" and self.n_head * self.head_size != self.n_embd:
            raise ValueError("in mpt, n_head * head_size is n_embd.")


# Both fit 8 MB as q8_0 (34 bytes for 32 weights).
CONFIGS = {
    "nano": ModelConfig("llama", n_vocab=4096, n_embd=256, n_layer=6, n_head=4, n_head_kv=2, n_ff=768),
    "nano-alibi": ModelConfig("mpt", n_vocab=4096, n_embd=256, n_layer=4, n_head=4, n_head_kv=2, n_ff=768),
}


# Queries are taken in blocks, each against the keys up to its own end: of the future, only a block's worth is computed.
# On a CPU this is faster than scaled_dot_product_attention, whose bf16 backward is no quicker than f32's.
QUERY_BLOCK = 128


def rope_angles(n_tokens: int, head_size: int, theta: float) -> Tensor:
    """position * theta^(-2 i / head_size) for each position and pair i of dimensions: f32 (n_tokens, head_size / 2)."""
    inverse = theta ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    return torch.outer(torch.arange(n_tokens, dtype=torch.float64), inverse).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on pairs (i, i + head_size / 2); llama.cpp's are (2 i, 2 i + 1), so export.py reorders the weights."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def alibi_slopes(n_head: int, max_bias: float) -> Tensor:
    """Slope of each head, f32 (n_head,), positive; as ggml_soft_max_ext has them (Press et al., 2022)."""
    power = 1 << (n_head.bit_length() - 1)  # the largest power of two in n_head
    slopes = [2.0 ** (-max_bias * (h + 1) / power) for h in range(power)]
    slopes += [2.0 ** (-max_bias / 2 * (2 * h + 1) / power) for h in range(n_head - power)]
    return torch.tensor(slopes)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.q = nn.Linear(c.n_embd, c.n_head * c.head_size, bias=False)
        self.k = nn.Linear(c.n_embd, c.n_head_kv * c.head_size, bias=False)
        self.v = nn.Linear(c.n_embd, c.n_head_kv * c.head_size, bias=False)
        self.output = nn.Linear(c.n_head * c.head_size, c.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        """x (batch, n_tokens, n_embd); bias (n_head or 1, n_tokens, n_tokens) is -inf in the future."""
        c = self.config
        batch, n_tokens, _ = x.shape
        q = self.q(x).view(batch, n_tokens, c.n_head, c.head_size).transpose(1, 2)
        k = self.k(x).view(batch, n_tokens, c.n_head_kv, c.head_size).transpose(1, 2)
        v = self.v(x).view(batch, n_tokens, c.n_head_kv, c.head_size).transpose(1, 2)
        if c.architecture == "llama":
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q = q * c.head_size**-0.5
        group = c.n_head // c.n_head_kv
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)  # (batch, n_head, n_tokens, head_size)
        rows = []
        for start in range(0, n_tokens, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, n_tokens)
            scores = (q[:, :, start:end] @ k[:, :, :end].transpose(2, 3)).float() + bias[:, start:end, :end]
            rows.append(scores.softmax(-1).to(v.dtype) @ v[:, :, :end])
        heads: Tensor = self.output(torch.cat(rows, 2).transpose(1, 2).flatten(2))
        return heads


class FeedForward(nn.Module):
    """llama: down(silu(gate(x)) * up(x)); mpt: down(gelu(up(x))), with the tanh form of GELU as in ggml."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.architecture == "llama"
        self.up = nn.Linear(config.n_embd, config.n_ff, bias=False)
        if self.gated:
            self.gate = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.down = nn.Linear(config.n_ff, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        hidden = F.silu(self.gate(x)) * up if self.gated else F.gelu(up, approximate="tanh")
        out: Tensor = self.down(hidden)
        return out


def make_norm(config: ModelConfig) -> nn.Module:
    if config.architecture == "llama":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=False)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = make_norm(config)
        self.attn = Attention(config)
        self.ffn_norm = make_norm(config)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin, bias)
        x = x + self.ffn(self.ffn_norm(x))
        return x


class Model(nn.Module):
    """Tokens to logits, for windows of at most config.n_ctx tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.token_embd = nn.Embedding(c.n_vocab, c.n_embd)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.output_norm = make_norm(c)
        angles = rope_angles(c.n_ctx, c.head_size, c.rope_theta)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        position = torch.arange(c.n_ctx)
        distance = position[:, None] - position[None]
        bias = torch.zeros(1, c.n_ctx, c.n_ctx)
        if c.architecture == "mpt":
            bias = -alibi_slopes(c.n_head, c.alibi_max_bias)[:, None, None] * distance
        self.register_buffer("bias", bias.masked_fill(distance < 0, -torch.inf), persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Normal, with the variance of a matrix inverse to its inputs; smaller where a layer adds to the stream."""
        nn.init.normal_(self.token_embd.weight, std=0.02)
        for name, p in self.blocks.named_parameters():
            if p.dim() == 2:
                std = 0.5 / math.sqrt(p.shape[1])
                if name.endswith(("output.weight", "down.weight")):
                    std /= math.sqrt(2 * self.config.n_layer)
                nn.init.normal_(p, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, n_tokens, n_vocab) of tokens int64 (batch, n_tokens)."""
        n = tokens.shape[1]
        x = self.token_embd(tokens)
        for block in self.blocks:
            x = block(x, self.cos[:n], self.sin[:n], self.bias[:, :n, :n])
        return F.linear(self.output_norm(x), self.token_embd.weight)


def load_checkpoint(path: Path) -> tuple[Model, str]:
    """The model of a checkpoint of train.py, and its name."""
    checkpoint = torch.load(path)
    model = Model(ModelConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    return model, checkpoint["name"]
