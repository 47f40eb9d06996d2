"""Tiny models with random f32 weights, one per kind of model that the Λ cache meets.

Scales are such that attention is far from uniform and logits far from flat: a distance that is off by one shows in the
next token's likelihood. The vocabulary is SentencePiece-like with all bytes, so any text can be tokenized.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGUFValueType, GGUFWriter, TokenType

Keys = dict[str, int | float | str | list[int]]
Tensors = dict[str, npt.NDArray[np.float32]]

N_VOCAB = 288
VALUE_TYPES: dict[type, GGUFValueType] = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and the parts that it has.

    keys: more metadata, without the architecture's prefix.
    qkv: "separate" or "fused" projections; biases: every projection and norm has a bias, of q, k and v only in "qkv".
    qk_norm: "", "head" (one weight for all heads) or "full" (over all heads).
    forward: "gated", "plain", "fused" (gate and up in one matrix), or "" for experts alone.
    factors: names of tensors with RoPE frequency factors.
    branch_norms: a norm after each branch. shared_norm: one norm for both branches.
    """

    arch: str
    n_layer: int = 2
    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    head_size: int = 16
    n_ff: int = 96
    n_expert: int = 0
    n_ctx: int = 128
    n_rot: int | None = None
    layer_norm: bool = False
    qkv: str = "separate"
    biases: str = ""
    qk_norm: str = ""
    forward: str = "gated"
    factors: tuple[str, ...] = ()
    branch_norms: bool = False
    shared_norm: bool = False
    keys: Keys = field(default_factory=dict)


NEOX: Keys = {"use_parallel_residual": True}
EXPERTS: Keys = {"expert_feed_forward_length": 96}
ALIBI: Keys = {"attention.max_alibi_bias": 8.0}
YARN: Keys = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}
# llama.cpp rounds contexts up to 256, so the short factors are only reachable below an original length of 256 or more
LONGROPE: Keys = {"rope.scaling.original_context_length": 256, "rope.scaling.attn_factor": 1.2}
GROK: Keys = {
    "embedding_scale": 1.0,
    "logit_scale": 0.57735,
    "attention.output_scale": 0.25,
    "attn_logit_softcapping": 4.0,
}

MODELS = {
    "llama": Shape("llama", factors=("rope_freqs",)),
    "llama-yarn": Shape("llama", n_ctx=256, keys=YARN),
    "llama-moe": Shape("llama", n_expert=4, forward=""),
    "qwen2": Shape("qwen2", biases="qkv"),
    "qwen3": Shape("qwen3", head_size=32, qk_norm="head"),
    "qwen3moe": Shape("qwen3moe", head_size=32, qk_norm="head", n_expert=4, forward="", keys=EXPERTS),
    "olmoe": Shape("olmoe", n_head_kv=4, qk_norm="full", n_expert=4, forward=""),
    "gptneox": Shape(
        "gptneox", n_head_kv=4, n_rot=8, layer_norm=True, qkv="fused", biases="all", forward="plain", keys=NEOX
    ),
    "phi2": Shape("phi2", n_head_kv=4, n_rot=8, layer_norm=True, biases="all", forward="plain", shared_norm=True),
    "mpt": Shape("mpt", n_head_kv=4, layer_norm=True, qkv="fused", forward="plain", keys=ALIBI),
    "phi3": Shape(
        "phi3",
        n_ctx=1024,
        qkv="fused",
        forward="fused",
        factors=("rope_factors_short", "rope_factors_long"),
        keys=LONGROPE,
    ),
    "smollm3": Shape("smollm3", n_layer=4),
    "grok": Shape("grok", n_expert=2, branch_norms=True, keys=GROK),
}


def weights(shape: Shape, rng: np.random.Generator) -> Tensors:
    """All tensors by their GGUF names, slowest dimension first."""
    tensors: Tensors = {}

    def matrix(name: str, *sizes: int, gain: float = 1.0) -> None:
        std = gain / np.sqrt(sizes[-1])
        tensors[name + ".weight"] = rng.normal(0, std, sizes).astype(np.float32)

    def projection(name: str, n_out: int, n_in: int, gain: float = 1.0, bias: bool = False) -> None:
        matrix(name, n_out, n_in, gain=gain)
        if bias or shape.biases == "all":
            tensors[name + ".bias"] = rng.normal(0, 0.3, n_out).astype(np.float32)

    def norm(name: str, size: int = shape.n_embd, gain: float = 1.0) -> None:
        tensors[name + ".weight"] = (gain * rng.uniform(0.7, 1.3, size)).astype(np.float32)
        if shape.biases == "all":
            tensors[name + ".bias"] = rng.normal(0, 0.1, size).astype(np.float32)

    n_q, n_kv = shape.n_head * shape.head_size, shape.n_head_kv * shape.head_size
    matrix("token_embd", N_VOCAB, shape.n_embd, gain=np.sqrt(shape.n_embd))
    norm("output_norm")
    matrix("output", N_VOCAB, shape.n_embd, gain=2.0)
    if shape.arch == "phi2":
        tensors["output.bias"] = rng.normal(0, 0.3, N_VOCAB).astype(np.float32)
    for name in shape.factors:
        n_pairs = (shape.n_rot or shape.head_size) // 2
        tensors[name + ".weight"] = np.linspace(1.0, 4.0 if "short" in name else 8.0, n_pairs, dtype=np.float32)

    for layer in range(shape.n_layer):
        at = f"blk.{layer}."
        norm(at + "attn_norm")
        if shape.qkv == "fused":
            projection(at + "attn_qkv", n_q + 2 * n_kv, shape.n_embd, gain=1.5)
        else:
            for name, size, gain in (("attn_q", n_q, 1.5), ("attn_k", n_kv, 1.5), ("attn_v", n_kv, 1.0)):
                projection(at + name, size, shape.n_embd, gain, bias=shape.biases == "qkv")
        if shape.qk_norm:
            full = shape.qk_norm == "full"
            norm(at + "attn_q_norm", n_q if full else shape.head_size, gain=1.5)
            norm(at + "attn_k_norm", n_kv if full else shape.head_size, gain=1.5)
        projection(at + "attn_output", shape.n_embd, n_q, gain=2.0)
        if not shape.shared_norm:
            norm(at + "ffn_norm")
        if shape.branch_norms:
            norm(at + "attn_output_norm")
            norm(at + "layer_output_norm")
        if shape.n_expert:
            matrix(at + "ffn_gate_inp", shape.n_expert, shape.n_embd)
            matrix(at + "ffn_gate_exps", shape.n_expert, shape.n_ff, shape.n_embd)
            matrix(at + "ffn_up_exps", shape.n_expert, shape.n_ff, shape.n_embd)
            matrix(at + "ffn_down_exps", shape.n_expert, shape.n_embd, shape.n_ff)
        if not shape.forward:
            continue
        if shape.forward == "gated":
            projection(at + "ffn_gate", shape.n_ff, shape.n_embd)
        projection(at + "ffn_up", shape.n_ff * (2 if shape.forward == "fused" else 1), shape.n_embd)
        projection(at + "ffn_down", shape.n_embd, shape.n_ff)
    return tensors


def metadata(shape: Shape) -> Keys:
    """The keys that llama.cpp asks for, without the architecture's prefix."""
    keys: Keys = {
        "vocab_size": N_VOCAB,
        "context_length": shape.n_ctx,
        "embedding_length": shape.n_embd,
        "block_count": shape.n_layer,
        "feed_forward_length": shape.n_ff,
        "attention.head_count": shape.n_head,
        "attention.head_count_kv": shape.n_head_kv,
        "attention.key_length": shape.head_size,
        "attention.value_length": shape.head_size,
        f"attention.layer_norm{'' if shape.layer_norm else '_rms'}_epsilon": 1e-5,
        "rope.dimension_count": shape.n_rot or shape.head_size,
        "rope.freq_base": 10000.0,
    }
    if shape.n_expert:
        # all of them: which of two nearly equal experts a router picks is decided by the last bit
        keys |= {"expert_count": shape.n_expert, "expert_used_count": shape.n_expert}
    return keys | shape.keys


def vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Pieces, scores and types of N_VOCAB tokens: unknown, begin, end, all bytes, a space and letters."""
    letters = ["\u2581"] + [chr(c) for c in range(ord("a"), ord("z") + 1)] + [".", ","]
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + letters
    special = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types = [int(t) for t in special + [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(letters)]
    return pieces, [0.0] * 259 + [-float(n) for n in range(len(letters))], types


def write(name: str, folder: str | PathLike[str], seed: int = 0) -> Path:
    """Write the model `name` of MODELS to "<folder>/tiny-<name>.gguf", the same bytes for the same seed."""
    shape = MODELS[name]
    path = Path(folder) / f"tiny-{name}.gguf"
    write_gguf(path, shape.arch, metadata(shape), weights(shape, np.random.default_rng(seed)))
    return path


def write_gguf(path: Path, arch: str, keys: Keys, tensors: Tensors) -> None:
    """A GGUF with the tiny vocabulary; `keys` come without the architecture's prefix, but those of the tokenizer."""
    writer = GGUFWriter(path, arch)
    # not the model's own name: llama.cpp expects certain tokens of whatever is called phi3
    writer.add_name("tiny")
    for name, value in keys.items():
        key = name if name.startswith("tokenizer.") else f"{arch}.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, VALUE_TYPES[type(value)])
    pieces, scores, types = vocabulary()
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokens(n_tokens: int, seed: int = 0) -> npt.NDArray[np.int32]:
    """n_tokens token ids, the begin token first, then random ones with repetitions as text has them."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, N_VOCAB, n_tokens)
    repeat = rng.random(n_tokens) < 0.5
    back = rng.integers(1, 40, n_tokens)
    for i in range(1, n_tokens):
        if repeat[i]:
            ids[i] = ids[max(1, i - back[i])]
    ids[0] = 1
    return ids.astype(np.int32)
