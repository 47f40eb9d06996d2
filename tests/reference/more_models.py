"""Tiny models that a Λ cache serves and the numpy reference does not know: they are compared with stock llama.cpp."""

from __future__ import annotations

from reference.random_model import (
    ATTENTION,
    FORWARD,
    GATED,
    HEAD,
    N_EMBD,
    N_FF,
    N_HEAD,
    N_HEAD_KV,
    N_KV,
    OUTPUT,
    QK_NORM,
    Model,
    Shapes,
    biased,
    without,
)
from reference.tiny_models import Keys

TIED: Shapes = {"output_norm.weight": (N_EMBD,)}
EMBEDDING_NORM: Shapes = {"token_embd_norm.weight": (N_EMBD,)}
POST_NORMS: Shapes = {"post_attention_norm.weight": (N_EMBD,), "post_ffw_norm.weight": (N_EMBD,)}
FULL_QK_NORM: Shapes = {"attn_q_norm.weight": (N_EMBD,), "attn_k_norm.weight": (N_KV,)}


def norms_biased(shapes: Shapes) -> Shapes:
    return shapes | biased({name: shape for name, shape in shapes.items() if "_norm." in name})


def fused(n_head_kv: int) -> Shapes:
    """Attention with q, k and v in one matrix."""
    return without(ATTENTION, "attn_q", "attn_k", "attn_v") | {
        "attn_qkv.weight": (N_EMBD + 2 * n_head_kv * HEAD, N_EMBD)
    }


def openelm_block(n_head: int, n_head_kv: int, n_ff: int) -> Shapes:
    return QK_NORM | {
        "attn_norm.weight": (N_EMBD,),
        "attn_qkv.weight": ((n_head + 2 * n_head_kv) * HEAD, N_EMBD),
        "attn_output.weight": (N_EMBD, n_head * HEAD),
        "ffn_norm.weight": (N_EMBD,),
        "ffn_gate.weight": (n_ff, N_EMBD),
        "ffn_up.weight": (n_ff, N_EMBD),
        "ffn_down.weight": (N_EMBD, n_ff),
    }


FALCON = norms_biased(fused(1)) | without(FORWARD, "ffn_norm")
BLOOM = biased(fused(N_HEAD) | FORWARD)
STABLELM = norms_biased(ATTENTION | GATED) | {
    "attn_q_norm.weight": (N_HEAD, HEAD),
    "attn_k_norm.weight": (N_HEAD_KV, HEAD),
}
OLMO2 = without(ATTENTION | GATED, "attn_norm", "ffn_norm") | FULL_QK_NORM | POST_NORMS
EXAONE4 = without(ATTENTION | GATED, "attn_norm", "ffn_norm") | QK_NORM | POST_NORMS
COMMAND_R = ATTENTION | without(GATED, "ffn_norm")
TALKIE = without(ATTENTION | GATED, "attn_norm", "ffn_norm") | {
    "attn_q_norm.weight": (N_HEAD, 1),
    "layer_output_scale.weight": (1,),
}
LINEAR: Shapes = {"attn_norm.weight": (N_EMBD,), "attn_output.weight": (N_EMBD, N_EMBD)}

N_INNER, N_CONV, N_STATE, N_STEP = 128, 4, 16, 4
SSM: Keys = {
    "ssm.conv_kernel": N_CONV,
    "ssm.inner_size": N_INNER,
    "ssm.state_size": N_STATE,
    "ssm.time_step_rank": N_STEP,
}
MAMBA: Shapes = {
    "attn_norm.weight": (N_EMBD,),
    "ssm_in.weight": (2 * N_INNER, N_EMBD),
    "ssm_conv1d.weight": (N_INNER, N_CONV),
    "ssm_conv1d.bias": (N_INNER,),
    "ssm_x.weight": (N_STEP + 2 * N_STATE, N_INNER),
    "ssm_dt.weight": (N_INNER, N_STEP),
    "ssm_dt.bias": (N_INNER,),
    "ssm_a": (N_INNER, N_STATE),
    "ssm_d": (N_INNER,),
    "ssm_out.weight": (N_EMBD, N_INNER),
}
MAMBA_NORMS: Shapes = {
    "ssm_dt_norm.weight": (N_STEP,),
    "ssm_b_norm.weight": (N_STATE,),
    "ssm_c_norm.weight": (N_STATE,),
}

N_RANK = 8
NO_HEADS: Keys = {"attention.head_count": 0, "attention.head_count_kv": 0}
RWKV: Shapes = (
    biased({f"{name}.weight": (N_EMBD,) for name in ("attn_norm", "attn_norm_2", "time_mix_ln")})
    | {f"time_mix_{name}.weight": (N_EMBD,) for name in ("w0", "a0", "v0", "k_k", "k_a", "r_k")}
    | {f"time_mix_{name}1.weight": (N_RANK, N_EMBD) for name in "wavg"}
    | {f"time_mix_{name}2.weight": (N_EMBD, N_RANK) for name in "wavg"}
    | {f"time_mix_{name}.weight": (N_EMBD, N_EMBD) for name in ("key", "value", "receptance", "output")}
    | {
        "time_mix_lerp_fused.weight": (6, 1, 1, N_EMBD),
        "channel_mix_lerp_k.weight": (1, 1, N_EMBD),
        "channel_mix_key.weight": (N_FF, N_EMBD),
        "channel_mix_value.weight": (N_EMBD, N_FF),
    }
)

MODELS = {
    # one key/value head, both branches from one norm
    "falcon": Model("falcon", {"attention.head_count_kv": 1}, norms_biased(OUTPUT), (FALCON, FALCON)),
    "starcoder2": Model("starcoder2", {}, norms_biased(OUTPUT), (biased(ATTENTION | FORWARD),) * 2),
    # ALiBi
    "bloom": Model(
        "bloom", {"attention.head_count_kv": N_HEAD}, norms_biased(OUTPUT) | biased(EMBEDDING_NORM), (BLOOM, BLOOM)
    ),
    # part of a head is rotated, each head has a norm of its own
    "stablelm": Model("stablelm", {"rope.dimension_count": 8}, norms_biased(OUTPUT), (STABLELM, STABLELM)),
    "olmo2": Model("olmo2", {}, OUTPUT, (OLMO2, OLMO2)),
    "exaone4": Model("exaone4", {}, OUTPUT, (EXAONE4, EXAONE4)),
    "command-r": Model("command-r", {"logit_scale": 0.25}, TIED, (COMMAND_R, COMMAND_R)),
    "granite": Model(
        "granite",
        {"logit_scale": 0.5, "residual_scale": 0.7, "embedding_scale": 2.0, "attention.scale": 0.2},
        OUTPUT,
        (ATTENTION | GATED,) * 2,
    ),
    # no RoPE at all
    "granite-nope": Model(
        "granite", {"logit_scale": 1.0, "rope.scaling.finetuned": False}, OUTPUT, (ATTENTION | GATED,) * 2
    ),
    # a norm after RoPE with one weight for a whole head
    "talkie": Model("talkie", {"logit_scale": 1.0}, without(OUTPUT, "output_norm"), (TALKIE, TALKIE)),
    # layers with other numbers of heads
    "openelm": Model(
        "openelm",
        {
            "attention.head_count": [2, 4],
            "attention.head_count_kv": [1, 2],
            "feed_forward_length": [64, N_FF],
            "attention.key_length": HEAD,
            "attention.value_length": HEAD,
        },
        TIED,
        (openelm_block(2, 1, 64), openelm_block(4, 2, N_FF)),
    ),
    # layers without keys and values, or without attention
    "deci": Model(
        "deci",
        {
            "attention.head_count": [N_HEAD, N_HEAD, 0, N_HEAD],
            "attention.head_count_kv": [N_HEAD_KV, 0, 0, 1],
            "feed_forward_length": [N_FF, N_FF, N_FF, N_FF],
        },
        OUTPUT,
        (
            ATTENTION | GATED,
            LINEAR | GATED,
            GATED,
            ATTENTION | GATED | {"attn_k.weight": (HEAD, N_EMBD), "attn_v.weight": (HEAD, N_EMBD)},
        ),
    ),
    # attention without RoPE between recurrent layers
    "jamba": Model(
        "jamba",
        SSM | {"attention.head_count_kv": [0, N_HEAD_KV, 0]},
        OUTPUT,
        (MAMBA | MAMBA_NORMS | GATED, ATTENTION | GATED, MAMBA | MAMBA_NORMS | GATED),
    ),
}

# recurrent throughout: their memory is constant without a Λ cache
CONSTANT = {
    "mamba": Model("mamba", SSM | NO_HEADS, OUTPUT, (MAMBA, MAMBA)),
    "rwkv7": Model(
        "rwkv7",
        NO_HEADS
        | {
            "wkv.head_size": N_EMBD,  # ggml computes 64 numbers at a time, whatever the size of a head
            "token_shift_count": 2,
            **{f"attention.{name}_lora_rank": N_RANK for name in ("decay", "iclr", "value_residual_mix", "gate")},
        },
        biased({"token_embd_norm.weight": (N_EMBD,), "output_norm.weight": (N_EMBD,)}) | OUTPUT,
        (RWKV, RWKV),
    ),
}
