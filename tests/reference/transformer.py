"""A decoder-only transformer in float64 numpy, for the architectures that the tests compare with llama.cpp.

What a model does beyond the table below follows from the tensors and keys that its file has: biases, fused or separate
projections, gated or plain feed-forward, experts, norms after a branch, learned sinks, a temperature. Models with heads
or layers of another kind have classes of their own, in latent.py, recurrent.py, shared_keys.py and chunks.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, ClassVar

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
    gate_limit: the gate is cut there, and what it gates on both sides (gpt-oss); 0 for no limit.
    rope: pairs of neighbours ("adjacent"), of half-heads ("halves"), or "none".
    rope_free_every: every so many layers one goes without RoPE; 0 for never.
    interleaved: sections of M-RoPE take turns, otherwise they follow each other.
    sliding_every: every so many layers one attends to the whole stream, the others slide; 0 for no sliding.
    sliding_base: RoPE base of sliding layers, which are not scaled then; None: as in the others.
    score_cap: what scores are capped at where the file does not say; 0 for no cap.
    parallel: feed-forward beside attention, not after it (a key of the file may say otherwise).
    expert_shares: the weights of the chosen experts are scaled to sum to 1.
    root_scale: embeddings are scaled by the root of their size.
    """

    layer_norm: bool = False
    gelu: bool = False
    gate_limit: float = 0.0
    rope: str = "halves"
    rope_free_every: int = 0
    interleaved: bool = False
    sliding_every: int = 0
    sliding_base: float | None = None
    score_cap: float = 0.0
    parallel: bool = False
    expert_shares: bool = True
    root_scale: bool = False


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
    "grok": Architecture(gelu=True, score_cap=30.0),
    "qwen2vl": Architecture(),
    "qwen3vl": Architecture(interleaved=True),
    "mistral3": Architecture(rope="adjacent"),
    "gemma2": Architecture(gelu=True, sliding_every=2, score_cap=50.0, root_scale=True),
    "gemma3": Architecture(gelu=True, sliding_every=6, sliding_base=10000.0, root_scale=True),
    "gpt-oss": Architecture(gate_limit=7.0, sliding_every=2),
}


@dataclass(frozen=True)
class Block:
    """One layer, on one stream.

    rule: the one that its attention follows, which for a sliding layer is not the stream's.
    positions: [n_tokens], ascending, where the tokens stand in the stream.
    tokens: [n_tokens], what they are.
    """

    layer: int
    rule: Rule
    rope: Rope
    positions: Positions
    tokens: Tokens

    @property
    def at(self) -> str:
        """The prefix of its tensors."""
        return f"blk.{self.layer}."


def silu(x: Array) -> Array:
    """x * sigmoid(x)"""
    return x * sigmoid(x)


def gelu(x: Array) -> Array:
    """GELU by tanh (Hendrycks and Gimpel, arXiv 1606.08415, section 2), with ggml's rounding.

    ggml reads it from a table: argument and value are f16, and beyond 10 it takes the limits 0 and x.
    """
    rounded = np.clip(x, -10.0, 10.0).astype(np.float16).astype(np.float64)
    value = 0.5 * rounded * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (rounded + 0.044715 * rounded**3)))
    return np.where(x <= -10.0, 0.0, np.where(x >= 10.0, x, value.astype(np.float16).astype(np.float64)))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))"""
    return np.asarray(1 / (1 + np.exp(-x)))


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

    Raises ValueError for an architecture that is not in the table of the class.
    """

    known: ClassVar[dict[str, Architecture]] = ARCHITECTURES

    def __init__(self, path: str | PathLike[str]) -> None:
        file = gguf_file.read(path)
        self.metadata = file.metadata
        self.tensors = file.tensors
        self.name = str(file.metadata["general.architecture"])
        if self.name not in self.known:
            raise ValueError(f"the reference does not know the architecture {self.name}")
        self.arch = self.known[self.name]
        self.n_layer = int(self.key("block_count"))
        self.n_head = int(self.key("attention.head_count"))
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
        x = self.embed(tokens)
        stream = np.arange(len(tokens)) if positions is None else positions
        for layer in range(self.n_layer):
            x = self.layer(x, self.block(layer, rule, tokens, len(tokens) if n_ctx is None else n_ctx, stream))
        return self.norm(x, "output_norm")

    def embed(self, tokens: Tokens) -> Array:
        """[n_tokens, n_embd]: what goes into the first layer."""
        rows = self.tensors["token_embd.weight"][tokens]
        return rows * float(self.key("embedding_scale", math.sqrt(rows.shape[1]) if self.arch.root_scale else 1.0))

    def block(self, layer: int, rule: Rule, tokens: Tokens, n_ctx: int, positions: Positions) -> Block:
        """The layer on a stream with this rule; the others as for logits."""
        sliding = self.slides(layer)
        free = self.arch.rope_free_every and (layer + 1) % self.arch.rope_free_every == 0
        rope = Rope(np.zeros(0)) if free else self.rope(n_ctx, rule, sliding)
        if rule.recall and layer < rule.recall.since:
            rule = replace(rule, recall=None)
        return Block(layer, self.sliding_rule(rule) if sliding else rule, rope, positions, tokens)

    def slides(self, layer: int) -> bool:
        """Whether the layer has a sliding window of its own."""
        pattern = self.key("attention.sliding_window_pattern", self.arch.sliding_every)
        if isinstance(pattern, list):
            return bool(pattern[layer])
        return bool(pattern) and layer % pattern < pattern - 1

    def sliding_rule(self, rule: Rule) -> Rule:
        """What sliding layers follow where the others follow `rule`: their window as trained, and no sinks."""
        return Rule(int(self.key("attention.sliding_window")))

    def head(self, hidden: Array) -> Array:
        """Logits[n, n_vocab] of hidden[n, n_embd]."""
        name = "output" if "output.weight" in self.tensors else "token_embd"
        logits = self.linear(hidden, name) * float(self.key("logit_scale", 1.0))
        cap = float(self.key("final_logit_softcapping", 0.0))
        return cap * np.tanh(logits / cap) if cap else logits

    def layer(self, x: Array, block: Block) -> Array:
        """One block: x[n_tokens, n_embd] to the same shape."""
        at = block.at
        normed = self.norm(x, at + "attn_norm")
        attention = self.attention(normed, block)
        # "post_attention_norm" is a norm of the attention branch if the other branch has one too, otherwise it is the
        # one in front of the other branch
        around = at + "post_ffw_norm.weight" in self.tensors
        for name in ("attn_output_norm", "post_attention_norm") if around else ("attn_output_norm",):
            if f"{at}{name}.weight" in self.tensors:
                attention = self.norm(attention, at + name)
        behind = x if self.parallel else x + attention
        for name in ("ffn_norm", "post_attention_norm"):
            if f"{at}{name}.weight" in self.tensors:
                # phi-2 has no second norm: there, both branches share one
                normed = self.norm(behind, at + name)
                break
        forward = self.feed_forward(normed, at)
        for name in ("layer_output_norm", "post_ffw_norm"):
            if f"{at}{name}.weight" in self.tensors:
                forward = self.norm(forward, at + name)
        return x + attention + forward

    def attention(self, x: Array, block: Block) -> Array:
        """The attention branch of x[n_tokens, n_embd], output projection included."""
        return self.linear(self.attended(x, block), block.at + "attn_output")

    def attended(self, x: Array, block: Block) -> Array:
        """[n_tokens, n_head * value_size]: what the heads see of x[n_tokens, n_embd]."""
        q, k, v = self.heads(x, block)
        learned_sinks = self.tensors.get(block.at + "attn_sinks.weight")
        q = q * self.temperature(block)[:, None, None]
        out = attend(
            q,
            k,
            v,
            block.rule,
            block.rope,
            self.slopes,
            self.score,
            positions=block.positions,
            learned_sinks=learned_sinks,
            tokens=block.tokens,
        )
        return out.reshape(len(x), -1)

    def heads(self, x: Array, block: Block) -> tuple[Array, Array, Array]:
        """Queries[n_tokens, n_head, head_size], keys and values[n_tokens, n_head_kv, ...] of x, before RoPE."""
        at = block.at
        q, k, v = self.projections(x, block)
        if at + "attn_q_norm.weight" in self.tensors:
            # per head (qwen3) or over all heads (olmoe): the size of the weight says which
            q, k = (
                self.norm(y.reshape(len(x), -1, len(self.tensors[f"{at}{name}.weight"])), at + name)
                for y, name in ((q, "attn_q_norm"), (k, "attn_k_norm"))
            )
        heads = (len(x), -1, self.head_size)
        return q.reshape(heads), k.reshape(heads), v.reshape(heads)

    def projections(self, x: Array, block: Block) -> tuple[Array, Array, Array]:
        """Queries, keys and values of x[n_tokens, n_embd], each [n_tokens, heads * head_size]."""
        at = block.at
        if at + "attn_qkv.weight" in self.tensors:
            fused, n_q = self.linear(x, at + "attn_qkv"), self.n_head * self.head_size
            q, k, v = np.split(fused, [n_q, (fused.shape[1] + n_q) // 2], axis=1)
        else:
            q, k, v = (self.linear(x, at + name) for name in ("attn_q", "attn_k", "attn_v"))
        clamp = float(self.key("attention.clamp_kqv", math.inf))
        return np.clip(q, -clamp, clamp), np.clip(k, -clamp, clamp), np.clip(v, -clamp, clamp)

    def temperature(self, block: Block) -> Array:
        """[n_tokens]: the factor on queries that grows with the number of keys in view.

        Models are trained with a factor by position. That is the number of keys before a query, so what counts here is
        how many the rule leaves in view: never more than sinks and window.
        """
        growth = np.log(1 + self.seen(block) // int(self.key("rope.scaling.original_context_length", 1)))
        return np.asarray(1 + float(self.key("attention.temperature_scale", 0.0)) * growth)

    def seen(self, block: Block) -> Positions:
        """[n_tokens]: how many keys each query has in view, itself not counted."""
        if block.rule.n_local is None:
            return block.positions
        return np.minimum(block.positions, block.rule.n_global + block.rule.n_local - 1)

    def score(self, dots: Array) -> Array:
        """q.k to what goes into ALiBi and softmax."""
        scaled = dots * float(self.key("attention.output_scale", 1 / math.sqrt(self.head_size)))
        cap = float(self.key("attn_logit_softcapping", self.arch.score_cap))
        return cap * np.tanh(scaled / cap) if cap else scaled

    def feed_forward(self, x: Array, at: str) -> Array:
        """The feed-forward branch of x[n_tokens, n_embd]: dense, experts, or (grok) the sum of both over sqrt(2)."""
        branches = []
        if at + "ffn_up.weight" in self.tensors:
            up = self.linear(x, at + "ffn_up")
            if at + "ffn_gate.weight" in self.tensors:
                up = self.gated(self.linear(x, at + "ffn_gate"), up)
            elif len(self.tensors[at + "ffn_down.weight"][0]) * 2 == up.shape[1]:
                # phi-3: gate and up in one matrix
                up = self.gated(*np.split(up, 2, axis=1))
            else:
                up = gelu(up) if self.arch.gelu else silu(up)
            branches.append(self.linear(up, at + "ffn_down"))
        if at + "ffn_gate_inp.weight" in self.tensors:
            branches.append(self.experts(x, at))
        return np.asarray(sum(branches) / math.sqrt(len(branches)))

    def gated(self, gate: Array, up: Array) -> Array:
        """`up` as far as `gate` lets it through."""
        limit = self.arch.gate_limit
        if limit:
            gate = np.minimum(gate, limit)
            return gate * sigmoid(1.702 * gate) * (1 + np.clip(up, -limit, limit))
        return (gelu(gate) if self.arch.gelu else silu(gate)) * up

    def experts(self, x: Array, at: str) -> Array:
        """Every token through its best experts, weighted by softmax over all of them."""
        weights = softmax(self.linear(x, at + "ffn_gate_inp"))
        others = np.argsort(-weights, axis=1)[:, int(self.key("expert_used_count")) :]
        np.put_along_axis(weights, others, 0, axis=1)
        if self.arch.expert_shares:
            weights /= weights.sum(axis=1, keepdims=True)
        out = np.zeros_like(x)
        for expert in range(weights.shape[1]):
            rows = np.flatnonzero(weights[:, expert])
            inner = self.gated(
                self.linear(x[rows], at + "ffn_gate_exps", expert), self.linear(x[rows], at + "ffn_up_exps", expert)
            )
            out[rows] += weights[rows, expert, None] * self.linear(inner, at + "ffn_down_exps", expert)
        return out

    def linear(self, x: Array, name: str, expert: int | None = None) -> Array:
        """x[..., n_in] times the matrix `name`, or that of an expert, plus its bias if it has one."""
        of = slice(None) if expert is None else expert
        out = x @ self.tensors[name + ".weight"][of].T
        return np.asarray(out + self.tensors[name + ".bias"][of] if name + ".bias" in self.tensors else out)

    def norm(self, x: Array, name: str) -> Array:
        """LayerNorm or RMSNorm over the last dimension, with the weight and bias `name`."""
        if self.arch.layer_norm:
            x = x - x.mean(axis=-1, keepdims=True)
        return np.asarray(self.unit(x) * self.tensors[name + ".weight"] + self.tensors.get(name + ".bias", np.zeros(1)))

    def unit(self, x: Array) -> Array:
        """RMSNorm over the last dimension, without a weight."""
        return np.asarray(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.norm_epsilon))

    def rope(self, n_ctx: int, rule: Rule, sliding: bool = False) -> Rope:
        """The rotation of layers that slide or do not, for a context of n_ctx tokens where the rule has no window.

        Scalings: linear, YaRN (Peng et al., arXiv 2309.00071, section 3.2 and 3.4), factors from tensors (Llama 3.1;
        LongRoPE, Ding et al., arXiv 2402.13753). ggml gives q and k the magnitude each, so scores get its square.
        M-RoPE (Qwen2-VL, arXiv 2409.12191) gives text the same position in its first three sections and 0 in a fourth,
        whose pairs do not turn.
        """
        if self.arch.rope == "none":
            return Rope(np.zeros(0))
        n_rot = int(self.key("rope.dimension_count", self.head_size))
        base = float(self.key("rope.freq_base", 10000.0))
        factor = float(self.key("rope.scaling.factor", 1.0))
        if sliding and self.arch.sliding_base is not None:
            base, factor = float(self.key("rope.freq_base_swa", self.arch.sliding_base)), 1.0
        pair = np.arange(n_rot // 2)
        frequencies = base ** (-2.0 * pair / n_rot)
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
            # with such a key, the model's own scale of scores takes the magnitude's place
            magnitude *= 1.0 if self.key("rope.scaling.yarn_log_multiplier", 0.0) else 1 + 0.1 * math.log(factor)
        else:
            frequencies = frequencies / factor
        sections = self.key("rope.dimension_sections", [])
        if sections:
            sector = pair % sum(sections)
            bound = 3 * np.array(sections)[sector % 3] if self.arch.interleaved else sum(sections[:3])
            frequencies = np.where(sector < bound, frequencies, 0.0)
        return Rope(frequencies, self.arch.rope == "adjacent", magnitude)


def nll_from_logits(logits: npt.NDArray[np.floating[Any]], targets: Tokens) -> Array:
    """[n], nats: the negative log-likelihood of targets[n] under logits[n, n_vocab], summed in float64."""
    wide = np.asarray(logits, dtype=np.float64)
    top = wide.max(axis=1)
    total = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
    return np.asarray(total - wide[np.arange(len(wide)), targets])
