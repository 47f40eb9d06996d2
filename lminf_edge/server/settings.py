"""What the person who starts the server decides."""

from __future__ import annotations

from dataclasses import dataclass

# what is advertised as context size, in tokens: front ends cut the history to it, and ours has no end
ENDLESS = 1 << 30


@dataclass(frozen=True)
class Settings:
    """
    model_name    how clients see the model
    api_key       asked from every client; None: from nobody
    hosts         names and addresses that a Host header may carry, without the port; empty: any
    origins       web pages that may use the server, as in an Origin header
    max_body      bytes of a request's body
    body_seconds  for each part of a body to arrive
    max_requests  that are open at a time
    ping_seconds  between signs of life while nothing else is sent
    log_messages  whether the log may hold what people write
    """

    model_name: str
    api_key: str | None = None
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "::1")
    origins: tuple[str, ...] = ()
    max_body: int = 64 << 20
    body_seconds: float = 30.0
    max_requests: int = 64
    ping_seconds: float = 15.0
    log_messages: bool = False
