"""Between a worker thread that generates and the client: server-sent events, keep-alives, cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lminf_edge.engine.request import Request as EngineRequest
from lminf_edge.engine.request import RequestCancelled
from lminf_edge.server.errors import ApiError, as_api_error, shutting_down
from lminf_edge.server.responses import progress_chunk
from lminf_edge.server.state import ServerState
from lminf_edge.text.service import Exchange

T = TypeVar("T")

MAX_UNREAD = 1 << 20  # bytes of events that wait for a slow client; then generation waits

_FIRST_SECONDS = 0.5  # for an error to get a status of its own
_READY = object()
_END = object()


def as_json(value: Any) -> str:
    """Raises ValueError for what JSON has no word for: NaN and infinity."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def encoded(value: Any) -> Response:
    """A JSON response, encoded in the calling thread, off the event loop."""
    return Response(as_json(value).encode("utf-8"), media_type="application/json")


def _gone() -> Response:
    """The response for a client that has hung up."""
    return Response(status_code=499)


class Waiting:
    """Waits for futures until the client hangs up or the server shuts down."""

    def __init__(self, request: Request) -> None:
        """Only for a request whose body has been read."""
        self._request = request
        self._gone = asyncio.ensure_future(self._until_gone())
        self._stopping = asyncio.ensure_future(ServerState.of(request).stopping.wait())

    async def _until_gone(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass

    @property
    def is_gone(self) -> bool:
        """Whether the client has hung up."""
        return self._gone.done()

    async def __call__(self, wanted: asyncio.Future[Any], timeout: float | None = None) -> bool:
        """Whether `wanted` is done; False after a time-out or if the client is gone. Raises ApiError at shutdown."""
        if not (wanted.done() or self._gone.done() or self._stopping.done()):
            futures: set[asyncio.Future[Any]] = {wanted, self._gone, self._stopping}
            await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not wanted.done() and self._stopping.done():
            raise shutting_down()
        return wanted.done()

    def close(self) -> None:
        self._gone.cancel()
        self._stopping.cancel()


async def in_thread(
    request: Request, work: Callable[[], Response], cancel: Callable[[], None] = lambda: None
) -> Response:
    """What `work`, run in a thread, responds. `cancel` is called at the end, or when the client hangs up."""
    working = asyncio.wrap_future(ServerState.of(request).submit(work, request.state.is_long))
    # so that an exception nobody retrieves is no warning
    working.add_done_callback(lambda done: done.cancelled() or done.exception())
    waiting = Waiting(request)
    try:
        return working.result() if await waiting(working) else _gone()
    except Exception as error:
        raise as_api_error(error) from error
    finally:
        waiting.close()
        cancel()


ProgressChunk = Callable[[EngineRequest, float], dict[str, Any]]  # of a request and the seconds since it came


class ProgressReporter:
    """Reports prefill progress before the prompt and after each batch that had a part of it."""

    def __init__(self, show: Callable[[dict[str, Any]], None], chunk: ProgressChunk = progress_chunk) -> None:
        self._show, self._chunk = show, chunk
        self._started = time.perf_counter()

    def __call__(self, request: EngineRequest) -> None:
        self._show(self._chunk(request, time.perf_counter() - self._started))


@dataclass(frozen=True)
class Wire:
    """How an API writes its events.

    error       an error, as the event that comes after the one with this sequence number, None if it is the first
    is_typed    each event has a type, which is also its name
    keep_alive  what is sent while there is nothing else
    """

    error: Callable[[ApiError, int | None], dict[str, Any]] = lambda error, _: error.body()
    is_typed: bool = False
    keep_alive: bytes = b": keep-alive\n\n"

    def sent(self, event: dict[str, Any]) -> bytes:
        name = f"event: {event['type']}\n" if self.is_typed else ""
        return f"{name}data: {as_json(event)}\n\n".encode()


@dataclass(frozen=True)
class _Encoded:
    data: bytes
    number: int | None  # its sequence number, where an API counts events


class EventStream:
    """The events of one response, produced by an iterator in a worker thread."""

    def __init__(self, request: Request, wire: Wire | None = None, ping_seconds: int | None = None) -> None:
        """ping_seconds between keep-alives, if that is more than 0; else the server's."""
        self._request, self._state, self._wire = request, ServerState.of(request), wire or Wire()
        self._ping_seconds = self._state.settings.ping_seconds
        if ping_seconds is not None and ping_seconds > 0:
            self._ping_seconds = float(ping_seconds)
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._next: asyncio.Future[Any] | None = None
        self._n_unread = 0  # bytes of events in the queue
        self._is_over = False
        self._changed = threading.Condition()

    def put(self, event: dict[str, Any]) -> None:
        """From any thread."""
        encoded = _Encoded(self._wire.sent(event), event.get("sequence_number"))
        with self._changed:
            self._n_unread += len(encoded.data)
        self._hand_over(encoded)

    def _hand_over(self, item: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is listening
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    def _wait_for_reader(self) -> None:
        """Raises RequestCancelled once the response is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._n_unread <= MAX_UNREAD or self._is_over)
            if self._is_over:
                raise RequestCancelled

    async def respond(
        self,
        exchange: Exchange,
        prepare: Callable[[], T],
        chunks: Callable[[T], Iterator[dict[str, Any]]],
        done: str | None,
    ) -> Response:
        """Server-sent events: what `chunks` yields from what `prepare` returns, then `done`.

        An error before the first event is raised as an ApiError; later ones become events.
        """

        def run() -> None:
            try:
                prepared = prepare()
                self._hand_over(_READY)
                for event in chunks(prepared):
                    self.put(event)
                    self._wait_for_reader()
                self._hand_over(_END)
            except BaseException as error:
                self._hand_over(error)

        self._state.submit(run, self._request.state.is_long)
        ping_seconds = self._ping_seconds
        waiting = Waiting(self._request)

        def finish() -> None:
            exchange.cancel()
            waiting.close()
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

        first: list[_Encoded] = []
        try:
            # an invalid request fails at once, and gets its own status; a long prompt must not delay the head
            for seconds in (ping_seconds, min(_FIRST_SECONDS, ping_seconds)):
                event = await self._event(waiting, seconds)
                if isinstance(event, BaseException):
                    raise as_api_error(event)
                if event is not None and event is not _READY:
                    first.append(event)
        except BaseException:
            finish()
            raise
        if waiting.is_gone:
            finish()
            return _gone()

        async def body() -> AsyncIterator[bytes]:
            last: int | None = None
            while not waiting.is_gone:
                try:
                    event = first.pop() if first else await self._event(waiting, ping_seconds)
                except ApiError as error:
                    event = error
                if event is _END:
                    break
                if isinstance(event, BaseException):
                    yield self._wire.sent(self._wire.error(as_api_error(event), last))
                    break
                if event is not _READY:
                    yield self._wire.keep_alive if event is None else event.data
                    last = last if event is None else event.number
            if done is not None:
                yield f"data: {done}\n\n".encode()

        return _Events(body(), finish)

    async def _event(self, waiting: Waiting, timeout: float) -> Any:
        """The next event; None after a time-out or if the client is gone. Raises ApiError at shutdown."""
        self._next = self._next or asyncio.ensure_future(self._queue.get())
        if not await waiting(self._next, timeout):
            return None
        event, self._next = self._next.result(), None
        if isinstance(event, _Encoded):
            with self._changed:
                self._n_unread -= len(event.data)
                self._changed.notify_all()
        return event


class _Events(StreamingResponse):
    """Server-sent events; `finish` is called at the end in any case."""

    def __init__(self, body: AsyncIterator[bytes], finish: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(body, media_type="text/event-stream", headers=headers)
        self._finish = finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._finish()
