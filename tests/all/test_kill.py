"""A server that is killed at any moment loses no finished turn."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx


class Server:
    """lminf-edge serve in a process of its own."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "lminf_edge", "serve", "-m", "nano", "--port", "0", "--json"]
        options = ["--folder", str(folder), "--parallel", "2", "--n-local", "128", "--memory", "4M", "--threads", "1"]
        # what was skipped depends on what was known; without that, known or not makes no difference
        exact = ["--prefill", "full"]
        self.process = subprocess.Popen([*command, *options, *exact], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = json.loads(self.process.stdout.readline())["url"]

    def ask(self, messages: list[dict[str, str]]) -> Any:
        body = {"messages": messages, "max_tokens": 12, "temperature": 0}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60).json()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def test_kill_in_a_loop(tmp_path: Path) -> None:
    rng = random.Random(0)
    chats: list[list[dict[str, str]]] = [[] for _ in range(5)]
    n_killed_at_work = 0
    for round_number in range(12):
        server = Server(tmp_path)
        timer = threading.Timer(rng.uniform(0.3, 3.0), server.kill)
        timer.start()
        try:
            while True:
                messages = rng.choice(chats)
                question = {"role": "user", "content": f"{round_number}: " + "the sea was calm. " * rng.randint(1, 30)}
                answer = server.ask([*messages, question])
                content = answer["choices"][0]["message"]["content"]
                messages += [question, {"role": "assistant", "content": content}]
        except (httpx.HTTPError, ValueError):
            n_killed_at_work += 1
        timer.join()
        server.kill()
    assert n_killed_at_work == 12

    # everything that was finished is known, whatever its files look like
    known = Server(tmp_path)
    fresh = Server(tmp_path.parent / "fresh")
    try:
        for messages in chats:
            assert len(messages) > 2
            ask = [*messages, {"role": "user", "content": "And then?"}]
            answer, other = known.ask(ask), fresh.ask(ask)
            assert answer["choices"] == other["choices"]
            assert answer["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"]
        assert list(tmp_path.rglob("*.checkpoint"))
    finally:
        known.kill()
        fresh.kill()
