"""A real server on a real port, in this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from lminf_edge.engine.engine import Engine
from lminf_edge.engine.loading import load_engine
from lminf_edge.server import Settings, create_app
from lminf_edge.server.connections import Server
from lminf_edge.server.embedder import Embedder
from lminf_edge.text.service import TextService


@dataclass
class Served:
    url: str
    service: TextService
    engine: Engine
    settings: Settings
    server: Server


@contextmanager
def serve(
    model: str,
    settings: Settings | None = None,
    embedder: Embedder | None = None,
    pin_system: bool = False,
    **kwargs: Any,
) -> Iterator[Served]:
    """A server of `model`; the other arguments are load_engine's."""
    settings = settings or Settings(model_name="nano")
    engine = load_engine(model, **{"parallel": 2, "verbose": False, "n_threads": 1, "n_threads_batch": 1, **kwargs})
    service = TextService(engine, pin_system=pin_system)
    app = create_app(service, settings, embedder)
    sock = socket.create_server(("127.0.0.1", 0))
    server = Server(app, log_level="warning")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Served(f"http://127.0.0.1:{sock.getsockname()[1]}", service, engine, settings, server)
    finally:
        server.should_exit = True
        thread.join()
        sock.close()
        engine.close()
        assert app.state.server.close(10)
        engine.model.close()


def kept_alive(served: Served, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]) -> str:
    """The events of a stream of which no batch is processed before a keep-alive has come."""
    scheduler, has_come = served.engine.scheduler, threading.Event()
    process = scheduler._process

    def held(parts: Any) -> None:
        assert has_come.wait(60)
        process(parts)

    text = ""
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "_process", held)
        with httpx.stream("POST", f"{served.url}{path}", json=body, timeout=120) as response:
            for part in response.iter_text():
                text += part
                if ": keep-alive" in text:
                    has_come.set()
    return text
