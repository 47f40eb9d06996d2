"""A Hugging Face hub on this machine, with all the ways to answer that it may have."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

REPO = "someone/Tiny-GGUF"
DATA = os.urandom(2_500_000)


@dataclass
class Hub:
    """What it has, how it is to answer, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=lambda: {"Tiny-Q4_K_M.gguf": DATA})
    sent: dict[str, bytes] = field(default_factory=dict)  # other than what it says it has
    entries: list[Any] = field(default_factory=list)  # of its list, besides the files
    status: int = 200
    cut: list[int] = field(default_factory=list)  # after so many bytes of an answer
    takes_ranges: bool = True
    cdn: str = ""  # where it sends who wants a file
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)  # path, token, range
    url: str = ""

    def listing(self) -> bytes:
        files = [
            {"type": "file", "path": path, "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}}
            for path, data in self.files.items()
        ]
        return json.dumps([{"type": "file", "path": "README.md", "size": 3}, *files, *self.entries]).encode()


def handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers["Range"]
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            hub.asked.append((path, self.headers["Authorization"], wanted))
            if hub.status != 200:
                self.send_error(hub.status)
            elif path == f"/api/models/{REPO}/tree/main":
                self.answer(hub.listing())
            elif hub.cdn and not path.startswith("/cdn/"):
                self.send_response(302)
                self.send_header("Location", f"{hub.cdn}/cdn{urllib.parse.quote(path)}")
                self.end_headers()
            else:
                name = path.rpartition("/main/")[2]
                data = hub.sent.get(name, hub.files[name])
                begin = int(wanted[6:-1]) if wanted and hub.takes_ranges else None
                self.answer(data, begin, hub.cut.pop(0) if hub.cut else None)

        def answer(self, data: bytes, begin: int | None = None, cut: int | None = None) -> None:
            self.send_response(200 if begin is None else 206)
            if begin is not None:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - (begin or 0)))
            self.end_headers()
            self.wfile.write(data[begin or 0 :][:cut])

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextlib.contextmanager
def serve_hub(hub: Hub) -> Iterator[None]:
    """Answers at hub.url."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
