"""Logits from llama.cpp itself, exactly: f32 KV cache, no flash attention, one batch."""

from __future__ import annotations

import ctypes
from os import PathLike, fsencode

import llama_cpp
import numpy as np
import numpy.typing as npt

GGML_TYPE_F32 = 0
# kept alive here: llama.cpp calls it for every line of its log
SILENT = llama_cpp.llama_log_callback(lambda level, text, user_data: None)


def logits(path: str | PathLike[str], tokens: npt.NDArray[np.int32], n_ctx: int = 256) -> npt.NDArray[np.float32]:
    """[n_tokens, n_vocab]: what llama.cpp's own attention makes of tokens[n_tokens], at most n_ctx of them.

    Raises RuntimeError if the model does not load or decode.
    """
    llama_cpp.llama_log_set(SILENT, ctypes.c_void_p(0))
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(fsencode(path), model_params)
    if model is None:
        raise RuntimeError(f"llama.cpp does not load {path}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.type_k = params.type_v = GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        if context is None:
            raise RuntimeError(f"llama.cpp makes no context for {path}")
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens.tolist()):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama.cpp does not decode {path}")
        n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(len(tokens), n_vocab))
        return np.array(rows, dtype=np.float32)
    finally:
        llama_cpp.llama_batch_free(batch)
        if context is not None:
            llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
