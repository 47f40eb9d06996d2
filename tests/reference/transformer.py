"""A decoder-only transformer in float64 numpy, for the architectures that the tests compare with llama.cpp.

What a model does beyond the table below follows from the tensors and keys that its file has: biases, fused or separate
projections, gated or plain feed-forward, experts, norms after a branch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from reference import gguf_file
from reference.gguf_file import Array
from reference.rule import Positions, Rope, Rule, attend

Tokens = npt.NDArray[np.integer[Any]]
FULL = Rule()


@dataclass(frozen=True)
class Architecture:
    """What a file does not say about its architecture.

    layer_norm: LayerNorm with mean, otherwise RMSNorm.
    gelu: GELU in the feed-forward branch, otherwise SiLU.
    rope: pairs of neighbours ("adjacent"), of half-heads ("halves"), or "none".
    rope_free_every: every so many layers one goes without RoPE; 0 for never.
    parallel: feed-forward beside attention, not after it (a key of the file may say otherwise).
    expert_shares: the weights of the chosen experts are scaled to sum to 1.
    """

    layer_norm: bool = False
    gelu: bool = False
    rope: str = "halves"
    rope_free_every: int = 0
    parallel: bool = False
    expert_shares: bool = True


ARCHITECTURES = {
    "llama": Architecture(rope="adjacent"),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "qwen3moe": Architecture(),
    "olmoe": Architecture(expert_shares=False),
    "phi3": Architecture(),
    "smollm3": Architecture(rope="adjacent", rope_free_every=4),
    "gptneox": Architecture(layer_norm=True, gelu=True),
    "phi2": Architecture(layer_norm=True, gelu=True, parallel=True),
    "mpt": Architecture(layer_norm=True, gelu=True, rope="none"),
    "grok": Architecture(gelu=True),
}


def silu(x: Array) -> Array:
    """x * sigmoid(x)"""
    return np.asarray(x / (1 + np.exp(-x)))


def gelu(x: Array) -> Array:
    """GELU by tanh (Hendrycks and Gimpel, arXiv 1606.08415, section 2), with ggml's rounding.

    ggml reads it from a table: argument and value are f16, and beyond 10 it takes the limits 0 and x.
    """
    rounded = np.clip(x, -10.0, 10.0).astype(np.float16).astype(np.float64)
    value = 0.5 * rounded * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (rounded + 0.044715 * rounded**3)))
    return np.where(x <= -10.0, 0.0, np.where(x >= 10.0, x, value.astype(np.float16).astype(np.float64)))


def softmax(x: Array) -> Array:
    """Softmax over the last dimension."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def alibi_slopes(n_head: int, max_bias: float) -> Array:
    """[n_head], ALiBi's geometric slopes (Press et al., arXiv 2108.12409; its code for heads beyond a power of two)."""
    power = 2 ** int(math.log2(n_head))
    slopes = [2 ** (-max_bias * (h + 1) / power) for h in range(power)]
    slopes += [2 ** (-max_bias * (2 * h + 1) / (2 * power)) for h in range(n_head - power)]
    return np.array(slopes)


class Transformer:
    """A model read from a GGUF file.

    Raises ValueError for an architecture that is not in the table.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        file = gguf_file.read(path)
        self.metadata = file.metadata
        self.tensors = file.tensors
        self.name = str(file.metadata["general.architecture"])
        if self.name not in ARCHITECTURES:
            raise ValueError(f"the reference does not know the architecture {self.name}")
        self.arch = ARCHITECTURES[self.name]
        self.n_layer = int(self.key("block_count"))
        self.n_head = int(self.key("attention.head_count"))
        self.n_head_kv = int(self.key("attention.head_count_kv", self.n_head))
        self.head_size = int(self.key("attention.key_length", self.key("embedding_length") // self.n_head))
        norm = "layer_norm_epsilon" if self.arch.layer_norm else "layer_norm_rms_epsilon"
        self.norm_epsilon = float(self.key(f"attention.{norm}"))
        self.parallel = bool(self.key("use_parallel_residual", self.arch.parallel))
        max_bias = float(self.key("attention.max_alibi_bias", 0.0))
        self.slopes = alibi_slopes(self.n_head, max_bias) if max_bias else np.zeros(self.n_head)

    def key(self, name: str, default: Any = None) -> Any:
        """The metadata key "<architecture>.<name>"; KeyError if it is absent and has no default."""
        name = f"{self.name}.{name}"
        return self.metadata[name] if default is None else self.metadata.get(name, default)

    def logits(
        self, tokens: Tokens, rule: Rule = FULL, n_ctx: int | None = None, positions: Positions | None = None
    ) -> Array:
        """[n_tokens, n_vocab]: what the model expects after each of the tokens[n_tokens].

        n_ctx: context size that LongRoPE chooses its factors by where the rule has no window; n_tokens by default.
        positions: [n_tokens], ascending, where the tokens stand in the stream; 0, 1, 2, ... unless tokens were skipped.
        """
        return self.head(self.hidden(tokens, rule, n_ctx, positions))

    def token_nll(self, tokens: Tokens, rule: Rule = FULL, n_ctx: int | None = None) -> Array:
        """[n_tokens - 1], nats: the negative log-likelihood of every token but the first. Parameters as for logits."""
        hidden = self.hidden(tokens, rule, n_ctx)[:-1]
        targets = np.asarray(tokens)[1:]
        nll = np.empty(len(targets))
        for begin in range(0, len(targets), 512):
            rows = slice(begin, begin + 512)
            nll[rows] = nll_from_logits(self.head(hidden[rows]), targets[rows])
        return nll

    def hidden(
        self, tokens: Tokens, rule: Rule = FULL, n_ctx: int | None = None, positions: Positions | None = None
    ) -> Array:
        """[n_tokens, n_embd]: what goes into the output projection."""
        x = self.tensors["token_embd.weight"][tokens] * self.key("embedding_scale", 1.0)
        rope = self.rope(len(tokens) if n_ctx is None else n_ctx, rule)
        for layer in range(self.n_layer):
            free = self.arch.rope_free_every and (layer + 1) % self.arch.rope_free_every == 0
            x = self.layer(x, f"blk.{layer}.", rule, Rope(np.zeros(0)) if free else rope, positions)
        return self.norm(x, "output_norm")

    def head(self, hidden: Array) -> Array:
        """Logits[n, n_vocab] of hidden[n, n_embd]."""
        name = "output" if "output.weight" in self.tensors else "token_embd"
        return self.linear(hidden, name) * float(self.key("logit_scale", 1.0))

    def layer(self, x: Array, at: str, rule: Rule, rope: Rope, positions: Positions | None = None) -> Array:
        """One block: x[n_tokens, n_embd] to the same shape. `at` is the prefix of its tensors."""
        normed = self.norm(x, at + "attn_norm")
        attention = self.attention(normed, at, rule, rope, positions)
        if at + "attn_output_norm.weight" in self.tensors:
            attention = self.norm(attention, at + "attn_output_norm")
        behind = x if self.parallel else x + attention
        # phi-2 has one norm for both branches
        own_norm = at + "ffn_norm.weight" in self.tensors
        forward = self.feed_forward(self.norm(behind, at + "ffn_norm") if own_norm else normed, at)
        if at + "layer_output_norm.weight" in self.tensors:
            forward = self.norm(forward, at + "layer_output_norm")
        return x + attention + forward

    def attention(self, x: Array, at: str, rule: Rule, rope: Rope, positions: Positions | None = None) -> Array:
        """The attention branch of x[n_tokens, n_embd], output projection included."""
        n_q, n_k = self.n_head * self.head_size, self.n_head_kv * self.head_size
        if at + "attn_qkv.weight" in self.tensors:
            q, k, v = np.split(self.linear(x, at + "attn_qkv"), [n_q, n_q + n_k], axis=1)
        else:
            q, k, v = (self.linear(x, at + name) for name in ("attn_q", "attn_k", "attn_v"))
        clamp = float(self.key("attention.clamp_kqv", math.inf))
        q, k, v = (np.clip(y, -clamp, clamp) for y in (q, k, v))
        if at + "attn_q_norm.weight" in self.tensors:
            # per head (qwen3) or over all heads (olmoe): the size of the weight says which
            q, k = (
                self.norm(y.reshape(len(x), -1, len(self.tensors[f"{at}{name}.weight"])), at + name)
                for y, name in ((q, "attn_q_norm"), (k, "attn_k_norm"))
            )
        heads = (len(x), -1, self.head_size)
        q, k, v = (y.reshape(heads) for y in (q, k, v))
        out = attend(q, k, v, rule, rope, self.slopes, self.score, positions=positions)
        return self.linear(out.reshape(len(x), -1), at + "attn_output")

    def score(self, dots: Array) -> Array:
        """q.k to what goes into ALiBi and softmax."""
        if self.name == "grok":
            cap = float(self.key("attn_logit_softcapping", 30.0))
            return cap * np.tanh(dots * (float(self.key("attention.output_scale")) / cap))
        return dots / math.sqrt(self.head_size)

    def feed_forward(self, x: Array, at: str) -> Array:
        """The feed-forward branch of x[n_tokens, n_embd]: dense, experts, or (grok) the sum of both over sqrt(2)."""
        activation = gelu if self.arch.gelu else silu
        branches = []
        if at + "ffn_up.weight" in self.tensors:
            up = self.linear(x, at + "ffn_up")
            if at + "ffn_gate.weight" in self.tensors:
                up = activation(self.linear(x, at + "ffn_gate")) * up
            elif len(self.tensors[at + "ffn_down.weight"][0]) * 2 == up.shape[1]:
                # phi-3: gate and up in one matrix
                gate, up = np.split(up, 2, axis=1)
                up = activation(gate) * up
            else:
                up = activation(up)
            branches.append(self.linear(up, at + "ffn_down"))
        if at + "ffn_gate_inp.weight" in self.tensors:
            branches.append(self.experts(x, at))
        return np.asarray(sum(branches) / math.sqrt(len(branches)))

    def experts(self, x: Array, at: str) -> Array:
        """Every token through its best experts, weighted by softmax over all of them."""
        activation = gelu if self.arch.gelu else silu
        gates, ups, downs = (self.tensors[f"{at}ffn_{name}_exps.weight"] for name in ("gate", "up", "down"))
        weights = softmax(self.linear(x, at + "ffn_gate_inp"))
        others = np.argsort(-weights, axis=1)[:, int(self.key("expert_used_count")) :]
        np.put_along_axis(weights, others, 0, axis=1)
        if self.arch.expert_shares:
            weights /= weights.sum(axis=1, keepdims=True)
        out = np.zeros_like(x)
        for expert in range(len(ups)):
            rows = np.flatnonzero(weights[:, expert])
            inner = activation(x[rows] @ gates[expert].T) * (x[rows] @ ups[expert].T)
            out[rows] += weights[rows, expert, None] * (inner @ downs[expert].T)
        return out

    def linear(self, x: Array, name: str) -> Array:
        """x[..., n_in] times the matrix `name`, plus its bias if it has one."""
        return np.asarray(x @ self.tensors[name + ".weight"].T + self.tensors.get(name + ".bias", np.zeros(1)))

    def norm(self, x: Array, name: str) -> Array:
        """LayerNorm or RMSNorm over the last dimension, with the weight and bias `name`."""
        if self.arch.layer_norm:
            x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.norm_epsilon)
        return np.asarray(x * self.tensors[name + ".weight"] + self.tensors.get(name + ".bias", np.zeros(1)))

    def rope(self, n_ctx: int, rule: Rule) -> Rope:
        """The rotation of this model, for a context of n_ctx tokens where the rule has no window.

        Scalings: linear, YaRN (Peng et al., arXiv 2309.00071, section 3.2 and 3.4), factors from tensors (Llama 3.1;
        LongRoPE, Ding et al., arXiv 2402.13753). ggml gives q and k the magnitude each, so scores get its square.
        """
        if self.arch.rope == "none":
            return Rope(np.zeros(0))
        n_rot = int(self.key("rope.dimension_count", self.head_size))
        base = float(self.key("rope.freq_base", 10000.0))
        pair = np.arange(n_rot // 2)
        frequencies = base ** (-2.0 * pair / n_rot)
        factor = float(self.key("rope.scaling.factor", 1.0))
        magnitude = float(self.key("rope.scaling.attn_factor", 1.0))
        original = int(self.key("rope.scaling.original_context_length", self.key("context_length")))
        # the farthest that two tokens can seem apart decides
        reach = max(rule.n_local, rule.ceiling or 0) if rule.n_local is not None else n_ctx
        for name in ("rope_freqs", "rope_factors_long" if reach > original else "rope_factors_short"):
            frequencies = frequencies / self.tensors.get(name + ".weight", np.ones(1))
        if self.key("rope.scaling.type", "linear") == "yarn":
            # pairs that turn more than 32 times within the training context stay, below one turn they are slowed down
            low, high = (n_rot * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32, 1))
            low, high = max(0, math.floor(low)), min(n_rot - 1, math.ceil(high))
            slowed = np.clip((pair - low) / max(0.001, high - low), 0, 1)
            frequencies = frequencies * (1 - slowed + slowed / factor)
            magnitude *= 1 + 0.1 * math.log(factor)
        else:
            frequencies = frequencies / factor
        return Rope(frequencies, self.arch.rope == "adjacent", magnitude)


def nll_from_logits(logits: npt.NDArray[np.floating[Any]], targets: Tokens) -> Array:
    """[n], nats: the negative log-likelihood of targets[n] under logits[n, n_vocab], summed in float64."""
    wide = np.asarray(logits, dtype=np.float64)
    top = wide.max(axis=1)
    total = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
    return np.asarray(total - wide[np.arange(len(wide)), targets])
