"""The tensors of a Llama by the names that Transformers gives them, and MLX-LM after it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from oracle import Llama

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def weights(model: Llama) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    for name, tensor in model.tensors.items():
        base = name.removesuffix(".weight")
        if base in TOP:
            target = TOP[base]
        else:
            _, layer, part = base.split(".")
            target = f"model.layers.{layer}.{LAYER[part]}"
        yield target + ".weight", tensor.astype(np.float32)


def is_tied(model: Llama) -> bool:
    """Whether the output matrix is that of the embeddings."""
    return "output.weight" not in model.tensors
