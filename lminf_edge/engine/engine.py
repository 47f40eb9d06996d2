"""The thread around the scheduler: takes requests from any thread and returns their tokens."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

from lminf_edge.cache.store import CheckpointStore
from lminf_edge.config import Window
from lminf_edge.engine.request import End, Output, PromptPart, Request
from lminf_edge.engine.scheduler import Counters, Scheduler
from lminf_edge.engine.slot import Slot

log = logging.getLogger("lminf_edge.engine")

T = TypeVar("T")


class Engine:
    """Owns a scheduler and steps it while there is work. All methods may be called from any thread."""

    def __init__(self, scheduler: Scheduler, on_failure: Callable[[], None] | None = None) -> None:
        """`on_failure` is called by the thread when it fails and stops."""
        self.model = scheduler.model
        self.scheduler = scheduler
        self.on_failure = on_failure
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        scheduler.notify = self._notify
        self._thread = threading.Thread(target=self._run, name="lminf-engine", daemon=True)
        self._thread.start()

    # --- requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises UserError for an invalid prompt or sampling parameters, RuntimeError once the engine is closed.
        """
        self.scheduler.prepare(request)
        self._command(lambda: self.scheduler.submit(request))

    def stream(self, request: Request) -> Generator[Output, None, None]:
        """The tokens of a submitted request, as they come.

        Raises RequestCancelled, or what went wrong. Closing the iterator, or its end, finishes the request: a token
        that was taken but after which no other was asked for has not been processed, and those generated ahead are
        taken back.
        """
        n_taken = 0
        try:
            while True:
                output = self._next(request)
                if output is End.END:
                    return
                assert isinstance(output, Output)
                n_taken += 1
                yield output
        finally:
            self._finish(request, n_taken)

    def prompt_logits(self, request: Request) -> Generator[PromptPart, None, None]:
        """The prompt of a submitted request with `wants_prompt_logits`, part by part; raises as `stream` does."""
        try:
            while (part := self._next(request)) is not End.END:
                assert isinstance(part, PromptPart)
                yield part
        finally:
            self._finish(request, None)

    def cancel(self, request: Request) -> None:
        """Ends a request in any phase; whoever waits for its next token gets RequestCancelled."""
        self._command(lambda: self.scheduler.cancel(request), if_closed=None)

    def _next(self, request: Request) -> Output | PromptPart | End:
        output = request.outputs.get()
        if isinstance(output, BaseException):
            raise output
        self._notify()  # there is room in the queue
        return output

    def _finish(self, request: Request, n_taken: int | None) -> None:
        self._command(lambda: self.scheduler.finish(request, n_taken), if_closed=None).result()

    # --- the rest -----------------------------------------------------------------------------------------------------

    def call(self, function: Callable[[], T]) -> T:
        """Runs `function` between two batches, in the thread that owns the context; returns its result."""
        return self._command(function).result()

    def close(self) -> None:
        """Cancels all requests, saves all conversations and ends the thread. The model stays open."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether requests are served."""
        return self._thread.is_alive() and not self._closing

    @property
    def slots(self) -> list[Slot]:
        return self.scheduler.slots

    @property
    def store(self) -> CheckpointStore:
        return self.scheduler.store

    @property
    def counters(self) -> Counters:
        return self.scheduler.counters

    @property
    def window(self) -> Window:
        """The attention window of a conversation."""
        return self.scheduler.window

    @property
    def n_sinks(self) -> int:
        """Sinks of a conversation whose request does not say."""
        return self.scheduler.n_sinks

    @property
    def max_sinks(self) -> int:
        """Sinks that a conversation can have, at most."""
        return self.window.n_global

    @property
    def n_waiting(self) -> int:
        """Requests that have no slot yet."""
        return self.scheduler.n_waiting

    @property
    def n_busy(self) -> int:
        """Slots at work."""
        return self.scheduler.n_busy

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _command(self, function: Callable[[], T], **if_closed: None) -> Future[T]:
        """Has the thread run `function` before its next batch. Once the engine is closed, raises RuntimeError or, with
        `if_closed`, returns a future of None."""
        result: Future[Any] = Future()
        with self._wake:
            if not self._closing:
                self._commands.append((function, result))
                self._wake.notify()
                return result
        if not if_closed:
            raise RuntimeError("The engine has been closed.")
        self._thread.join()
        result.set_result(None)
        return result

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(self._has_work, timeout=self.scheduler.seconds_until_save())
                    if self._closing:
                        break
                    commands, self._commands = self._commands, deque()
                for function, result in commands:
                    self._answer(function, result)
                self.scheduler.step()
        except BaseException:
            log.critical("the engine cannot go on", exc_info=True)
            if self.on_failure is not None:
                self.on_failure()
            raise
        finally:
            with self._wake:
                self._closing = True
                commands, self._commands = self._commands, deque()
            for function, result in commands:  # a request that was queued last is cancelled like all others
                self._answer(function, result)
            self.scheduler.close()

    def _has_work(self) -> bool:
        return bool(self._closing or self._commands or self.scheduler.has_work())

    @staticmethod
    def _answer(function: Callable[[], Any], result: Future[Any]) -> None:
        try:
            result.set_result(function())
        except Exception as error:
            result.set_exception(error)
