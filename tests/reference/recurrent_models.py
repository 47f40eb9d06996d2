"""Tiny purely recurrent models: they need no Λ cache, and run as they are."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np

from reference.random_model import KEYS, N_EMBD, N_FF, OUTPUT, Model, Shapes, biased, weight
from reference.tiny_models import Keys, write_gguf

N_INNER, N_CONV, N_STATE, N_DT = 2 * N_EMBD, 4, 16, 4
N_LORA, HEAD = 8, 64  # ggml computes RWKV 64 numbers at a time, whatever the size of a head
NO_HEADS: Keys = {"attention.head_count": 0, "attention.head_count_kv": 0}

MAMBA: Shapes = {
    "attn_norm.weight": (N_EMBD,),
    "ssm_in.weight": (2 * N_INNER, N_EMBD),
    "ssm_conv1d.weight": (N_INNER, N_CONV),
    "ssm_conv1d.bias": (N_INNER,),
    "ssm_x.weight": (N_DT + 2 * N_STATE, N_INNER),
    "ssm_dt.weight": (N_INNER, N_DT),
    "ssm_dt.bias": (N_INNER,),
    "ssm_a": (N_INNER, N_STATE),
    "ssm_d": (N_INNER,),
    "ssm_out.weight": (N_EMBD, N_INNER),
}
RWKV: Shapes = (
    biased({f"{name}.weight": (N_EMBD,) for name in ("attn_norm", "attn_norm_2", "time_mix_ln")})
    | {f"time_mix_{name}.weight": (N_EMBD,) for name in ("w0", "a0", "v0", "k_k", "k_a", "r_k")}
    | {f"time_mix_{name}1.weight": (N_LORA, N_EMBD) for name in "wavg"}
    | {f"time_mix_{name}2.weight": (N_EMBD, N_LORA) for name in "wavg"}
    | {f"time_mix_{name}.weight": (N_EMBD, N_EMBD) for name in ("key", "value", "receptance", "output")}
    | {
        "time_mix_lerp_fused.weight": (6, 1, 1, N_EMBD),
        "channel_mix_lerp_k.weight": (1, 1, N_EMBD),
        "channel_mix_key.weight": (N_FF, N_EMBD),
        "channel_mix_value.weight": (N_EMBD, N_FF),
    }
)

MODELS = {
    "mamba": Model(
        "mamba",
        NO_HEADS
        | {
            "ssm.conv_kernel": N_CONV,
            "ssm.inner_size": N_INNER,
            "ssm.state_size": N_STATE,
            "ssm.time_step_rank": N_DT,
        },
        OUTPUT,
        (MAMBA, MAMBA),
    ),
    "rwkv7": Model(
        "rwkv7",
        NO_HEADS
        | {
            "wkv.head_size": HEAD,
            "token_shift_count": 2,
            **{f"attention.{name}_lora_rank": N_LORA for name in ("decay", "iclr", "value_residual_mix", "gate")},
        },
        biased({"token_embd_norm.weight": (N_EMBD,), "output_norm.weight": (N_EMBD,)}) | OUTPUT,
        (RWKV, RWKV),
    ),
}
# a convolution's last inputs and a state in each layer, in f32
STATE_BYTES = {
    "mamba": 2 * 4 * N_INNER * (N_CONV - 1 + N_STATE),
    "rwkv7": 2 * 4 * (2 * N_EMBD + N_EMBD * HEAD),
}


def write(name: str, folder: str | PathLike[str]) -> Path:
    """Write "<folder>/tiny-<name>.gguf", the same bytes each time."""
    path, model, rng = Path(folder) / f"tiny-{name}.gguf", MODELS[name], np.random.default_rng(0)
    tensors = {at: weight(at, shape, rng) for at, shape in model.shapes().items()}
    for at in tensors:
        if at.endswith("ssm_a"):
            tensors[at] = -np.abs(tensors[at])  # the state fades
    write_gguf(path, model.arch, KEYS | {"block_count": len(model.blocks)} | model.keys, tensors)
    return path
