"""Tiny models of the kinds that have more than plain attention, and which class of the reference reads each."""

from __future__ import annotations

from dataclasses import dataclass

from reference.chunks import Llama4
from reference.latent import Latent, MiniCPM3
from reference.more_models import POST_NORMS, TIED
from reference.random_model import (
    ATTENTION,
    GATED,
    HEAD,
    N_CTX,
    N_EMBD,
    N_FF,
    N_HEAD,
    N_HEAD_KV,
    OUTPUT,
    QK_NORM,
    Model,
    Shapes,
    biased,
    without,
)
from reference.recurrent import LFM2, Qwen35
from reference.shared_keys import Gemma4
from reference.switched import Switched
from reference.tiny_models import Keys
from reference.transformer import Transformer


@dataclass(frozen=True)
class Kind:
    """sliding: the window of the layers that slide, 0 if none does."""

    model: Model
    reader: type[Transformer] = Transformer
    sliding: int = 0


YARN: Keys = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": N_CTX // 2,
}

N_EXPERT = 4
EXPERTS: Shapes = {
    "post_attention_norm.weight": (N_EMBD,),
    "ffn_gate_inp.weight": (N_EXPERT, N_EMBD),
    "ffn_gate_exps.weight": (N_EXPERT, N_FF, N_EMBD),
    "ffn_up_exps.weight": (N_EXPERT, N_FF, N_EMBD),
    "ffn_down_exps.weight": (N_EXPERT, N_EMBD, N_FF),
    "ffn_gate_inp.bias": (N_EXPERT,),
    "ffn_gate_exps.bias": (N_EXPERT, N_FF),
    "ffn_up_exps.bias": (N_EXPERT, N_FF),
    "ffn_down_exps.bias": (N_EXPERT, N_EMBD),
}
GPT_OSS = biased(without(ATTENTION, "attn_norm")) | {"attn_norm.weight": (N_EMBD,), "attn_sinks.weight": (N_HEAD,)}

# latent attention, its matrices expanded
N_LORA, N_ROT = 32, 8
N_PLAIN = HEAD - N_ROT
EXPANDED: Shapes = {
    "attn_norm.weight": (N_EMBD,),
    "attn_q_a.weight": (N_LORA, N_EMBD),
    "attn_q_a_norm.weight": (N_LORA,),
    "attn_q_b.weight": (N_EMBD, N_LORA),
    "attn_kv_a_mqa.weight": (N_LORA + N_ROT, N_EMBD),
    "attn_kv_a_norm.weight": (N_LORA,),
    "attn_kv_b.weight": (N_HEAD * (N_PLAIN + HEAD), N_LORA),
    "attn_output.weight": (N_EMBD, N_EMBD),
}
# the same, prepared for a cache of latents
ABSORBED = without(EXPANDED, "attn_kv_b") | {
    "attn_k_b.weight": (N_HEAD, N_LORA, N_PLAIN),
    "attn_v_b.weight": (N_HEAD, HEAD, N_LORA),
}
LATENT: Keys = {
    "attention.q_lora_rank": N_LORA,
    "attention.kv_lora_rank": N_LORA,
    "attention.head_count_kv": N_HEAD,
    "rope.dimension_count": N_ROT,
}
DEEPSEEK2: Keys = LATENT | {
    "leading_dense_block_count": 2,
    "expert_feed_forward_length": N_FF,
    "expert_shared_count": 0,
}

ABSORBED_KEYS: Keys = YARN | {
    "rope.scaling.yarn_log_multiplier": 0.1,
    "attention.head_count_kv": 1,
    "attention.key_length": N_LORA + N_ROT,
    "attention.value_length": N_LORA,
    "attention.key_length_mla": HEAD,
    "attention.value_length_mla": HEAD,
}

# two heads that score tokens, by keys of their own
N_INDEX = 64
INDEXER: Shapes = {
    "indexer.k_norm.weight": (N_INDEX,),
    "indexer.k_norm.bias": (N_INDEX,),
    "indexer.proj.weight": (2, N_EMBD),
    "indexer.attn_k.weight": (N_INDEX, N_EMBD),
    "indexer.attn_q_b.weight": (2 * N_INDEX, N_LORA),
}

# the gated delta rule: two heads of keys, four of values
N_STATE, N_KEY, N_VALUE = 16, 2, 4
DELTA: Shapes = {
    "attn_norm.weight": (N_EMBD,),
    "attn_qkv.weight": ((2 * N_KEY + N_VALUE) * N_STATE, N_EMBD),
    "attn_gate.weight": (N_VALUE * N_STATE, N_EMBD),
    "ssm_conv1d.weight": ((2 * N_KEY + N_VALUE) * N_STATE, 4),
    "ssm_dt.bias": (N_VALUE,),
    "ssm_a": (N_VALUE,),
    "ssm_beta.weight": (N_VALUE, N_EMBD),
    "ssm_alpha.weight": (N_VALUE, N_EMBD),
    "ssm_norm.weight": (N_STATE,),
    "ssm_out.weight": (N_EMBD, N_VALUE * N_STATE),
}
GATED_ATTENTION = ATTENTION | QK_NORM | {"attn_q.weight": (2 * N_EMBD, N_EMBD)}
QWEN35_FORWARD = without(GATED, "ffn_norm") | {"post_attention_norm.weight": (N_EMBD,)}
QWEN35: Keys = {
    "rope.dimension_count": N_ROT,
    "rope.dimension_sections": [2, 1, 1, 0],
    "full_attention_interval": 2,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": N_VALUE * N_STATE,
    "ssm.state_size": N_STATE,
    "ssm.time_step_rank": N_VALUE,
    "ssm.group_count": N_KEY,
}

SHORT_CONVOLUTION: Shapes = {
    "attn_norm.weight": (N_EMBD,),
    "shortconv.conv.weight": (N_EMBD, 3),
    "shortconv.in_proj.weight": (3 * N_EMBD, N_EMBD),
    "shortconv.out_proj.weight": (N_EMBD, N_EMBD),
}
LFM2_BLOCKS = (SHORT_CONVOLUTION | GATED, ATTENTION | QK_NORM | GATED) * 2
LFM2_KEYS: Keys = {"shortconv.l_cache": 3, "attention.head_count_kv": [0, N_HEAD_KV, 0, N_HEAD_KV]}
LFM2_TOP: Shapes = {"token_embd_norm.weight": (N_EMBD,)}


def gemma4_attention(size: int, own_keys: bool) -> Shapes:
    """With heads of this size, and keys or without."""
    shapes = ATTENTION | {
        "attn_q.weight": (N_HEAD * size, N_EMBD),
        "attn_k.weight": (N_HEAD_KV * size, N_EMBD),
        "attn_v.weight": (N_HEAD_KV * size, N_EMBD),
        "attn_output.weight": (N_EMBD, N_HEAD * size),
        "attn_q_norm.weight": (size,),
        "attn_k_norm.weight": (size,),
    }
    return shapes if own_keys else without(shapes, "attn_k", "attn_v", "attn_k_norm")


GEMMA4_FORWARD = GATED | POST_NORMS | {"layer_output_scale.weight": (1,)}

# adapters, and none
N_SLOT, N_RANK = 4, 4


def with_adapters(shapes: Shapes) -> Shapes:
    """Granite's switched adapters: a low-rank pair for every projection, stacked over the adapters."""
    projections = without(shapes, "attn_norm", "ffn_norm")
    n_qkv = sum(shapes[f"attn_{name}.weight"][0] for name in "qkv")
    fused = without(shapes, "attn_q", "attn_k", "attn_v") | {"attn_qkv.weight": (n_qkv, N_EMBD)}
    for name, (n_out, n_in) in projections.items():
        base = name.removesuffix(".weight")
        fused |= {f"{base}.lora_a": (N_SLOT, N_RANK, n_in), f"{base}.lora_b": (N_SLOT, n_out, N_RANK)}
    return fused


KINDS = {
    # sliding and full layers by turns, scores and logits capped
    "gemma2": Kind(
        Model(
            "gemma2",
            {"attention.sliding_window": 24, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 30.0},
            TIED,
            (ATTENTION | GATED | POST_NORMS,) * 4,
        ),
        sliding=24,
    ),
    # one full layer in three, with another RoPE base than the sliding ones, and scaled
    "gemma3": Kind(
        Model(
            "gemma3",
            {
                "attention.sliding_window": 24,
                "attention.sliding_window_pattern": 3,
                "rope.freq_base": 100000.0,
                "rope.scaling.type": "linear",
                "rope.scaling.factor": 2.0,
            },
            TIED,
            (ATTENTION | QK_NORM | GATED | POST_NORMS,) * 6,
        ),
        sliding=24,
    ),
    # the sliding window is longer than the Λ window of the tests
    "gpt-oss": Kind(
        Model(
            "gpt-oss",
            YARN
            | {
                "attention.sliding_window": 48,
                "expert_count": N_EXPERT,
                # all: which of two nearly equal experts a router picks is decided by the last bit
                "expert_used_count": N_EXPERT,
                "expert_feed_forward_length": N_FF,
            },
            OUTPUT,
            (GPT_OSS | EXPERTS,) * 4,
        ),
        sliding=48,
    ),
    # one layer attends within chunks of 8192 tokens, the last one has no RoPE
    "llama4": Kind(
        Model(
            "llama4",
            {
                "attention.sliding_window_pattern": [0, 0, 1, 0],
                "interleave_moe_layer_step": 0,
                "expert_count": 1,
                "expert_used_count": 1,
                "expert_feed_forward_length": N_FF,
            },
            OUTPUT,
            (ATTENTION | GATED,) * 4,
        ),
        Llama4,
    ),
    # the last two layers attend to the keys of the two before; two sizes of heads
    "gemma4": Kind(
        Model(
            "gemma4",
            {
                "attention.sliding_window": 24,
                "attention.sliding_window_pattern": [1, 0, 1, 0, 1, 0],
                "attention.shared_kv_layers": 2,
                "attention.key_length": 2 * HEAD,
                "attention.value_length": 2 * HEAD,
                "attention.key_length_swa": HEAD,
                "attention.value_length_swa": HEAD,
                "rope.dimension_count": 2 * HEAD,
                "rope.dimension_count_swa": HEAD,
                "rope.freq_base": 100000.0,
                "rope.freq_base_swa": 10000.0,
                "embedding_length_per_layer_input": 0,
                "final_logit_softcapping": 30.0,
            },
            TIED | {"rope_freqs.weight": (HEAD,)},
            tuple(
                gemma4_attention(HEAD if layer % 2 == 0 else 2 * HEAD, layer < 4) | GEMMA4_FORWARD for layer in range(6)
            ),
        ),
        Gemma4,
        sliding=24,
    ),
    "qwen2vl": Kind(
        Model(
            "qwen2vl",
            # llama.cpp does not read the epsilon of this architecture and takes 0
            {"rope.dimension_sections": [2, 3, 3, 0], "attention.layer_norm_rms_epsilon": 0.0},
            OUTPUT,
            (ATTENTION | GATED | {"attn_q.bias": (N_EMBD,), "attn_k.bias": (32,), "attn_v.bias": (32,)},) * 2,
        )
    ),
    # the last pair of a head belongs to the section that stands still for text
    "qwen3vl": Kind(
        Model(
            "qwen3vl",
            {"rope.dimension_sections": [4, 2, 2, 0], "rope.freq_base": 100.0},
            OUTPUT,
            (ATTENTION | QK_NORM | GATED,) * 2,
        )
    ),
    "qwen35": Kind(
        Model("qwen35", QWEN35, OUTPUT, (DELTA | QWEN35_FORWARD, GATED_ATTENTION | QWEN35_FORWARD) * 2), Qwen35
    ),
    "lfm2": Kind(Model("lfm2", LFM2_KEYS, LFM2_TOP, LFM2_BLOCKS), LFM2),
    # every layer of attention slides: nothing is left for the rule
    "lfm2-sliding": Kind(
        Model("lfm2", LFM2_KEYS | {"attention.sliding_window": 24}, LFM2_TOP, LFM2_BLOCKS), LFM2, sliding=24
    ),
    "deepseek2": Kind(Model("deepseek2", DEEPSEEK2 | ABSORBED_KEYS, OUTPUT, (ABSORBED | GATED,) * 2), Latent),
    # each query selects as many tokens as the tests' texts have
    "deepseek32": Kind(
        Model(
            "deepseek32",
            DEEPSEEK2
            | ABSORBED_KEYS
            | {
                "expert_gating_func": 2,
                "attention.indexer.head_count": 2,
                "attention.indexer.key_length": N_INDEX,
                "attention.indexer.top_k": 1024,
            },
            OUTPUT,
            (ABSORBED | GATED | INDEXER,) * 2,
        ),
        Latent,
    ),
    "deepseek2-expanded": Kind(Model("deepseek2", DEEPSEEK2, OUTPUT, (EXPANDED | GATED,) * 2), Latent),
    "minicpm3": Kind(Model("minicpm3", LATENT, OUTPUT, (EXPANDED | GATED,) * 2), MiniCPM3),
    # queries grow every 16 keys
    "mistral3": Kind(
        Model(
            "mistral3",
            YARN
            | {
                "rope.scaling.original_context_length": 16,
                "rope.scaling.yarn_log_multiplier": 1.0,
                "attention.temperature_scale": 0.4,
            },
            OUTPUT,
            (ATTENTION | GATED,) * 2,
        )
    ),
    # tokens turn adapters on, which are on while there is no other
    "graniteswitch": Kind(
        Model(
            "graniteswitch",
            {
                "logit_scale": 1.0,
                "adapters.count": N_SLOT - 1,
                "adapters.lora_rank": N_RANK,
                "adapters.token_ids_activate": [40, 90, 200],
                "adapters.token_ids_substitute": [41, 91, 41],
            },
            OUTPUT,
            (with_adapters(ATTENTION | GATED),) * 2,
        ),
        Switched,
    ),
}
