"""Access control and limits on what clients send: one ASGI middleware around everything else."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lminf_edge.server.budget import LATER, Budget, Share
from lminf_edge.server.errors import ApiError, shutting_down
from lminf_edge.server.settings import Settings, origin_pattern
from lminf_edge.server.state import give_back_memory

# paths that need no key: the page, which asks for one, and the health check
LOOPBACK = ("127.0.0.1", "localhost", "::1")

_OPEN = ("/", "/health", "/v1/health", "/docs", "/openapi.json")
_OPEN_FOLDERS = ("/page/", "/docs/")

MAX_HEADER_BYTES = 32 << 10

_PAGE_HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    b"img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}


class SecurityMiddleware:
    """Checks a request before anything reads it.

    - The Host header must name this server: otherwise any web page could reach it through DNS rebinding.
    - A request from a web page must come from the server's own page or a listed origin, whatever its content type.
    - The key is compared in constant time; `request.state.owner` is its digest, "" if no key is required.
    - A body is received whole, in limited time and memory, before the request counts as being answered.
      `request.state.share` is its share of that memory.
    """

    def __init__(self, app: ASGIApp, settings: Settings, stopping: asyncio.Event, budget: Budget) -> None:
        """`stopping` is set at shutdown."""
        self.app, self.settings, self._budget = app, settings, budget
        self._stopping = stopping
        self._origins = re.compile(origin_pattern(settings.origins))
        self._owners = [owner_of(key.encode("utf-8")) for key in settings.api_keys]
        self._n_open = 0  # requests being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        body = _Body(Share(self._budget))
        counts = not is_open(scope["path"])
        n_places = 0
        try:
            scope.setdefault("state", {})["owner"] = self._check(scope)
            self._check_room(counts)
            if not await self._read(body, receive):
                return
            self._check_room(counts)
            scope["state"]["is_long"] = body.share.n_held > 0
            scope["state"]["share"] = body.share
            n_places = int(counts)
            self._n_open += n_places
            await self.app(scope, _after(body, receive), _with_page_headers(send))
        except ApiError as refusal:
            await refusal.response(scope["path"])(scope, receive, send)
        finally:
            self._n_open -= n_places
            body.share.close()
            if body.share.n_held:
                asyncio.get_running_loop().run_in_executor(None, give_back_memory)

    def _check(self, scope: Scope) -> str:
        """The request's owner: a digest of its key. Raises ApiError if the request is refused."""
        settings = self.settings
        headers: dict[bytes, bytes] = {name.lower(): value for name, value in scope["headers"]}

        def text(name: bytes) -> str:
            return headers.get(name, b"").decode("latin-1")

        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            raise ApiError(431, f"The headers of a request may have {MAX_HEADER_BYTES:,} bytes at most.")
        if settings.hosts and host_name(text(b"host")) not in settings.hosts:
            raise ApiError(403, "The Host header does not name this server: see --allowed-host.", "host_not_allowed")
        origin = text(b"origin") if b"origin" in headers else None
        own = f"{scope['scheme']}://{text(b'host')}"
        if origin is not None and origin != own and not self._origins.fullmatch(origin):
            message = f"Pages of {origin[:200]} may not use this server: see --allowed-origin."
            raise ApiError(403, message, "origin_not_allowed")
        length = text(b"content-length") or "0"
        if not length.isascii() or not length.isdigit():
            raise ApiError(400, "The Content-Length header is no number.")
        if len(length) > 18 or int(length) > settings.max_body:
            raise self._too_large()
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        key = key if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        owner = owner_of(key.strip(b" \t"))
        known = [hmac.compare_digest(owner, each) for each in self._owners]  # always all of them: constant time
        is_preflight = scope["method"] == "OPTIONS"
        if self._owners and not any(known) and not is_open(scope["path"]) and not is_preflight:
            message = "The API key is missing or wrong: send it as Authorization: Bearer KEY or X-Api-Key: KEY."
            raise ApiError(401, message, "invalid_api_key")
        return owner if any(known) else ""

    def _check_room(self, counts: bool) -> None:
        """Raises ApiError if there is no room for another request."""
        if self._stopping.is_set():
            raise shutting_down()
        if counts and self._n_open >= self.settings.max_requests:
            message = f"{self._n_open} requests are open, as many as may be: try again later."
            raise ApiError(503, message, headers=LATER)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body of a request may have {self.settings.max_body:,} bytes at most.")

    async def _read(self, body: _Body, receive: Receive) -> bool:
        """Receives a body; False if the client hung up before it was whole. Raises ApiError."""
        settings, loop = self.settings, asyncio.get_running_loop()
        started = loop.time()
        while True:
            end = started + settings.body_seconds + len(body.data) / settings.min_rate
            try:
                message: Message = await asyncio.wait_for(receive(), max(0.0, end - loop.time()))
            except asyncio.TimeoutError:
                raise ApiError(408, "The body of the request did not arrive in time.") from None
            if message["type"] != "http.request":
                return False
            body.data += message.get("body", b"")
            if len(body.data) > settings.max_body:
                raise self._too_large()
            body.share.take(len(message.get("body", b"")))
            if not message.get("more_body", False):
                return True


@dataclass
class _Body:
    share: Share
    data: bytearray = field(default_factory=bytearray)


def _after(body: _Body, receive: Receive) -> Receive:
    """`receive` for a request whose body has been received."""
    is_given = False

    async def received() -> Message:
        nonlocal is_given
        if is_given:  # all that can follow is the client's disconnect
            last: Message = await receive()
            return last
        is_given = True
        data, body.data = bytes(body.data), bytearray()
        return {"type": "http.request", "body": data, "more_body": False}

    return received


def _with_page_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *_PAGE_HEADERS.items()]}
        await send(message)

    return send_with_headers


def owner_of(key: bytes) -> str:
    """A digest that stands for an API key where the key itself must not appear."""
    return hashlib.blake2b(key, digest_size=16).hexdigest()


def is_open(path: str) -> bool:
    """Whether a path needs no key; requests for it do not count as open ones."""
    return path in _OPEN or path.startswith(_OPEN_FOLDERS)


def host_name(host: str) -> str:
    """The name in a Host header, without port or brackets; "" if it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def allowed_hosts(hosts: Sequence[str], more: list[str]) -> tuple[str, ...]:
    """Names that a Host header may carry: this machine's, those listed, and the addresses that are no wildcards."""
    names = [*LOOPBACK, *more, *(host for host in hosts if host not in ("0.0.0.0", "::"))]
    return tuple(dict.fromkeys(name.lower() for name in names))
