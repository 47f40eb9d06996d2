"""Settings of the server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# the advertised context size, in tokens: front ends trim histories to it, and there is no limit here
ENDLESS = 1 << 30

# origins by name: pages of this machine, and of desktop apps, whose schemes no web page can have. Not "null": sandboxed
# frames of any page have that one, too.
ORIGINS = {
    "localhost": r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?",
    "apps": r"(app|capacitor|electron|file|tauri|vscode-file|vscode-webview)://[\w.~-]*(:\d{1,5})?"
    r"|https?://tauri\.localhost",
}

# origins of desktop apps made with Tauri, such as Jan; no web page has them
APP_ORIGINS = ("tauri://localhost", "http://tauri.localhost", "https://tauri.localhost")


def origin_pattern(origins: tuple[str, ...]) -> str:
    """A regular expression for all of an Origin header."""
    return "|".join(ORIGINS.get(origin) or re.escape(origin) for origin in origins) or "(?!)"


@dataclass(frozen=True)
class Settings:
    """What the server allows and how long it waits.

    model_name       the model's name for clients
    aliases, tags    its other names and what it is labelled with, for /v1/models
    model_file       the name of its file, without the folder
    page             whether there is a page to chat on
    slots, metrics   whether /slots and /metrics are answered
    api_keys         each client must send one of them; empty: no key is required
    hosts            names and addresses that a Host header may carry, without the port; empty: any
    origins          web pages that may use the server, as in an Origin header, or names of ORIGINS
    slot_folder      where clients may save what a slot holds; None: nowhere
    max_body         bytes of a request's body
    max_requests     requests answered at a time
    max_connections  open connections; one more replaces one without a whole request, or with one that needs no key
    head_seconds     for the head of a request to arrive, since the connection or the last response
    body_seconds     for its body to arrive, plus a second for each `min_rate` bytes of it
    write_seconds    for a client that has stopped reading to resume, at `min_rate` bytes per second
    min_rate         bytes per second that a client must at least send and read
    ping_seconds     between keep-alives while nothing else is sent
    stop_seconds     for responses to end at shutdown
    log_messages     whether messages are logged
    response_bytes   for stored responses, on disk or, without a folder, in memory
    """

    model_name: str
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    model_file: str = ""
    page: bool = True
    slots: bool = True
    metrics: bool = True
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "::1")
    origins: tuple[str, ...] = ()
    slot_folder: Path | None = None
    max_body: int = 16 << 20  # three million tokens; what counts of a body takes up to thirty times as much memory
    max_requests: int = 64
    max_connections: int = 320
    head_seconds: float = 10.0
    body_seconds: float = 15.0
    write_seconds: float = 30.0
    min_rate: int = 4 << 10
    ping_seconds: float = 15.0
    stop_seconds: float = 2.0
    log_messages: bool = False
    response_bytes: int = 64 << 20
