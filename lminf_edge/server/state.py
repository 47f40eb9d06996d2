"""State that all routes share."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar, cast

import llama_cpp
from fastapi import Request

from lminf_edge.engine.engine import Engine
from lminf_edge.server.budget import Budget
from lminf_edge.server.embedder import Embedder
from lminf_edge.server.errors import ApiError, engine_stopped
from lminf_edge.server.settings import ENDLESS, Settings
from lminf_edge.server.stored import StoredResponses
from lminf_edge.text.service import TextService

log = logging.getLogger("lminf_edge.server")

_M_ARENA_MAX = -8  # of malloc.h
N_BODIES = 4  # requests of the largest size held at a time

T = TypeVar("T")


def give_back_memory() -> None:
    """Returns freed memory to the system: glibc keeps it per thread, and a long text may leave gigabytes."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def prepare_process() -> None:
    """For a process that serves: to be called before there are threads.

    Threads allocate from one heap: of glibc's one per thread each keeps what another could use. With this and one
    budget for texts and checkpoints, half an hour of mixed load adds 2 % to what is taken after five minutes, not 6.

    A thread that waits for the GIL has it after 0.1 ms, not Python's 5: for each step the engine's thread takes it
    dozens of times. Beside a request whose JSON is large that made 300 ms of 20; alone or among 8 streams nothing is
    slower for it (benchmarks/server_speed.py, `hostile`).
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    sys.setswitchinterval(1e-4)


def freeze_heap() -> None:
    """To be called once all is loaded: Python's garbage collector held everybody up for 50 ms to look at it again."""
    gc.collect()
    gc.freeze()


class ServerState:
    """The service, the settings, and the worker threads."""

    def __init__(self, service: TextService | None, settings: Settings, embedder: Embedder | None) -> None:
        """Without a service there are embeddings alone."""
        self.settings, self.embedder = settings, embedder
        self._service = service
        store = None if service is None else service.engine.store
        folder, note = (None, lambda _: None) if store is None else (store.folder, store.failures.note)
        self.budget = Budget(N_BODIES * settings.max_body)
        self.stored = StoredResponses(folder, settings.response_bytes, note)
        if store is not None and folder is None:  # in memory, of the same budget
            beside = store.bytes_beside
            store.bytes_beside = lambda: beside() + self.stored.n_bytes
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

        if not self.is_alive:
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
    def generates(self) -> bool:
        return self._service is not None

    @property
    def service(self) -> TextService:
        """Raises ApiError if there are embeddings alone."""
        if self._service is None:
            raise ApiError(
                501, "This server makes embeddings or rankings alone: it generates no text.", "no_generation"
            )
        return self._service

    @property
    def engine(self) -> Engine:
        """Raises as `service` does."""
        return self.service.engine

    @property
    def is_alive(self) -> bool:
        return self._service is None or self._service.engine.is_alive

    @property
    def llm(self) -> llama_cpp.Llama:
        if self._service is None:
            assert self.embedder is not None
            return self.embedder.llm
        return self._service.llm

    def model_card(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        more: dict[str, Any] = {}
        if self._service is not None:
            engine = self._service.engine
            more = {"lminf": {"sink": engine.n_sinks, "window": engine.n_local, "max_distance": engine.max_distance}}
        n_ctx = ENDLESS if self.embedder is None or self._service is not None else self.embedder.n_most
        return {
            "id": self.settings.model_name,
            "object": "model",
            "type": "model",
            "display_name": self.settings.model_name,
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "created": int(self.started),
            "owned_by": "lminf-edge",
            "aliases": list(self.settings.aliases),
            "tags": list(self.settings.tags),
            "name": self.settings.model_name,
            "context_length": n_ctx,
            "max_model_len": n_ctx,
            "meta": {
                "n_vocab": self.llm.n_vocab(),
                "n_embd": self.llm.n_embd(),
                "n_ctx_train": self.llm._model.n_ctx_train(),
            },
            **more,
        }

    def log_messages(self, messages: Any) -> None:
        if self.settings.log_messages:
            log.info("%s", json.dumps(messages, ensure_ascii=False))
