"""Tiny models of any architecture: metadata and the shapes of tensors, filled with random f32 weights."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import numpy.typing as npt

from reference.tiny_models import N_VOCAB, Keys, write_gguf

Shapes = dict[str, tuple[int, ...]]

N_EMBD, N_HEAD, N_HEAD_KV, HEAD, N_FF, N_CTX = 64, 4, 2, 16, 96, 128
N_KV = N_HEAD_KV * HEAD

KEYS: Keys = {
    "vocab_size": N_VOCAB,
    "context_length": N_CTX,
    "embedding_length": N_EMBD,
    "block_count": 2,
    "feed_forward_length": N_FF,
    "attention.head_count": N_HEAD,
    "attention.head_count_kv": N_HEAD_KV,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
OUTPUT: Shapes = {"output_norm.weight": (N_EMBD,), "output.weight": (N_VOCAB, N_EMBD)}
ATTENTION: Shapes = {
    "attn_norm.weight": (N_EMBD,),
    "attn_q.weight": (N_EMBD, N_EMBD),
    "attn_k.weight": (N_KV, N_EMBD),
    "attn_v.weight": (N_KV, N_EMBD),
    "attn_output.weight": (N_EMBD, N_EMBD),
}
QK_NORM: Shapes = {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
FORWARD: Shapes = {"ffn_norm.weight": (N_EMBD,), "ffn_up.weight": (N_FF, N_EMBD), "ffn_down.weight": (N_EMBD, N_FF)}
GATED = FORWARD | {"ffn_gate.weight": (N_FF, N_EMBD)}


@dataclass(frozen=True)
class Model:
    """keys: metadata beyond KEYS, without the architecture's prefix.

    top: tensors beyond the token embedding. blocks: those of each layer, slowest dimension first.
    """

    arch: str
    keys: Keys
    top: Shapes
    blocks: tuple[Shapes, ...]

    def shapes(self) -> Shapes:
        """All tensors by their GGUF names."""
        shapes = {"token_embd.weight": (N_VOCAB, N_EMBD)} | self.top
        for layer, block in enumerate(self.blocks):
            shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
        return shapes


def biased(shapes: Shapes) -> Shapes:
    """The same, with a bias for every weight."""
    return shapes | {name.replace(".weight", ".bias"): shape[:1] for name, shape in shapes.items()}


def without(shapes: Shapes, *names: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name.removesuffix(".weight") not in names}


def weight(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Of a scale that keeps attention and logits far from flat."""
    if name.endswith(".bias"):
        values = rng.normal(0, 0.1, shape)
    elif "attn_sinks" in name:
        values = rng.normal(0, 2, shape)
    elif name.endswith("ssm_a"):
        # memories that last from one token to dozens
        values = -np.exp(rng.uniform(-4, 0, shape))
    elif "norm" in name or len(shape) == 1:
        values = rng.uniform(0.7, 1.3, shape)
    elif name.startswith("token_embd"):
        values = rng.normal(0, 1, shape)
    elif ".lora_" in name:
        values = rng.normal(0, 0.8 / np.sqrt(shape[-1]), shape)
    else:
        gain = 1.5 if "attn_q" in name or "attn_k" in name else 1.0
        values = rng.normal(0, gain / np.sqrt(shape[-1]), shape)
    return values.astype(np.float32)


def write(name: str, model: Model, folder: str | PathLike[str], seed: int = 0) -> Path:
    """Write "<folder>/tiny-<name>.gguf", the same bytes for the same seed."""
    path = Path(folder) / f"tiny-{name}.gguf"
    rng = np.random.default_rng(seed)
    tensors = {tensor_name: weight(tensor_name, shape, rng) for tensor_name, shape in model.shapes().items()}
    write_gguf(path, model.arch, KEYS | {"block_count": len(model.blocks)} | model.keys, tensors)
    return path
