"""What clients send to break a server: refused with a sentence, in the API's own shape, and soon."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pace import within
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
        (
            RESPONSES,
            {**choose(type="allowed_tools", tools=[]), "tools": [TOOL | {"name": ""}]},
            "a function has a name",
        ),
        (CHAT, {"messages": SAID, "modalities": ["text", "audio"]}, "only text can be written"),
        ("/v1/completions", {"prompt": "x", "best_of": 3}, "ask for n of them"),
        ("/v1/completions", {"prompt": "x", "n": 2, "best_of": 1}, "ask for n of them"),
        ("/completion", {"prompt": "x", "min_keep": 10**400}, "less than or equal"),
        ("/completion", {"prompt": "x", "nobody_knows_this": 10**400, "n_probs": 10**9}, "less than or equal"),
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
    with within(20, time.monotonic):  # these took minutes, or hours
        answer = httpx.post(served.url + path, json={"max_tokens": 4, **body}, timeout=60)
    assert answer.status_code == 400, answer.text[:500]
    assert reason in answer.json()["error"]["message"]


def test_many_parts_of_a_turn(served: Served) -> None:
    """They are joined in a time that grows as they do."""
    parts = [{"type": "text", "text": "word"} for _ in range(80_000)]
    body = {"messages": [{"role": "user", "content": parts}]}
    answer = httpx.post(f"{served.url}{MESSAGES}/count_tokens", json=body, timeout=120)
    assert answer.json()["input_tokens"] > 80_000


# as JSON text, each too much; with names, objects, lists, texts, and after what only looks like a text's end
TOO_MANY = {
    "lists": "[" + "[]," * 500_000 + "1]",
    "objects": "[" + "{} ," * 500_000 + "1]",
    "texts": "[" + '"",' * 500_000 + "1]",
    "names": "{" + ",".join(f'"{i}" : 1' for i in range(500_001)) + "}",
    "objects with names": "[" + ",".join('{"a":1}' for _ in range(250_001)) + "]",
    "after an escape": '["\\\\",' + "[]," * 500_000 + "1]",
    "after an escaped quote": '["\\\\\\"",' + "[]," * 500_000 + "1]",
}


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES, "/completion", "/tokenize"])
@pytest.mark.parametrize("kind", TOO_MANY)
def test_more_values_than_a_body_may_have(served: Served, path: str, kind: str) -> None:
    """Python holds its lock while it makes them, be they of a field that nobody reads: everybody waited for seconds."""
    whole = json.dumps({"messages": SAID, "input": "x", "prompt": "x", "content": "x", "max_tokens": 1})
    refused = httpx.post(served.url + path, content=f'{whole[:-1]}, "x": {TOO_MANY[kind]}}}'.encode(), timeout=60)
    assert refused.status_code == 413, refused.text[:500]
    assert "more than 500,000 objects, lists and texts" in refused.json()["error"]["message"]


@pytest.mark.parametrize("text", ["[]{}[]", '\\"[', '":[', "\\\\", "\n{"])
def test_what_stands_in_a_text_does_not_count(served: Served, text: str) -> None:
    body = {"content": text * 200_000 + "\\"}
    assert httpx.post(f"{served.url}/tokenize", json=body, timeout=120).status_code == 200


@pytest.mark.parametrize("end", ["", "\\", '"'])
def test_a_text_without_an_end(served: Served, end: str) -> None:
    """Looked through once, not from each of its quotes."""
    data = '{"x": "' + '\\"[' * 600_000 + end
    with within(10, time.monotonic):
        refused = httpx.post(f"{served.url}/tokenize", content=data.encode(), timeout=60)
    assert refused.status_code == 400


def test_more_values_than_a_template_is_given(served: Served) -> None:
    for values in ([0] * 50_001, [[]] * 50_001, [{"a": [1, 2]}] * 20_000):
        body = {"messages": SAID, "max_tokens": 1, "chat_template_kwargs": {"a": values}}
        refused = httpx.post(served.url + CHAT, json=body, timeout=60)
        assert refused.status_code == 400, refused.text[:500]
        assert "50,000 values at most" in refused.json()["error"]["message"]


def calls(*arguments: str) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": each}} for each in arguments]}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (calls('{"a": [' + "[]," * 250_000 + "[]]}"), "250,000 values at most"),
        (calls('{"a": [' + "0," * 250_000 + "0]}"), "250,000 values at most"),
        (calls(*['{"a": [' + "0," * 60_000 + "0]}"] * 5), "250,000 values in all"),
        ({**SAID[0], "x": [0] * 1_000_000}, "1,000,000 values at most"),
    ],
)
def test_more_values_than_messages_may_hold(served: Served, message: dict[str, Any], reason: str) -> None:
    """They stand in a text, so that they are no part of the body, or have no names."""
    refused = httpx.post(served.url + CHAT, json={"messages": [message, *SAID], "max_tokens": 1}, timeout=60)
    assert refused.status_code == 400, refused.text[:500]
    assert reason in refused.json()["error"]["message"]


def test_a_call_that_writes_a_long_file(served: Served) -> None:
    """What stands in its texts does not count."""
    message = calls(json.dumps({"path": "a.py", "text": 'x[0] = {"a": [1, 2]}\n' * 30_000}))
    body = {"messages": [message, {"role": "user", "content": "Go on."}], "max_tokens": 1}
    assert httpx.post(served.url + CHAT, json=body, timeout=120).status_code == 200


# --- the three APIs judge alike ---------------------------------------------------------------------------------------


def of_tool(path: str, parameters: Any, strict: bool) -> dict[str, Any]:
    """A request that must call a tool, of any of the three APIs."""
    if path == CHAT:
        function = {"name": "f", "parameters": parameters, "strict": strict}
        return {"messages": SAID, "tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    if path == MESSAGES:
        tool = {"name": "f", "input_schema": parameters, "strict": strict}
        return {"messages": SAID, "tools": [tool], "tool_choice": {"type": "any"}}
    tool = {"type": "function", "name": "f", "parameters": parameters, "strict": strict}
    return {"input": "x", "tools": [tool], "tool_choice": "required"}


def of_answer(path: str, schema: Any) -> dict[str, Any]:
    """A request whose answer is held to a schema."""
    if path == CHAT:
        shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return {"messages": SAID, "response_format": shape}
    if path == MESSAGES:
        return {"messages": SAID, "output_config": {"format": {"type": "json_schema", "schema": schema}}}
    return {"input": "x", "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}}


def one(**property_: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": property_}, "required": ["a"], "additionalProperties": False}


BROKEN = [
    ({"enum": ["x"], "type": -1}, "-1 is no type"),
    ({"enum": ["x"], "type": [[]]}, "is no type"),
    ({"type": "object", "minProperties": ""}, "minProperties is a number"),
    ({"type": "object", "maxProperties": None}, "maxProperties is a number"),
    ({"allOf": [{"properties": ["a"]}, {"type": "object"}]}, "properties is an object"),
    ({"allOf": [{"required": 1}, {"type": "object"}]}, "required a list"),
    ({"allOf": [{"required": [[]]}, {"type": "object"}]}, "a list of names"),
]


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize(("schema", "reason"), BROKEN)
def test_schemas_that_are_none(served: Served, path: str, schema: Any, reason: str) -> None:
    for body in (of_tool(path, {"type": "object", "properties": {"a": schema}}, strict=True), of_answer(path, schema)):
        refused = httpx.post(served.url + path, json=body, timeout=60)
        assert refused.status_code == 400, refused.text[:500]
        assert reason in refused.json()["error"]["message"]


TOO_LARGE = {
    "least items": (one(type="array", minItems=10**9), "minItems may be 1,000 at most"),
    "most items": (one(type="array", items={"type": "null"}, maxItems=5000), "maxItems may be 1,000 at most"),
    "least characters": (one(type="string", minLength=10**30), "minLength may be 1,000 at most"),
    "most characters": (one(type="string", maxLength=1e5), "maxLength may be 1,000 at most"),
    "repetitions": (one(type="string", pattern="^a{5000}$"), "repeated more than 1,000 times"),
    "an integer": (one(type="integer", maximum=10**30), "at most 9,007,199,254,740,992"),
    "a pattern without a grammar": (one(type="string", pattern="^(?=a)a$"), "pattern"),
    "half a pattern": (one(type="string", pattern="^(a$"), "schema"),
    "a long pattern": (one(type="string", pattern="^" + "a" * 5000 + "$"), "pattern may have 4,096 characters"),
}


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("name", TOO_LARGE)
def test_bounds_that_no_grammar_has(served: Served, path: str, name: str) -> None:
    """Tools go on without them; strict ones and answers are refused."""
    schema, reason = TOO_LARGE[name]
    limit = {"max_output_tokens" if path == RESPONSES else "max_tokens": 4}
    loose = httpx.post(served.url + path, json={**limit, **of_tool(path, schema, strict=False)}, timeout=60)
    assert loose.status_code == 200, loose.text[:500]
    for body in (of_tool(path, schema, strict=True), of_answer(path, schema)):
        refused = httpx.post(served.url + path, json={**limit, **body}, timeout=60)
        assert refused.status_code == 400, refused.text[:500]
        assert reason in refused.json()["error"]["message"]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_a_pattern_means_the_same_to_all(served: Served, path: str, strict: bool) -> None:
    limit = {"max_output_tokens" if path == RESPONSES else "max_tokens": 60}
    body = of_tool(path, one(type="string", pattern=r"^\d{3}\w$"), strict)
    answer = httpx.post(served.url + path, json={**limit, **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert re.search(r'\{\s*\\?"a\\?"\s*:\s*\\?"\d{3}\w\\?"\s*\}', answer.text), answer.text


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_many_optional_properties(served: Served, path: str) -> None:
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}
    for body in (of_tool(path, schema, False), of_tool(path, schema, True), of_answer(path, schema)):
        refused = httpx.post(served.url + path, json={"max_tokens": 4, **body}, timeout=60)
        assert refused.status_code == 400
        assert "400 properties at most that are not required" in refused.json()["error"]["message"]


def test_compactions_stay_with_their_api(served: Served) -> None:
    edits = {"edits": [{"type": "compact_20260112", "trigger": {"type": "input_tokens", "value": 1}}]}
    parts = [{"type": "text", "text": "x"}]
    asked = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1, "context_management": edits}
    block = httpx.post(served.url + MESSAGES, json=asked, timeout=60).json()["content"][0]
    assert block["type"] == "compaction"
    managed = [{"type": "compaction", "compact_threshold": 1}]
    asked = {"input": "x", "max_output_tokens": 1, "context_management": managed}
    item = httpx.post(served.url + RESPONSES, json=asked, timeout=60).json()["output"][0]
    assert item["type"] == "compaction"

    there = {"input": [{"type": "compaction", "encrypted_content": block["encrypted_content"]}, *SAID]}
    here = {"type": "compaction", "content": item["encrypted_content"]}
    for path, body, other in (
        (RESPONSES, there, MESSAGES),
        (RESPONSES, {"input": "x", "previous_response_id": f"resp_{block['encrypted_content']}"}, MESSAGES),
        (MESSAGES, {"messages": [{"role": "assistant", "content": [here]}, *SAID], "max_tokens": 1}, RESPONSES),
    ):
        answer = httpx.post(served.url + path, json=body, timeout=60)
        assert answer.status_code == 400
        assert f"is one of {other}: go on with it there" in answer.json()["error"]["message"]
