"""Responses of APIs whose streams are typed events: the same events make a stream and a whole answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from fastapi import Request, Response

from lminf_edge.engine.request import Request as EngineRequest
from lminf_edge.server.arguments import AskedChat
from lminf_edge.server.openai_routes import open_exchange
from lminf_edge.server.requests import Sampling
from lminf_edge.server.streaming import EventStream, Wire, encoded, in_thread
from lminf_edge.server.turns import count_prompt
from lminf_edge.text.service import Exchange

T = TypeVar("T")


class Reply:
    """One response. A subclass makes its events.

    They begin when the prompt is rendered and its first part processed: a request that is refused until then gets a
    status of its own, and a long prompt does not delay them.
    """

    def __init__(self) -> None:
        self._put: Callable[[dict[str, Any]], None] | None = None
        self._has_begun = False
        self._lock = threading.Lock()

    def opening(self, request: EngineRequest | None) -> list[dict[str, Any]]:
        """The first events; None: the prompt was in the cache as a whole."""
        raise NotImplementedError

    def begin(self, request: EngineRequest | None = None) -> None:
        """Sends the first events, once; by the engine's thread or by the one that answers."""
        with self._lock:
            if self._has_begun:
                return
            self._has_begun = True
            for event in self.opening(request):
                if self._put is not None:
                    self._put(event)

    def open_exchange(self, request: Request, body: Sampling, put: Callable[[Any], None] | None) -> Exchange:
        self._put = put
        return open_exchange(request, body, self.begin)


async def respond(
    request: Request,
    body: Sampling,
    reply: Reply,
    prepare: Callable[[Exchange], T],
    events: Callable[[Exchange, T], Iterator[dict[str, Any]]],
    whole: Callable[[], dict[str, Any]],
    wire: Wire,
) -> Response:
    """One JSON response or, with `stream`, events.

    `prepare` turns the request into what `events` needs; `whole` is asked once all events were made. All three run in a
    worker thread.
    """
    stream = EventStream(request, wire, body.sse_ping_interval) if body.stream else None
    exchange = reply.open_exchange(request, body, stream.put if stream is not None else None)
    if stream is not None:
        return await stream.respond(exchange, partial(prepare, exchange), partial(events, exchange), None)

    def work() -> Response:
        for _ in events(exchange, prepare(exchange)):
            pass
        return encoded(whole())

    return await in_thread(request, work, exchange.cancel)


async def respond_count(
    request: Request,
    body: Sampling,
    reply: Reply,
    prepare: Callable[[Exchange], AskedChat],
    told: Callable[[int], dict[str, Any]],
) -> Response:
    """One JSON response: what is `told` of the number of tokens that the prompt has."""
    exchange = reply.open_exchange(request, body, None)
    return await in_thread(request, lambda: encoded(told(count_prompt(exchange, prepare(exchange)))), exchange.cancel)
