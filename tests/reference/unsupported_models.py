"""Tiny models that a Λ cache cannot serve, one per reason. llama.cpp itself loads and runs all of them."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path

import numpy as np

from reference.tiny_models import N_VOCAB, Keys, Shape, Tensors, metadata, weights, write_gguf

Model = tuple[str, Keys, Tensors]  # architecture, metadata, weights

N_EMBD, N_FF = 64, 96


class Weights(dict[str, np.ndarray]):
    """Random f32 tensors, written down shape by shape, slowest dimension first."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def add(self, name: str, *sizes: int) -> None:
        self[name] = self._rng.normal(0, 0.1, sizes).astype(np.float32)


def llama_like(arch: str, keys: Keys | None = None, **shape: object) -> Model:
    """A model whose tensors are those of one of the supported shapes."""
    made = Shape(arch, keys=keys or {}, **shape)  # type: ignore[arg-type]
    return arch, metadata(made), weights(made, np.random.default_rng(0))


def gpt2() -> Model:
    arch, keys, tensors = llama_like("gpt2", n_head_kv=4, layer_norm=True, qkv="fused", biases="all", forward="plain")
    tensors["position_embd.weight"] = np.zeros((128, N_EMBD), dtype=np.float32)
    return arch, keys, tensors


def gemma2() -> Model:
    arch, keys, tensors = llama_like("gemma2", {"attention.sliding_window": 32})
    del tensors["output.weight"]
    for layer in range(2):
        for name in ("post_attention_norm", "post_ffw_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = np.ones(N_EMBD, dtype=np.float32)
    return arch, keys, tensors


def mamba_layer(tensors: Weights, at: str, with_norms: bool) -> None:
    d_inner, d_conv, d_state, dt_rank = 2 * N_EMBD, 4, 16, 4
    tensors.add(at + "ssm_in.weight", 2 * d_inner, N_EMBD)
    tensors.add(at + "ssm_conv1d.weight", d_inner, d_conv)
    tensors.add(at + "ssm_conv1d.bias", d_inner)
    tensors.add(at + "ssm_x.weight", dt_rank + 2 * d_state, d_inner)
    tensors.add(at + "ssm_dt.weight", d_inner, dt_rank)
    tensors.add(at + "ssm_dt.bias", d_inner)
    tensors.add(at + "ssm_a", d_inner, d_state)
    tensors.add(at + "ssm_d", d_inner)
    tensors.add(at + "ssm_out.weight", N_EMBD, d_inner)
    if with_norms:
        tensors.add(at + "ssm_dt_norm.weight", dt_rank)
        tensors.add(at + "ssm_b_norm.weight", d_state)
        tensors.add(at + "ssm_c_norm.weight", d_state)


SSM: Keys = {"ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": 16, "ssm.time_step_rank": 4}


def ends(tensors: Weights) -> None:
    tensors.add("token_embd.weight", N_VOCAB, N_EMBD)
    tensors.add("output_norm.weight", N_EMBD)
    tensors.add("output.weight", N_VOCAB, N_EMBD)


def mamba() -> Model:
    tensors = Weights()
    ends(tensors)
    for layer in range(2):
        tensors.add(f"blk.{layer}.attn_norm.weight", N_EMBD)
        mamba_layer(tensors, f"blk.{layer}.", with_norms=False)
    keys: Keys = metadata(Shape("mamba")) | SSM | {"attention.head_count": 0, "attention.head_count_kv": 0}
    return "mamba", keys, dict(tensors)


def jamba() -> Model:
    """One recurrent layer and one with attention."""
    tensors = Weights()
    ends(tensors)
    for layer in range(2):
        at = f"blk.{layer}."
        tensors.add(at + "attn_norm.weight", N_EMBD)
        if layer == 0:
            mamba_layer(tensors, at, with_norms=True)
        else:
            for name, size in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32), ("attn_output", 64)):
                tensors.add(f"{at}{name}.weight", size, N_EMBD)
        tensors.add(at + "ffn_norm.weight", N_EMBD)
        tensors.add(at + "ffn_gate.weight", N_FF, N_EMBD)
        tensors.add(at + "ffn_up.weight", N_FF, N_EMBD)
        tensors.add(at + "ffn_down.weight", N_EMBD, N_FF)
    return "jamba", metadata(Shape("jamba")) | SSM | {"attention.head_count_kv": [0, 2]}, dict(tensors)


def minicpm3() -> Model:
    """MLA without compression of the cache: heads joined from an unrotated and a rotated part."""
    n_head, head_size, n_rot, rank = 4, 16, 8, 32
    tensors = Weights()
    ends(tensors)
    for layer in range(2):
        at = f"blk.{layer}."
        tensors.add(at + "attn_norm.weight", N_EMBD)
        tensors.add(at + "attn_q_a_norm.weight", rank)
        tensors.add(at + "attn_kv_a_norm.weight", rank)
        tensors.add(at + "attn_q_a.weight", rank, N_EMBD)
        tensors.add(at + "attn_q_b.weight", n_head * head_size, rank)
        tensors.add(at + "attn_kv_a_mqa.weight", rank + n_rot, N_EMBD)
        tensors.add(at + "attn_kv_b.weight", n_head * (head_size - n_rot + head_size), rank)
        tensors.add(at + "attn_output.weight", N_EMBD, n_head * head_size)
        tensors.add(at + "ffn_norm.weight", N_EMBD)
        tensors.add(at + "ffn_gate.weight", N_FF, N_EMBD)
        tensors.add(at + "ffn_up.weight", N_FF, N_EMBD)
        tensors.add(at + "ffn_down.weight", N_EMBD, N_FF)
    keys = metadata(Shape("minicpm3", n_head_kv=4, n_rot=n_rot))
    return "minicpm3", keys | {"attention.q_lora_rank": rank, "attention.kv_lora_rank": rank}, dict(tensors)


def bert() -> Model:
    tensors = Weights()
    tensors.add("token_embd.weight", N_VOCAB, N_EMBD)
    tensors.add("position_embd.weight", 128, N_EMBD)
    tensors.add("token_types.weight", 2, N_EMBD)
    for name in ("weight", "bias"):
        tensors.add(f"token_embd_norm.{name}", N_EMBD)
    for layer in range(2):
        at = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors.add(f"{at}{name}.weight", N_EMBD, N_EMBD)
            tensors.add(f"{at}{name}.bias", N_EMBD)
        tensors.add(at + "ffn_up.weight", N_FF, N_EMBD)
        tensors.add(at + "ffn_down.weight", N_EMBD, N_FF)
        for norm in ("attn_output_norm", "layer_output_norm"):
            for name in ("weight", "bias"):
                tensors.add(f"{at}{norm}.{name}", N_EMBD)
    keys = metadata(Shape("bert", n_head_kv=4, layer_norm=True)) | {
        "attention.causal": False,
        "tokenizer.ggml.token_type_count": 2,
    }
    return "bert", keys, dict(tensors)


MODELS: dict[str, Callable[[], Model]] = {
    "gemma2": gemma2,
    "mamba": mamba,
    "jamba": jamba,
    "minicpm3": minicpm3,
    "gpt2": gpt2,
    "bert": bert,
    "qwen2vl": lambda: llama_like("qwen2vl", {"rope.dimension_sections": [2, 3, 3, 0]}, biases="qkv"),
    "mistral3": lambda: llama_like(
        "mistral3",
        {"attention.temperature_scale": 0.1, "rope.scaling.original_context_length": 64},
    ),
    "maincoder": lambda: llama_like("maincoder", qk_norm="head"),
}


def write(name: str, folder: str | PathLike[str]) -> Path:
    """Write the model `name` of MODELS to "<folder>/unsupported-<name>.gguf"."""
    path = Path(folder) / f"unsupported-{name}.gguf"
    arch, keys, tensors = MODELS[name]()
    write_gguf(path, arch, keys, tensors)
    return path
