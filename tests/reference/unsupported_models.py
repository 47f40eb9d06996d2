"""Tiny models that llama.cpp runs and a Λ cache cannot serve, one per reason."""

from __future__ import annotations

from dataclasses import dataclass

from reference.more_models import BLOOM, EMBEDDING_NORM, norms_biased
from reference.random_model import (
    ATTENTION,
    FORWARD,
    GATED,
    N_CTX,
    N_EMBD,
    N_FF,
    N_HEAD,
    OUTPUT,
    QK_NORM,
    Model,
    Shapes,
    biased,
    without,
)

N_EXPERT = 4


@dataclass(frozen=True)
class Refused:
    """words: in the sentence that refuses the model. at_graph: found out when the graph is built, not before."""

    model: Model
    words: str
    at_graph: bool = False


POSITIONS: Shapes = {"position_embd.weight": (N_CTX, N_EMBD)}
BERT = without(ATTENTION | FORWARD, "attn_norm", "ffn_norm") | {
    "attn_k.weight": (N_EMBD, N_EMBD),
    "attn_v.weight": (N_EMBD, N_EMBD),
    "attn_output_norm.weight": (N_EMBD,),
    "layer_output_norm.weight": (N_EMBD,),
}
EXPERTS: Shapes = {
    "ffn_norm.weight": (N_EMBD,),
    "ffn_gate_inp.weight": (N_EXPERT, N_EMBD),
    "ffn_gate_exps.weight": (N_EXPERT, N_FF, N_EMBD),
    "ffn_up_exps.weight": (N_EXPERT, N_FF, N_EMBD),
    "ffn_down_exps.weight": (N_EXPERT, N_EMBD, N_FF),
    "ffn_gate_shexp.weight": (N_FF, N_EMBD),
    "ffn_up_shexp.weight": (N_FF, N_EMBD),
    "ffn_down_shexp.weight": (N_EMBD, N_FF),
}


def t5_tensors(n_layer: int) -> Shapes:
    block = without(ATTENTION | FORWARD, "attn_output") | {
        "attn_k.weight": (N_EMBD, N_EMBD),
        "attn_v.weight": (N_EMBD, N_EMBD),
        "attn_o.weight": (N_EMBD, N_EMBD),
        "attn_rel_b.weight": (8, N_HEAD),
    }
    cross = {f"cross_{name}": shape for name, shape in block.items() if name.startswith("attn")}
    shapes: Shapes = {"enc.output_norm.weight": (N_EMBD,), "dec.output_norm.weight": (N_EMBD,)}
    for i in range(n_layer):
        shapes |= {f"enc.blk.{i}.{name}": shape for name, shape in block.items()}
        shapes |= {f"dec.blk.{i}.{name}": shape for name, shape in (block | cross).items()}
    return shapes


MODELS = {
    "gpt2": Refused(
        Model("gpt2", {"attention.head_count_kv": N_HEAD}, norms_biased(OUTPUT) | POSITIONS, (BLOOM,) * 2),
        "learned absolute positions",
    ),
    "bert": Refused(
        Model(
            "bert",
            {"attention.head_count_kv": N_HEAD, "attention.causal": False, "tokenizer.ggml.token_type_count": 2},
            POSITIONS | {"token_types.weight": (2, N_EMBD)} | biased(EMBEDDING_NORM),
            (biased(BERT),) * 2,
        ),
        "not causal",
    ),
    # a norm between RoPE and attention with a weight for every dimension: a score depends on more than a distance
    "maincoder": Refused(
        Model("maincoder", {}, OUTPUT, (ATTENTION | QK_NORM | GATED,) * 2),
        "between RoPE and attention",
        at_graph=True,
    ),
    "llada": Refused(Model("llada", {}, OUTPUT, (ATTENTION | GATED,) * 2), "not causal"),
    "t5": Refused(
        Model(
            "t5",
            {"block_count": 2, "attention.head_count_kv": N_HEAD, "attention.relative_buckets_count": 8},
            t5_tensors(2),
            (),
        ),
        "encoder",
    ),
    "hunyuan-moe": Refused(
        Model(
            "hunyuan-moe",
            {"expert_count": N_EXPERT, "expert_used_count": 2, "expert_feed_forward_length": N_FF},
            OUTPUT,
            (ATTENTION | QK_NORM | EXPERTS,) * 2,
        ),
        "between RoPE and attention",
        at_graph=True,
    ),
}
