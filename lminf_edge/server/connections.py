"""uvicorn's HTTP server with time-outs for everything a client can delay, and a bounded shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import struct
from functools import partial
from typing import Any

import h11
import h11._readers
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from lminf_edge.errors import UserError
from lminf_edge.server.security import MAX_HEADER_BYTES, is_open
from lminf_edge.server.settings import Settings
from lminf_edge.server.state import ServerState

try:
    from fcntl import ioctl
    from termios import TIOCOUTQ
except ImportError:  # Windows
    ioctl = None  # type: ignore[assignment]

log = logging.getLogger("lminf_edge.server")

READ_BYTES = 64 << 10  # that are taken from a socket at a time, and parsed before others have their turn
FEW_CHUNKS = 128  # of a body, which may be of any size
CHUNK_BYTES = 32  # that the chunks beyond those have at least, on average
MOST_SPACES = 64  # side by side in a line of a head, or of what is around chunks


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError if the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only if the protocol is given; it would delay responses by 40 ms
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if family == socket.AF_INET6:  # or it would take the place of the IPv4 address beside it
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise UserError(f"Port {port} of {host} cannot be used: {error.strerror}.") from error
    return sock


class _FewSpaces:
    """One of h11's patterns for lines, whose time grows with the square of the spaces that are side by side."""

    def __init__(self, pattern: re.Pattern[bytes]) -> None:
        self._pattern = pattern

    def fullmatch(self, line: bytes) -> re.Match[bytes] | None:
        is_wide = b" " * MOST_SPACES in line.replace(b"\t", b" ")
        return None if is_wide else self._pattern.fullmatch(line)


for _name in ("header_field_re", "chunk_header_re"):
    _pattern = getattr(h11._readers, _name, None)
    if isinstance(_pattern, re.Pattern):  # as it is in h11 0.16
        setattr(h11._readers, _name, _FewSpaces(_pattern))


class Parser(h11.Connection):
    """h11's, which takes some 20 µs for a chunk: bodies in many small ones are refused."""

    refusal = ""  # why what has arrived is refused

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEADER_BYTES)
        self._n_chunks = self._n_bytes = 0  # of the current body

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._n_chunks = self._n_bytes = 0
        elif isinstance(event, h11.Data):
            self._n_chunks += event.chunk_start
            self._n_bytes += len(event.data)
            if self._n_chunks > FEW_CHUNKS + self._n_bytes // CHUNK_BYTES:
                self.refusal = "The body of the request comes in too many small chunks: send larger ones."
                raise h11.RemoteProtocolError(self.refusal)
        return event


class Connection(H11Protocol):
    """A connection that is closed if no request head arrives in time, or if the client stops reading.

    Bodies are timed by the guard. A connection can be dropped for a new one unless its request counts as an open one.
    """

    def __init__(self, *args: Any, settings: Settings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = self._parser = Parser()
        self._settings = settings
        self._since = 0.0  # when waiting for the next head began
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread = 0  # bytes when the client was last checked
        self._read_timer: asyncio.TimerHandle | None = None

    @property
    def has_request(self) -> bool:
        """Whether the head of a request has arrived and its response is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def has_whole_request(self) -> bool:
        return self.has_request and not self.cycle.more_body

    @property
    def counts(self) -> bool:
        """Whether it has a request of which there can be `max_requests` only, or one that will soon be refused."""
        return self.has_whole_request and not is_open(self.cycle.scope["path"])

    # --- the head -----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        with contextlib.suppress(AttributeError):  # another event loop than asyncio's
            transport.max_size = READ_BYTES  # type: ignore[attr-defined]
        self._expect_head()
        self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.has_request and self._head_timer is not None and not self.transport.is_closing():
            self._head_timer.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.has_request:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head_timer, self._read_timer):
            if timer is not None:
                timer.cancel()

    def _expect_head(self) -> None:
        self._since = self.loop.time()
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self.loop.call_later(self._settings.head_seconds, self._close)

    def _close(self) -> None:
        """Closes the connection, whether or not the client reads the rest of the response."""
        self.transport.close()
        self._head_timer = self.loop.call_later(self._settings.write_seconds, self.transport.abort)

    def _make_room(self) -> None:
        """Drops a connection if there are too many.

        The oldest of those that are closed once their client has read, else of those without a request head, else
        without a whole request, else with one that needs no key.
        """
        others = [each for each in self.connections if isinstance(each, Connection) and not each._has_ended]
        if len(others) <= self._settings.max_connections:
            return
        waiting = [each for each in others if each is not self and (each.transport.is_closing() or not each.counts)]
        min(waiting, key=Connection._use, default=self).transport.abort()

    @property
    def _has_ended(self) -> bool:
        return self.transport.is_closing() and self.transport.get_write_buffer_size() == 0

    def _use(self) -> tuple[bool, bool, bool, float]:
        """The least is the first to be given up."""
        return not self.transport.is_closing(), self.has_whole_request, self.has_request, self._since

    def send_400_response(self, msg: str) -> None:
        """Of what cannot be parsed. Once a response has begun nothing more can be said."""
        if self.cycle is not None:  # nobody is to wait for the rest of its body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state is h11.SEND_BODY:
            self.transport.abort()
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            with contextlib.suppress(h11.LocalProtocolError):  # the response to HEAD has no text
                super().send_400_response(self._parser.refusal or msg)
        self._close()

    # --- a client that does not read ----------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look_after_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read_timer is not None:
            self._read_timer.cancel()

    def _look_after_reader(self) -> None:
        self._unread = _n_unread(self.transport)
        self._read_timer = self.loop.call_later(self._settings.write_seconds, self._has_read)

    def _has_read(self) -> None:
        n_read = self._unread - _n_unread(self.transport)
        if n_read < self._settings.min_rate * self._settings.write_seconds:
            self.transport.abort()
        else:
            self._look_after_reader()

    # --- the end ------------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        if self.has_request and not self.has_whole_request:
            self.transport.close()
        else:
            super().shutdown()


def _n_unread(transport: asyncio.WriteTransport) -> int:
    """Bytes the client has not accepted: here, and in the kernel, which takes more only after room for megabytes."""
    n_bytes = transport.get_write_buffer_size()
    with contextlib.suppress(OSError, TypeError, AttributeError):
        queued = ioctl(transport.get_extra_info("socket").fileno(), TIOCOUTQ, struct.pack("i", 0))
        n_bytes += struct.unpack("i", queued)[0]
    return n_bytes


class Server(uvicorn.Server):
    """Ends all responses at shutdown, and shuts down when the engine stops."""

    def __init__(self, app: FastAPI, log_level: str = "info") -> None:
        """`app` is create_app's."""
        self._state: ServerState = app.state.server
        settings = self._state.settings
        self.has_failed = False
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(Connection, settings=settings),  # type: ignore[arg-type]
                ws="none",
                log_level=log_level,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_graceful_shutdown=settings.stop_seconds,
                server_header=False,
            )
        )
        logging.getLogger("uvicorn.access").addFilter(without_query)

    async def on_tick(self, counter: int) -> bool:
        if not self._state.is_alive and not self.should_exit:
            log.critical("The engine has stopped, and so does the server.")
            self.has_failed = True
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._state.stopping.set()
        await super().shutdown(sockets)


def without_query(record: logging.LogRecord) -> bool:
    """A filter of uvicorn's access log: the query string may hold a key."""
    if isinstance(record.args, tuple) and len(record.args) == 5:
        client, method, path, *rest = record.args
        record.args = (client, method, str(path).partition("?")[0], *rest)
    return True
