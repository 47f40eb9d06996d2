"""From a thread that writes an answer to a client that reads it, and back: whoever hangs up stops the work."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from lminf_edge.engine.turn import Progress, TurnCancelled
from lminf_edge.engine.voice import Voice
from lminf_edge.server.errors import ApiError, error_body

log = logging.getLogger("lminf_edge.server")

T = TypeVar("T")

MAX_UNREAD = 10_000  # events that wait for a client that does not read

_PROGRESS_SECONDS = 0.1  # between two reports
_END = object()


class Hung(Exception):
    """The client has gone."""


def as_api_error(error: BaseException) -> ApiError:
    """What the client is told about a failure."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError):
        return ApiError(400, str(error) or "The request cannot be answered.")
    if isinstance(error, TurnCancelled):
        return ApiError(503, "The server is shutting down.")
    log.error("an answer could not be made", exc_info=error)
    return ApiError(500, "The answer could not be made: the server's log says why.")


async def until_gone(request: Request) -> None:
    """Returns when the client hangs up. Only for a request whose body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def in_thread(threads: ThreadPoolExecutor, request: Request, voice: Voice, work: Callable[[], T]) -> T:
    """What `work` returns, done in a thread; cancelled if the client hangs up, then Hung is raised."""
    working = asyncio.get_running_loop().run_in_executor(threads, work)
    working.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be there to ask for it
    gone = asyncio.ensure_future(until_gone(request))
    try:
        waiting: set[asyncio.Future[Any]] = {working, gone}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            voice.cancel()
            await asyncio.wait({working})
            raise Hung
        return working.result()
    finally:
        gone.cancel()
        voice.cancel()


class ProgressReporter:
    """Passes on how far a prompt has been read, now and then, in llama.cpp's form."""

    def __init__(self, show: Callable[[dict[str, Any]], None]) -> None:
        self._show = show
        self._started = self._shown = time.perf_counter()

    def __call__(self, progress: Progress) -> None:
        now = time.perf_counter()
        n_done = progress.n_cached + progress.n_read
        if now - self._shown >= _PROGRESS_SECONDS or n_done >= progress.n_prompt:
            self._shown = now
            self._show(
                {
                    "total": progress.n_prompt,
                    "cache": progress.n_cached,
                    "processed": n_done,
                    "time_ms": round(1000 * (now - self._started), 1),
                }
            )


class EventStream:
    """The events of one answer, made by an iterator that runs in a thread."""

    def __init__(self, threads: ThreadPoolExecutor, request: Request, ping_seconds: float) -> None:
        self._threads, self._request, self._ping_seconds = threads, request, ping_seconds
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, event: Any) -> None:
        """From any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def respond(
        self, voice: Voice, events: Callable[[], Iterator[dict[str, Any]]], done: str | None
    ) -> StreamingResponse:
        """Server-sent events: what `events` yields, then `done`.

        What goes wrong before the first event comes is raised, as an ApiError; afterwards it is an event.
        """

        def run() -> None:
            try:
                for event in events():
                    self.put(event)
                    if self._queue.qsize() > MAX_UNREAD:
                        raise ApiError(500, "The client does not read its answer.")
                self.put(_END)
            except BaseException as error:
                self.put(error)

        self._threads.submit(run)
        first: list[Any] = []
        try:
            # a wrong request is known at once, and gets a status of its own; a long prompt is no reason to wait
            first.append(await asyncio.wait_for(self._queue.get(), timeout=min(0.5, self._ping_seconds)))
        except asyncio.TimeoutError:
            pass
        except asyncio.CancelledError:
            voice.cancel()
            raise
        if first and isinstance(first[0], BaseException):
            voice.cancel()
            raise as_api_error(first[0])

        async def body() -> AsyncIterator[str]:
            gone = asyncio.ensure_future(until_gone(self._request))
            try:
                async for event in self._events(first, gone):
                    if event is None:
                        yield ": keep-alive\n\n"
                    elif isinstance(event, BaseException):
                        error = as_api_error(event)
                        yield _event(error_body(error.status, error.message, error.code, error.param))
                    else:
                        yield _event(event)
                if done is not None:
                    yield f"data: {done}\n\n"
            finally:
                voice.cancel()
                gone.cancel()

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(body(), media_type="text/event-stream", headers=headers)

    async def _events(self, first: list[Any], gone: asyncio.Future[None]) -> AsyncIterator[Any]:
        """Events as they come, None whenever there was none for a while; ends when the client is gone."""
        next_event: asyncio.Future[Any] | None = None
        while not gone.done():
            if first:
                event = first.pop()
            else:
                next_event = next_event or asyncio.ensure_future(self._queue.get())
                waiting: set[asyncio.Future[Any]] = {next_event, gone}
                await asyncio.wait(waiting, timeout=self._ping_seconds, return_when=asyncio.FIRST_COMPLETED)
                if not next_event.done():
                    yield None
                    continue
                event, next_event = next_event.result(), None
            if event is _END:
                return
            yield event
            if isinstance(event, BaseException):
                return


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
