"""Prints what llama.cpp computes, to the last bit, for the library that LLAMA_CPP_LIB_PATH names.

    python stock_probe.py [--quantized] MODEL...

One line per case: the case and a digest of all logits, cache states and counts that it gave. It uses nothing of ours.
--quantized also tries a q8_0 cache, for models whose heads are a multiple of 64: stock shifts no others.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from typing import Any

import llama_cpp
import numpy as np

SILENT = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
F16, Q8_0 = 1, 8  # enum ggml_type
N_TOKENS = 150


class Probe:
    """A context whose every answer goes into one digest."""

    def __init__(self, model: Any, **settings: Any) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 512, 64, 32
        params.n_threads = params.n_threads_batch = 1
        for name, value in settings.items():
            setattr(params, name, value)
        self.context = llama_cpp.llama_init_from_model(model, params)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.memory = llama_cpp.llama_get_memory(self.context) if self.context else None
        self.digest = hashlib.sha256()

    def decode(self, tokens: list[int], pos: int, seq_id: int = 0) -> None:
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, pos + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq_id
        result = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        self.digest.update(str(result).encode())
        if result == 0:
            logits = llama_cpp.llama_get_logits(self.context)
            self.digest.update(np.ctypeslib.as_array(logits, shape=(len(tokens), self.n_vocab)).tobytes())

    def state(self) -> None:
        size = llama_cpp.llama_state_get_size(self.context)
        buffer = (ctypes.c_uint8 * size)()
        self.digest.update(
            str((size, llama_cpp.llama_state_get_data(self.context, buffer, size))).encode() + bytes(buffer)
        )


def run(model: Any, n_seq_max: int, **settings: Any) -> str:
    probe = Probe(model, n_seq_max=n_seq_max, **settings)
    if probe.context is None:
        return "no context"
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, probe.n_vocab, N_TOKENS).tolist()
    for seq_id in range(n_seq_max):
        for begin in range(0, N_TOKENS, 50):
            probe.decode(tokens[begin : begin + 50], begin, seq_id)
    probe.decode(tokens[:1], N_TOKENS)
    if llama_cpp.llama_memory_can_shift(probe.memory):
        llama_cpp.llama_memory_seq_rm(probe.memory, 0, 10, 60)
        llama_cpp.llama_memory_seq_add(probe.memory, 0, 60, -1, -50)
        probe.decode(tokens[:7], N_TOKENS + 1 - 50)
    probe.state()
    llama_cpp.llama_free(probe.context)
    return probe.digest.hexdigest()


def main() -> None:
    llama_cpp.llama_log_set(SILENT, ctypes.c_void_p(0))
    types = (F16, Q8_0) if "--quantized" in sys.argv else (F16,)
    for path in [argument for argument in sys.argv[1:] if argument != "--quantized"]:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        for flash_attn in (0, 1):
            for n_seq_max in (1, 2):
                for type_kv in types:
                    settings = {
                        "flash_attn_type": flash_attn,
                        "type_k": type_kv,
                        "type_v": type_kv if flash_attn else F16,
                    }
                    print(path, n_seq_max, settings, run(model, n_seq_max, **settings), flush=True)
        llama_cpp.llama_model_free(model)


if __name__ == "__main__":
    main()
