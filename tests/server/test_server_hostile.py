"""What clients send to break a server: refused with a sentence, in the API's own shape, and soon."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from served import Served, serve

from lminf_edge import LMInfConfig

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
SAID: Any = [{"role": "user", "content": "x"}]
DEEP = "[" * 100_000 + "]" * 100_000
CALLED: Any = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": DEEP}}]}
TOOL: Any = {"type": "function", "name": "f", "parameters": {"type": "object"}}
KEYS = {str(i): 0 for i in range(50_000)}


@pytest.fixture(scope="module")
def served(nano_path: str) -> Iterator[Served]:
    with serve(nano_path, lminf=LMInfConfig(n_global=4, n_local=128)) as served:
        yield served


def choose(**choice: Any) -> dict[str, Any]:
    return {"input": "x", "tools": [TOOL], "tool_choice": choice}


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        (CHAT, {"messages": [*SAID, CALLED]}, "arguments nest too deep"),
        (
            CHAT,
            {"messages": [CALLED | {"tool_calls": [{"function": {"name": "f", "arguments": KEYS}}]}, *SAID]},
            "keys at most",
        ),
        (CHAT, {"messages": [{**SAID[0], **KEYS}]}, "keys at most"),
        (CHAT, {"messages": SAID, "chat_template_kwargs": KEYS}, "keys at most"),
        (CHAT, {"messages": SAID, "tools": [{"function": {"name": f"f{i}"}} for i in range(20_000)]}, "1,024 at most"),
        (RESPONSES, {"input": [{"type": "function_call_output", "call_id": [], "output": "x"}]}, "no such call"),
        (RESPONSES, choose(type="allowed_tools", tools=1), "a list of tools"),
        (RESPONSES, choose(type="allowed_tools", tools=[{"name": []}, 1]), "a list of tools"),
        (MESSAGES, {"messages": SAID, "tool_choice": {"type": []}}, "its type must be"),
        (
            MESSAGES,
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": {}}]}]},
            "no such call",
        ),
    ],
)
def test_a_sentence_for_what_breaks_servers(served: Served, path: str, body: dict[str, Any], reason: str) -> None:
    start = time.perf_counter()
    answer = httpx.post(served.url + path, json={"max_tokens": 4, **body}, timeout=60)
    assert answer.status_code == 400, answer.text[:500]
    assert reason in answer.json()["error"]["message"]
    assert time.perf_counter() - start < 20  # these took minutes, or hours


def test_many_parts_of_a_turn(served: Served) -> None:
    """They are joined in a time that grows as they do."""
    parts = [{"type": "text", "text": "word"} for _ in range(120_000)]
    body = {"messages": [{"role": "user", "content": parts}]}
    answer = httpx.post(f"{served.url}{MESSAGES}/count_tokens", json=body, timeout=120)
    assert answer.json()["input_tokens"] > 120_000
