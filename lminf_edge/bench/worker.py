"""A process with one llama.cpp library and one model that measures on command.

    LMINF_LIB_PATH=FOLDER python -m lminf_edge.bench.worker

One JSON object per line on stdin, and one on stdout for each:

    {"op": "load", "model": PATH, "n_threads": N, "n_gpu_layers": N, "rpc_servers": [HOST:PORT, ...]}
                                                                       -> {"system", "model", "n_params", "n_bytes"}
    {"op": "open", "id": I, "contender": {...}}                        -> see Context.facts
    {"op": "run", "id": I, "n_tokens": N}                              -> {"seconds"}; N: fewer than the contender says
    {"op": "latency", "id": I, "n_tokens": N}                          -> see Context.latency
    {"op": "close", "id": I}                                           -> {}

Failures are reported as {"error": "one sentence"}.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as bindings
from llama_cpp._logger import set_verbose

from lminf_edge import native, rpc
from lminf_edge.bench.contender import KV_TYPE_NUMBERS, Contender
from lminf_edge.bench.state import stretch, stretch_archive, stretch_lambda
from lminf_edge.cache.archive import N_SEGMENT, Archive
from lminf_edge.errors import UserError
from lminf_edge.model import native_context, native_model

N_BATCH = 512
_N_SLICE = 1000  # tokens decoded, and pieces of steady work done, in turn
_N_PREFILL = 32  # cells that are really computed before a state is stretched
_N_ARCHIVED = 4 * N_SEGMENT + 1  # and with an archive: some of its segments, and what makes their sketches

Tokens = npt.NDArray[np.int32]


class Model:
    """A loaded model. Raises UserError if the library cannot load it."""

    def __init__(self, path: str, n_threads: int, n_gpu_layers: int, rpc_servers: Sequence[str]) -> None:
        settings: dict[str, Any] = {"n_gpu_layers": n_gpu_layers}
        if rpc_servers:
            self._connection = rpc.connect(rpc_servers)  # as long as the process runs
            settings["devices"] = ctypes.addressof(self._connection.devices)
        self.model = native_model(path, **settings)
        self.n_threads = n_threads
        self.n_vocab = bindings.llama_vocab_n_tokens(bindings.llama_model_get_vocab(self.model))

    def facts(self) -> dict[str, Any]:
        description = ctypes.create_string_buffer(128)
        bindings.llama_model_desc(self.model, description, 128)
        return {
            "system": bindings.llama_print_system_info().decode().strip(),
            "model": description.value.decode(),
            "n_params": bindings.llama_model_n_params(self.model),
            "n_bytes": bindings.llama_model_size(self.model),
        }


class Context:
    """A context that stands ready for its contender's test.

    Raises UserError if the library refuses it, RuntimeError if it is not in the state it should be in.
    """

    def __init__(self, model: Model, contender: Contender) -> None:
        self._model, self._contender = model, contender
        self._rng = np.random.default_rng(0)
        self._native = native.load() if contender.is_lambda else None
        lminf, n_ctx = None, contender.n_ctx
        if self._native:
            lminf, n_ctx = native.Params.of(contender.lambda_window(), 1), max(contender.window, N_BATCH)
        self._n_batch = min(N_BATCH, n_ctx)
        self.ctx = native_context(
            model.model,
            lminf,
            n_ctx=n_ctx,
            n_batch=self._n_batch,
            n_ubatch=min(contender.n_ubatch, self._n_batch),
            n_threads=model.n_threads,
            n_threads_batch=model.n_threads,
            type_k=KV_TYPE_NUMBERS[contender.kv_type],
            type_v=KV_TYPE_NUMBERS[contender.kv_type],
            flash_attn_type=int(contender.flash_attn),
            swa_full=False,
        )
        self._memory = bindings.llama_get_memory(self.ctx)
        self._goes_back = not bindings.llama_model_is_hybrid(model.model)
        self._is_prefilled = contender.prefilled
        self._filled = b""  # the state to go back to, where nothing can be rolled back
        self._archive: Archive | None = None  # that goes with it
        try:
            self._fill()
            if contender.depth and not self._goes_back:
                self._filled = self._save()
                self._archive = self._archived()
            self._warm_up()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        bindings.llama_free(self.ctx)

    def facts(self) -> dict[str, Any]:
        """Stream position and, of a Λ cache, the cells in use."""
        if self._native is None:
            return {"stream_pos": bindings.llama_memory_seq_pos_max(self._memory, 0) + 1}
        info = self._native.info(self.ctx)
        return {
            "stream_pos": info.stream_pos,
            "n_sink": info.n_sink,
            "n_window": info.n_window,
            "n_cells": info.n_cells,
        }

    # --- measuring ----------------------------------------------------------------------------------------------------

    def run(self, n_tokens: int | None = None) -> float:
        """Seconds that the test takes, or a test of n_tokens."""
        contender = self._contender
        tokens = self._tokens(n_tokens or contender.n_tokens)
        self._rewind()
        step = 1 if contender.test == "tg" else self._n_batch
        started = time.perf_counter()
        self._decode(tokens, step)
        return time.perf_counter() - started

    def latency(self, n_tokens: int) -> dict[str, Any]:
        """Seconds between tokens of one stream, all but the first few: median, 99th percentile, maximum, total.

        `control` says the same of as many pieces of work in one thread that are always the same and take about as long,
        in turn with the tokens: what the machine itself adds.
        """
        tokens = self._tokens(n_tokens)
        before = self._native.info(self.ctx).n_rebase if self._native else 0

        def decode(i: int) -> None:
            self._decode(tokens[i : i + 1], 1)

        n_first = max(1, min(n_tokens // 10, _N_SLICE))  # to learn how much work takes as long
        work = _steady_work(float(np.median(_time_each(decode, range(n_first)))))
        seconds, control = np.empty(n_tokens - n_first), np.empty(n_tokens - n_first)
        for start in range(n_first, n_tokens, _N_SLICE):
            part = range(start, min(start + _N_SLICE, n_tokens))
            where = slice(part.start - n_first, part.stop - n_first)
            seconds[where] = _time_each(decode, part)
            control[where] = _time_each(lambda _: work(), part)
        return {
            **_summary(seconds),
            "n_rebase": self._native.info(self.ctx).n_rebase - before if self._native else 0,
            "control": _summary(control),
        }

    def _tokens(self, n_tokens: int) -> Tokens:
        return self._rng.integers(0, self._model.n_vocab, n_tokens, dtype=np.int32)

    def _decode(self, tokens: Tokens, step: int) -> None:
        """Processes tokens, contiguous int32 (n_tokens,), `step` at a time, and waits for the last logits."""
        first = tokens.ctypes.data
        for start in range(0, len(tokens), step):
            n = min(step, len(tokens) - start)
            pointer = ctypes.cast(first + 4 * start, ctypes.POINTER(ctypes.c_int32))
            result = bindings.llama_decode(self.ctx, bindings.llama_batch_get_one(pointer, n))
            if result != 0:
                raise RuntimeError(f"llama_decode returned {result}.")
        bindings.llama_synchronize(self.ctx)

    def _rewind(self) -> None:
        """Removes what an earlier test added. A full Λ cache simply continues: it stays full."""
        depth = self._contender.depth
        if self._native is None:
            done = bindings.llama_memory_seq_rm(self._memory, 0, depth, -1)
        elif self._native.info(self.ctx).stream_pos == depth:
            done = True
        else:
            info = self._native.info(self.ctx)
            done = info.n_window == info.n_cells or self._native.rollback(self.ctx, depth)
        if not done and self._filled:
            self._restore(bytearray(self._filled))
            done = self._archive is None or self._archive.give(self.ctx, 0)
        if not done:
            raise RuntimeError(f"The cache cannot go back to {depth} tokens.")

    def _warm_up(self) -> None:
        """Touches all memory that the test will touch, and sees that the model computes numbers."""
        self.run(2 if self._contender.test == "tg" and self._contender.n_tokens > 2 else None)
        logits = np.ctypeslib.as_array(bindings.llama_get_logits_ith(self.ctx, -1), shape=(self._model.n_vocab,))
        if not np.isfinite(logits).all():
            raise RuntimeError("The model's logits are not finite numbers.")
        self._rewind()

    # --- getting there ------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        contender, depth = self._contender, self._contender.depth
        n_recall = contender.recall.n_recall if contender.cache == "recall" else 0
        n_computed = max(_N_PREFILL, contender.n_global, _N_ARCHIVED if n_recall else 0)
        if depth == 0:
            return
        if self._native and n_recall:
            self._native.set_recall(self.ctx, 0)  # what is not measured takes less time
        if contender.prefilled or depth <= n_computed:
            self._decode(self._tokens(depth), self._n_batch)
        else:
            self._decode(self._tokens(n_computed), self._n_batch)
            state, archive = self._save(), self._archived()
            try:
                stretched = stretch_lambda(state, depth) if self._native else stretch(state, depth)
            except UserError:  # a kind of cache whose states are laid out otherwise
                self._is_prefilled = True
                self._decode(self._tokens(depth - n_computed), self._n_batch)
            else:
                self._restore(stretched)
                if archive is not None:
                    self._stretch_archive(archive)
        if self._native and n_recall:
            self._native.set_recall(self.ctx, n_recall)
        self._check_filled()

    def _archived(self) -> Archive | None:
        """What the sequence can recall; None without recall."""
        if self._native is None or self._contender.cache != "recall":
            return None
        return Archive(self._native, self._native.archive_get(self.ctx, 0), (0, 0))

    def _stretch_archive(self, archive: Archive) -> None:
        """Lets the sequence recall `depth` tokens, or as many as it may, made up from these."""
        assert self._native is not None
        depth = self._contender.depth
        first = depth - min(depth, self._native.parts(self.ctx).n_archive)
        made = Archive(self._native, self._native.archive_new(self.ctx), archive.types)
        stretch_archive(archive, made, first, depth, self._model.n_vocab)
        if not made.give(self.ctx, 0) or self._native.info(self.ctx).n_archived != depth - first:
            raise RuntimeError(f"The archive does not hold {depth - first} tokens.")

    def _check_filled(self) -> None:
        contender, depth = self._contender, self._contender.depth
        first = bindings.llama_memory_seq_pos_min(self._memory, 0)
        last = bindings.llama_memory_seq_pos_max(self._memory, 0)
        if self._native is None:
            is_right = last == depth - 1 and (self._is_prefilled or first == 0)
        else:
            info = self._native.info(self.ctx)
            n_cells = min(depth, info.n_cells)
            is_right = info.stream_pos == depth and info.n_sink == min(depth, contender.n_global)
            # after prefill some cells may be free again: a batch takes its cells all at once
            is_right = is_right and (self._is_prefilled or info.n_window == last - first + 1 == n_cells)
        if not is_right:
            raise RuntimeError(f"The cache does not hold a stream of {depth} tokens.")

    def _save(self) -> bytes:
        size = bindings.llama_state_seq_get_size(self.ctx, 0)
        buffer = (ctypes.c_uint8 * size)()
        if bindings.llama_state_seq_get_data(self.ctx, buffer, size, 0) != size:
            raise RuntimeError("The state of the sequence cannot be read.")
        return bytes(buffer)

    def _restore(self, state: bytearray) -> None:
        bindings.llama_memory_clear(self._memory, False)
        buffer = (ctypes.c_uint8 * len(state)).from_buffer(state)
        with native.captured_errors() as errors:
            n_read = bindings.llama_state_seq_set_data(self.ctx, buffer, len(state), 0)
        if n_read != len(state):
            raise RuntimeError(errors[0] if errors else "The state of the sequence cannot be restored.")


def _time_each(do: Callable[[int], object], numbers: Sequence[int]) -> npt.NDArray[np.float64]:
    """Seconds that do(i) takes for each of these numbers, from the end of the one before."""
    ends = np.empty(len(numbers) + 1)
    ends[0] = time.perf_counter()
    for at, i in enumerate(numbers, 1):
        do(i)
        ends[at] = time.perf_counter()
    return np.diff(ends)


def _summary(seconds: npt.NDArray[np.float64]) -> dict[str, float]:
    return {
        "n_tokens": len(seconds),
        "median": float(np.median(seconds)),
        "p99": float(np.quantile(seconds, 0.99)),
        "max": float(seconds.max()),
        "seconds": float(seconds.sum()),
    }


def _steady_work(seconds: float) -> Callable[[], object]:
    """Something that takes about this long and is always the same: hashing memory that fits the processor's cache."""
    sample = bytes(1 << 18)
    taken = float(np.median(_time_each(lambda _: hashlib.sha256(sample), range(20))))
    work = bytes(max(1, round(len(sample) * seconds / taken)))
    return lambda: hashlib.sha256(work)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends this process as well, without a traceback
    # the library's own output must not get between the answers
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    set_verbose(False)
    model: Model | None = None
    contexts: dict[int, Context] = {}

    def answer(op: str, request: dict[str, Any]) -> dict[str, Any]:
        nonlocal model
        if op == "load":
            model = Model(request["model"], request["n_threads"], request["n_gpu_layers"], request["rpc_servers"])
            return model.facts()
        assert model is not None
        number = request["id"]
        if op == "open":
            contexts[number] = Context(model, Contender.from_json(request["contender"]))
            return contexts[number].facts()
        if op == "run":
            return {"seconds": contexts[number].run(request.get("n_tokens"))}
        if op == "latency":
            return contexts[number].latency(request["n_tokens"])
        contexts.pop(number).close()
        return {}

    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = answer(request.pop("op"), request)
        except (UserError, MemoryError, ImportError) as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), file=answers)


if __name__ == "__main__":
    main()
