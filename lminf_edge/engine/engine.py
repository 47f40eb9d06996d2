"""The thread around the scheduler: takes requests from any thread and returns their tokens."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

from lminf_edge.engine.request import End, Output, PromptPart, Request
from lminf_edge.engine.scheduler import Scheduler

log = logging.getLogger("lminf_edge.engine")

T = TypeVar("T")


class EngineClosedError(RuntimeError):
    """The engine was closed, or has failed: it takes no more requests."""

    def __init__(self) -> None:
        super().__init__("The engine has been closed.")


class Engine:
    """Owns a scheduler and steps it while there is work. All methods may be called from any thread.

    request = Request(np.array(tokens, dtype=np.int32), max_tokens=20)
    engine.submit(request)
    for output in engine.stream(request):
        print(output.token)
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.model, self.store = scheduler.model, scheduler.store
        self.slots, self.counters = scheduler.slots, scheduler.counters
        self.window = scheduler.window
        self.parts = scheduler.model.parts
        # None: no window, the model is purely recurrent
        self.n_local = None if scheduler.model.is_constant else scheduler.window.n_local
        self.max_distance = None if scheduler.model.is_constant else scheduler.window.max_distance
        self.n_sinks = scheduler.n_sinks  # of a conversation whose request does not say
        self.max_sinks = scheduler.window.n_global  # that a conversation can have
        self.n_recall = scheduler.window.n_recall  # tokens that each layer recalls, at most
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        scheduler.notify = self._notify
        self._thread = threading.Thread(target=self._run, name="lminf-engine", daemon=True)
        self._thread.start()

    # --- requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises UserError for an invalid prompt or sampling parameters, EngineClosedError.
        """
        self.scheduler.prepare(request)
        self._command(lambda: self.scheduler.submit(request))

    def stream(self, request: Request) -> Generator[Output, None, None]:
        """The tokens of a submitted request, as they come.

        Raises RequestCancelled, or what went wrong. Closing the iterator, or its end, finishes the request: a token
        that was taken but after which no other was asked for has not been processed, and those generated ahead are
        taken back.
        """
        return self._outputs(request, Output)

    def prompt_logits(self, request: Request) -> Generator[PromptPart, None, None]:
        """The prompt of a submitted request with `wants_prompt_logits`, part by part; raises as `stream` does."""
        return self._outputs(request, PromptPart)

    def _outputs(self, request: Request, kind: type[T]) -> Generator[T, None, None]:
        n_taken = 0
        try:
            while True:
                request.n_asked += 1
                self._notify()  # there is room in the queue
                output = request.outputs.get()
                if output is End.END:
                    return
                if isinstance(output, BaseException):
                    raise output
                assert isinstance(output, kind)
                n_taken += 1
                yield output
        finally:
            try:
                finished = self._command(lambda: self.scheduler.finish(request, n_taken))
            except EngineClosedError:
                self._thread.join()
            else:
                finished.result()

    def cancel(self, request: Request) -> None:
        """Ends a request in any phase; whoever waits for its next token gets RequestCancelled."""
        with contextlib.suppress(EngineClosedError):  # and so is the request
            self._command(lambda: self.scheduler.cancel(request))

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
    def n_waiting(self) -> int:
        """Requests that have no slot yet."""
        return self.scheduler.n_waiting

    @property
    def n_busy(self) -> int:
        """Slots at work."""
        return self.scheduler.n_busy

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _command(self, function: Callable[[], T]) -> Future[T]:
        """Has the thread run `function` before its next batch. Raises EngineClosedError."""
        result: Future[T] = Future()
        with self._wake:
            if self._closing:
                raise EngineClosedError
            self._commands.append((function, result))
            self._wake.notify()
        return result

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    # what is due changes with what is asked for
                    while not self._has_work() and (seconds := self.scheduler.seconds_until_due()) != 0:
                        self._wake.wait(seconds)
                    if self._closing:
                        break
                self._run_commands()
                self.scheduler.step()
        except BaseException:
            log.critical("the engine cannot go on", exc_info=True)
            raise
        finally:
            with self._wake:
                self._closing = True
            self._run_commands()
            self.scheduler.close()

    def _has_work(self) -> bool:
        return bool(self._closing or self._commands or self.scheduler.has_work())

    def _run_commands(self) -> None:
        while self._commands:
            function, result = self._commands.popleft()
            try:
                result.set_result(function())
            except Exception as error:
                result.set_exception(error)
