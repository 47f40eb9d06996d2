"""A bare llama.cpp context with a Λ cache, for tests that look below the Llama class: several sequences, raw states."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from os import PathLike, fsencode
from types import TracebackType

import llama_cpp
import numpy as np
import numpy.typing as npt
from reference.transformer import nll_from_logits

from lminf_edge import native
from lminf_edge.config import ATTENTIONS as ATTENTIONS
from lminf_edge.config import SINK_MODES
from lminf_edge.native import Info

SILENT = llama_cpp.llama_log_callback(lambda level, text, user_data: None)

F32, F16, Q4_0, Q8_0, BF16 = 0, 1, 2, 8, 30  # enum ggml_type
PARTIAL_ONLY = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY

_native = native.load()  # the functions that it uses itself are declared
_lib = llama_cpp.llama_cpp._lib
_lib.lminf_skip.argtypes, _lib.lminf_skip.restype = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64], ctypes.c_bool


def last_error() -> str:
    return (_lib.lminf_last_error() or b"").decode()


class NativeContext:
    """n_local None: llama.cpp's own cache of n_ctx cells, as a model that is recurrent throughout has it anyway.

    recall: fields of struct lminf_params that are not those above.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        n_local: int | None,
        n_global: int = 0,
        *,
        max_distance: int = 0,
        mode: str = "ceiling",
        attention: str = "auto",
        n_slack: int = 0,
        pos_bound: int = 0,
        n_ubatch: int = 64,
        n_ctx: int = 256,
        n_seq_max: int = 1,
        type_k: int = F32,
        type_v: int = F32,
        flash_attn: bool = False,
        n_threads: int = 1,
        n_rs_seq: int = 0,
        **recall: int,
    ) -> None:
        llama_cpp.llama_log_set(SILENT, ctypes.c_void_p(0))
        self.context = self.model = None
        self.n_seq_max = n_seq_max

        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(fsencode(path), model_params)
        if self.model is None:
            raise RuntimeError(f"llama.cpp does not load {path}")

        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max(n_ctx, n_ubatch) * n_seq_max
        params.n_batch, params.n_ubatch = n_ubatch * n_seq_max, n_ubatch
        params.n_seq_max, params.n_rs_seq = n_seq_max, n_rs_seq
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k, params.type_v = type_k, type_v
        params.flash_attn_type = int(flash_attn)  # enum llama_flash_attn_type
        if n_local is not None:
            sink_mode, kind = SINK_MODES.index(mode), ATTENTIONS.index(attention)
            lminf = native.load().default_params()
            lminf.n_global, lminf.n_local, lminf.max_distance, lminf.n_slack = n_global, n_local, max_distance, n_slack
            lminf.sink_mode, lminf.pos_bound, lminf.attention = sink_mode, pos_bound, kind
            for name, value in recall.items():
                setattr(lminf, name, value)
            if not _lib.lminf_set_next(ctypes.byref(lminf)):
                raise ValueError(last_error())
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if self.context is None:
            message = last_error()
            _lib.lminf_set_next(None)  # llama.cpp may have failed before it took them
            raise ValueError(message)

        self.is_lminf = bool(_lib.lminf_enabled(self.context))
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.n_batch = n_ubatch
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def __enter__(self) -> NativeContext:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.context is not None:
            llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def next_pos(self, seq_id: int, n_tokens: int) -> int:
        if self.is_lminf:
            return int(_lib.lminf_next_pos(self.context, seq_id, n_tokens))
        return int(llama_cpp.llama_memory_seq_pos_max(self.memory, seq_id)) + 1

    def decode(self, *runs: tuple[int, Sequence[int] | npt.NDArray[np.int32]]) -> npt.NDArray[np.float32]:
        """Logits [n_tokens, n_vocab] of one batch that holds a run of tokens for each (sequence, tokens)."""
        batch = llama_cpp.llama_batch_init(self.n_batch * max(1, len(runs)), 0, 1)
        try:
            i = 0
            for seq_id, tokens in runs:
                pos = self.next_pos(seq_id, len(tokens))
                for j, token in enumerate(tokens):
                    batch.token[i], batch.pos[i], batch.logits[i] = int(token), pos + j, 1
                    batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq_id
                    i += 1
            batch.n_tokens = i
            if llama_cpp.llama_decode(self.context, batch):
                raise RuntimeError("llama_decode failed")
            rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), shape=(i, self.n_vocab))
            return np.array(rows, dtype=np.float32)
        finally:
            llama_cpp.llama_batch_free(batch)

    def feed(self, tokens: npt.NDArray[np.int32], seq_id: int = 0) -> npt.NDArray[np.float32]:
        """Logits of any number of tokens, in batches."""
        parts = [self.decode((seq_id, tokens[i : i + self.n_batch])) for i in range(0, len(tokens), self.n_batch)]
        return np.concatenate(parts)

    def token_nll(self, tokens: npt.NDArray[np.int32], seq_id: int = 0) -> npt.NDArray[np.float64]:
        """[n_tokens - 1]: nats of each token but the first."""
        parts = []
        for i in range(0, len(tokens) - 1, self.n_batch):
            block = tokens[i : min(i + self.n_batch, len(tokens) - 1)]
            logits = self.decode((seq_id, block))
            parts.append(nll_from_logits(logits, tokens[i + 1 : i + 1 + len(block)]))
        return np.concatenate(parts)

    def info(self, seq_id: int = 0) -> Info:
        info = Info()
        assert _lib.lminf_get_info(self.context, seq_id, ctypes.byref(info))
        return info

    def rollback(self, stream_pos: int, seq_id: int = 0) -> bool:
        return bool(_lib.lminf_rollback(self.context, seq_id, stream_pos))

    def skip(self, n_tokens: int, seq_id: int = 0) -> bool:
        return bool(_lib.lminf_skip(self.context, seq_id, n_tokens))

    def skip_tokens(self, tokens: npt.NDArray[np.int32], seq_id: int = 0) -> bool:
        return _native.skip(self.context, tokens, seq_id)

    def seq_start(self, stream_pos: int, seq_id: int = 0) -> bool:
        return bool(_lib.lminf_seq_start(self.context, seq_id, stream_pos))

    def set_recall(self, n_recall: int, seq_id: int = 0) -> bool:
        return bool(_lib.lminf_seq_set_recall(self.context, seq_id, n_recall))

    def archive(self, seq_id: int = 0) -> int:
        return int(_native.archive_get(self.context, seq_id))

    def set_archive(self, archive: int, seq_id: int = 0) -> bool:
        return bool(_native.archive_set(self.context, seq_id, archive))

    @staticmethod
    def free_archive(archive: int) -> None:
        _native.archive_free(archive)

    @staticmethod
    def archive_bytes() -> int:
        gc.collect()  # of other tests none is in use
        return int(_native.archive_bytes())

    def set_sinks(self, n_global: int, seq_id: int = 0) -> bool:
        return bool(_lib.lminf_seq_set_sinks(self.context, seq_id, n_global))

    def save(self, seq_id: int = 0, *, partial: bool = False) -> bytes:
        """partial: only what cannot be taken back, the recurrent states."""
        flags = PARTIAL_ONLY * partial
        size = llama_cpp.llama_state_seq_get_size_ext(self.context, seq_id, flags)
        buffer = (ctypes.c_uint8 * size)()
        assert llama_cpp.llama_state_seq_get_data_ext(self.context, buffer, size, seq_id, flags) == size
        return bytes(buffer)

    def load(self, state: bytes, seq_id: int = 0, *, partial: bool = False) -> bool:
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        flags = PARTIAL_ONLY * partial
        return bool(llama_cpp.llama_state_seq_set_data_ext(self.context, buffer, len(state), seq_id, flags))
