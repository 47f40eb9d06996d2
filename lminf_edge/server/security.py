"""Who may use the server, from which page, and with how much at a time: one ASGI layer around everything else."""

from __future__ import annotations

import asyncio
import hmac
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lminf_edge.server.errors import error_response
from lminf_edge.server.settings import Settings

# what needs no key: the page itself, which asks for one, and whether the server is alive
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


class Guard:
    """Checks a request before anything reads it.

    - The Host header must name this server, or a page anywhere could reach it through a DNS name of its own that it
      points to this machine.
    - A request from a web page must come from the server's own page or a listed one, whatever its content type.
    - The key is compared in constant time.
    - A body is counted as it arrives, and so are requests that are open.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self.n_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = {name.lower(): value for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await error_response(*refusal)(scope, receive, send)
            return
        counts = not _is_open(scope["path"])
        if counts and self.n_open >= self.settings.max_requests:
            response = error_response(
                503,
                f"{self.n_open} requests are open, as many as may be: try again later.",
                headers={"Retry-After": "1"},
            )
            await response(scope, receive, send)
            return
        self.n_open += counts

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *_PAGE_HEADERS.items()]}
            await send(message)

        try:
            await self.app(scope, self._counted(receive), send_with_headers)
        finally:
            self.n_open -= counts

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, str, str | None] | None:
        """Status, message and code for a request that may not go on."""
        settings = self.settings

        def text(name: bytes) -> str:
            return headers.get(name, b"").decode("latin-1")

        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            return 431, f"The headers of a request may have {MAX_HEADER_BYTES:,} bytes at most.", None
        if settings.hosts and host_name(text(b"host")) not in settings.hosts:
            return 403, "The Host header does not name this server: see --allowed-host.", "host_not_allowed"
        origin = text(b"origin") if b"origin" in headers else None
        own = f"{scope['scheme']}://{text(b'host')}"
        if origin is not None and origin != own and origin not in settings.origins:
            return 403, f"Pages of {origin[:200]} may not use this server: see --allowed-origin.", "origin_not_allowed"
        length = text(b"content-length") or "0"
        if not length.isascii() or not length.isdigit():
            return 400, "The Content-Length header is no number.", None
        if int(length) > settings.max_body:
            return 413, self._too_large(), None
        is_preflight = scope["method"] == "OPTIONS"
        if settings.api_key is not None and not _is_open(scope["path"]) and not is_preflight:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            key = key if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
            if not hmac.compare_digest(key.strip(b" \t"), settings.api_key.encode("utf-8")):
                return 401, "The API key is missing or wrong: send it as Authorization: Bearer KEY.", "invalid_api_key"
        return None

    def _too_large(self) -> str:
        return f"The body of a request may have {self.settings.max_body:,} bytes at most."

    def _counted(self, receive: Receive) -> Receive:
        n_bytes, is_whole = 0, False

        async def counted() -> Message:
            nonlocal n_bytes, is_whole
            if is_whole:  # what comes now is that the client hangs up, whenever that is
                last: Message = await receive()
                return last
            try:
                message: Message = await asyncio.wait_for(receive(), self.settings.body_seconds)
            except asyncio.TimeoutError:
                raise HTTPException(408, "The body of the request did not arrive in time.") from None
            if message["type"] == "http.request":
                is_whole = not message.get("more_body", False)
                n_bytes += len(message.get("body", b""))
                if n_bytes > self.settings.max_body:
                    raise HTTPException(413, self._too_large())
            return message

        return counted


def _is_open(path: str) -> bool:
    return path in _OPEN or path.startswith(_OPEN_FOLDERS)


def host_name(host: str) -> str:
    """The name in a Host header, without port or brackets; "" if it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
