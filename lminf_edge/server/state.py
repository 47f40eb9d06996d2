"""State that all routes share."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar, cast

import llama_cpp
import numpy as np
from fastapi import Request

from lminf_edge.llama import Llama
from lminf_edge.server.errors import ApiError, engine_stopped
from lminf_edge.server.settings import ENDLESS, Settings
from lminf_edge.server.stored import StoredResponses
from lminf_edge.text.service import TextService

log = logging.getLogger("lminf_edge.server")

T = TypeVar("T")


def give_back_memory() -> None:
    """Returns freed memory to the system: glibc keeps it per thread, and a long text may leave gigabytes."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


class Embedder:
    """Embeddings from a context of its own, one text at a time."""

    def __init__(self, llm: Llama) -> None:
        """`llm` is loaded with embedding=True."""
        self._llm = llm
        self._lock = threading.Lock()

    def embed(
        self, inputs: Sequence[str | list[int]], is_cancelled: Callable[[], bool] = lambda: False
    ) -> tuple[list[list[float]], int]:
        """A vector (n_embd,) for each text, and the number of tokens in all; those so far once it is cancelled.

        Raises ApiError for a text too long.
        """
        vectors, n_tokens = [], 0
        for each in inputs:
            if is_cancelled():
                break
            with self._lock:
                vector, n = self._embed(each)
            vectors.append(vector)
            n_tokens += n
        return vectors, n_tokens

    def _embed(self, text: str | list[int]) -> tuple[list[float], int]:
        """A vector of length 1, and the number of tokens."""
        llm, n_most = self._llm, self._llm.n_ctx()
        if not isinstance(text, str):
            bos = [llm.token_bos()]
            text = llm.detokenize(text[1:] if text[:1] == bos else text).decode("utf-8", errors="replace")
        n_tokens = len(llm.tokenize(text.encode("utf-8")))
        if not text or n_tokens > n_most:
            raise ApiError(400, f"input: a text to embed has 1 to {n_most} tokens, not {n_tokens}.", param="input")
        vector = np.asarray(llm.embed(text), dtype=np.float64)
        if vector.ndim == 2:  # a vector for each token: their mean stands for the text
            vector = vector.mean(axis=0)
        return (vector / (np.linalg.norm(vector) or 1.0)).tolist(), n_tokens


class ServerState:
    """The service, the settings, and the worker threads."""

    def __init__(self, service: TextService, settings: Settings, embedder: Embedder | None) -> None:
        self.service, self.settings, self.embedder = service, settings, embedder
        self.engine = service.engine
        store = self.engine.store
        self.stored = StoredResponses(store.folder, settings.response_bytes, store.failures.note)
        self.started = time.time()
        self.stopping = asyncio.Event()  # set at shutdown
        self.parsing = asyncio.Lock()  # of a long body: it takes many times its bytes for a while
        self._threads = ThreadPoolExecutor(settings.max_requests, thread_name_prefix="lminf-answer")
        self._working: set[Future[Any]] = set()

    @classmethod
    def of(cls, request: Request) -> ServerState:
        return cast(ServerState, request.app.state.server)

    def submit(self, work: Callable[[], T], is_long: bool = False) -> Future[T]:
        """Runs `work` in a worker thread. Raises ApiError if all of them are busy."""

        def run() -> T:
            try:
                return work()
            finally:
                give_back_memory()

        if not self.engine.is_alive:
            raise engine_stopped()
        if len(self._working) >= self.settings.max_requests:
            raise ApiError(503, "The server is busy: try again later.", headers={"Retry-After": "1"})
        future = self._threads.submit(run if is_long else work)
        self._working.add(future)
        future.add_done_callback(self._working.discard)
        return future

    def close(self, seconds: float) -> bool:
        """Accepts no more work; returns whether all of it ended within `seconds`."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        return not wait(list(self._working), timeout=seconds).not_done

    @property
    def llm(self) -> llama_cpp.Llama:
        return self.service.llm

    def model_card(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        engine = self.engine
        return {
            "id": self.settings.model_name,
            "object": "model",
            "type": "model",
            "display_name": self.settings.model_name,
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "created": int(self.started),
            "owned_by": "lminf-edge",
            "name": self.settings.model_name,
            "context_length": ENDLESS,
            "max_model_len": ENDLESS,
            "meta": {
                "n_vocab": self.llm.n_vocab(),
                "n_embd": self.llm.n_embd(),
                "n_ctx_train": self.llm._model.n_ctx_train(),
            },
            "lminf": {"sink": engine.n_sinks, "window": engine.n_local, "max_distance": engine.max_distance},
        }

    def log_messages(self, messages: Any) -> None:
        if self.settings.log_messages:
            log.info("%s", json.dumps(messages, ensure_ascii=False))
