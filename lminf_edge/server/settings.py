"""What the person who starts the server decides."""

from __future__ import annotations

from dataclasses import dataclass

# what is advertised as context size, in tokens: front ends cut the history to it, and ours has no end
ENDLESS = 1 << 30


@dataclass(frozen=True)
class Settings:
    """
    model_name       how clients see the model
    api_keys         each client must send one of them; none: nobody has to
    hosts            names and addresses that a Host header may carry, without the port; empty: any
    origins          web pages that may use the server, as in an Origin header
    max_body         bytes of a request's body
    max_requests     that are answered at a time
    max_connections  that are open at a time; one more takes the place of one that has not sent a whole request
    head_seconds     for the head of a request to arrive, from the connection or the last answer on
    body_seconds     for its body to arrive, and a second more for each `min_rate` bytes of it
    write_seconds    for a client that does not read to go on, at `min_rate` bytes per second
    min_rate         bytes per second that a client must send and read at the least
    ping_seconds     between signs of life while nothing else is sent
    stop_seconds     for answers to end when the server is shut down
    log_messages     whether the log may hold what people write
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "::1")
    origins: tuple[str, ...] = ()
    max_body: int = 16 << 20  # three million tokens; parsed, a body may take thirty times its bytes
    max_requests: int = 64
    max_connections: int = 320
    head_seconds: float = 10.0
    body_seconds: float = 15.0
    write_seconds: float = 30.0
    min_rate: int = 4 << 10
    ping_seconds: float = 15.0
    stop_seconds: float = 2.0
    log_messages: bool = False
