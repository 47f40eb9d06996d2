"""A server that is killed at any moment loses no finished turn."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest


class Server:
    """lminf-edge serve in a process of its own."""

    def __init__(self, folder: Path, *more: str) -> None:
        command = [sys.executable, "-m", "lminf_edge", "serve", "-m", "nano", "--port", "0", "--json"]
        options = ["--folder", str(folder), "--parallel", "2", "--n-local", "128", "--memory", "4M", "--threads", "1"]
        # what was skipped depends on what was known; without that, known or not makes no difference
        exact = ["--prefill", "full"]
        self.process = subprocess.Popen([*command, *options, *exact, *more], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = json.loads(self.process.stdout.readline())["url"]

    def ask(self, messages: list[dict[str, str]], **more: Any) -> Any:
        body = {"messages": messages, "max_tokens": 12, "temperature": 0, **more}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60).json()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def check_alike(known: Any, fresh: Any) -> None:
    """The same tokens as likely as in the other answer, up to a token that another was as likely as.

    What is known was read in other batches, so that last digits differ: by 0.03 nats at most, 0.01 in the mean.
    """
    differences = []
    tokens = (each["choices"][0]["logprobs"]["content"] for each in (known, fresh))
    for one, other in zip(*tokens, strict=False):
        likely = {each["token"]: each["logprob"] for each in other["top_logprobs"]}
        differences.append(abs(one["logprob"] - likely[one["token"]]))
        if one["token"] != other["token"]:
            assert other["logprob"] - likely[one["token"]] < 0.1
            break
    assert max(differences) < 0.1
    assert sum(differences) / len(differences) < 0.03


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
            answer, other = (server.ask(ask, logprobs=True, top_logprobs=3) for server in (known, fresh))
            check_alike(answer, other)
            assert answer["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"]
        assert list(tmp_path.rglob("*.checkpoint"))
    finally:
        known.kill()
        fresh.kill()


@pytest.mark.parametrize("in_files", [False, True])
def test_what_was_said_before_a_kill_is_recalled(tmp_path: Path, in_files: bool) -> None:
    """Every token of every finished turn, if it is processed again or comes from files that a kill may have cut."""
    rng = random.Random(1)
    more = ["--recall", "16", *(["--archive", str(tmp_path / "archive")] if in_files else [])]
    chats: list[list[dict[str, str]]] = [[], []]
    n_from_files = n_turns = 0

    def ask(server: Server, messages: list[dict[str, str]], text: str) -> int:
        """How many tokens were known before."""
        question = {"role": "user", "content": text}
        answer = server.ask([*messages, question])
        assert answer["lminf"]["archived"] == answer["lminf"]["position"]
        messages += [question, {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}]
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    for round_number in range(4):
        server = Server(tmp_path / "store", *more)
        timer = threading.Timer(rng.uniform(1.0, 5.0), server.kill)
        timer.start()
        try:
            for i in range(1000):
                n_known = ask(
                    server, chats[n_turns % 2], f"{round_number}: " + "the sea was calm. " * rng.randint(60, 200)
                )
                n_from_files += i < 2 and n_known > 0
                n_turns += 1
                time.sleep(rng.choice([0.0, 2.1]))  # what is idle for two seconds is written
        except (httpx.HTTPError, ValueError):
            pass
        timer.join()
        server.kill()

    server = Server(tmp_path / "store", *more)
    try:
        for messages in chats:
            assert messages
            n_from_files += ask(server, messages, "And then?") > 0
        assert n_from_files > 0
    finally:
        server.process.send_signal(signal.SIGTERM)
        server.process.wait()
    assert list(tmp_path.rglob("*.segment"))
    assert not list(tmp_path.rglob("*.part"))
