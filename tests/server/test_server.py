"""The server, as clients see it: the openai package, plain HTTP, and connections that break."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from served import Served, kept_alive, serve

from lminf_edge import Llama, LMInfConfig
from lminf_edge.server import Settings
from lminf_edge.server.connections import listen
from lminf_edge.server.embedder import Embedder
from lminf_edge.server.security import host_name
from lminf_edge.server.settings import ENDLESS
from lminf_edge.server.state import ServerState
from lminf_edge.text.tokenizer import N_AT_ONCE

WINDOW = LMInfConfig(n_global=4, n_local=128)
QUESTION = [{"role": "user", "content": "The ferry left at six, an hour before the sun came over the hills."}]


@pytest.fixture(scope="module")
def server(nano_path: str) -> Iterator[Served]:
    embedder = Llama(nano_path, embedding=True, n_ctx=512, verbose=False, n_threads=1)
    with serve(nano_path, lminf=WINDOW, embedder=Embedder(embedder)) as served:
        yield served
    embedder.close()


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def ai(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(ai: openai.OpenAI, messages: list[dict[str, str]], **kwargs: Any) -> Any:
    return ai.chat.completions.create(
        **{"model": "nano", "messages": messages, "max_tokens": 12, "temperature": 0, **kwargs}  # type: ignore[call-overload]
    )


def events(text: str) -> list[Any]:
    """The data of server-sent events, JSON but for the last."""
    blocks = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [block if block == "[DONE]" else json.loads(block) for block in blocks]


def assert_error(response: httpx.Response, status: int, *parts: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith((".", "?"))
    assert "\n" not in error["message"]
    for part in parts:
        assert part in error["message"]


# --- OpenAI's clients -------------------------------------------------------------------------------------------------


def test_models(ai: openai.OpenAI, client: httpx.Client) -> None:
    [model] = ai.models.list().data
    assert (model.id, model.object, model.owned_by) == ("nano", "model", "lminf-edge")
    assert abs(model.created - time.time()) < 3600
    assert ai.models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError, match="There is no model"):
        ai.models.retrieve("gpt-5")
    assert client.get("/v1/models").json()["data"][0]["context_length"] == ENDLESS


def test_chat(ai: openai.OpenAI) -> None:
    answer = ask(ai, QUESTION)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert ask(ai, QUESTION).choices == answer.choices


def test_a_stream_is_as_specified(ai: openai.OpenAI) -> None:
    whole = ask(ai, QUESTION)
    chunks = list(ask(ai, QUESTION, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert not chunks[0].choices[0].delta.content
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    *parts, last, usage = chunks
    assert [chunk.choices[0].finish_reason for chunk in parts] == [None] * len(parts)
    assert last.choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in [*parts, last])
    assert usage.choices == []
    assert usage.usage.completion_tokens == 12
    text = "".join(chunk.choices[0].delta.content or "" for chunk in parts)
    assert text == whole.choices[0].message.content


def test_a_stream_without_usage_has_none(client: httpx.Client) -> None:
    body = {"messages": QUESTION, "max_tokens": 3, "stream": True}
    response = client.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


def test_a_resent_history_is_cached(ai: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "Go on with the story of the lighthouse keeper."}]
    known = 0
    for i in range(6):  # many times the window
        messages.append({"role": "user", "content": f"Part {i}: " + "the sea was calm and the lamp was lit. " * 20})
        answer = ask(ai, messages, max_tokens=30)
        assert answer.usage.prompt_tokens_details.cached_tokens >= known
        assert answer.usage.prompt_tokens > known
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        known = answer.usage.prompt_tokens + 20
    again = ask(ai, messages[:-1], max_tokens=30)  # regenerate
    assert again.usage.prompt_tokens - again.usage.prompt_tokens_details.cached_tokens <= 1
    assert again.choices[0].message.content == messages[-1]["content"]


def test_completions(ai: openai.OpenAI) -> None:
    one = ai.completions.create(model="nano", prompt="The ferry left at six", max_tokens=8, temperature=0)
    assert one.object == "text_completion"
    assert one.choices[0].text
    echo = ai.completions.create(
        model="nano", prompt="The ferry left at six", max_tokens=8, temperature=0, echo=True, logprobs=2
    )
    assert echo.choices[0].text == "The ferry left at six" + one.choices[0].text
    assert len(echo.choices[0].logprobs.tokens) == len(echo.choices[0].logprobs.token_logprobs) > 8
    several = ai.completions.create(model="nano", prompt=["The ferry", "The sea"], max_tokens=3, temperature=0, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    streamed = list(ai.completions.create(model="nano", prompt=[1, 300, 400], max_tokens=4, stream=True))
    assert streamed[-1].choices[0].finish_reason == "length"


def test_a_stream_echoes(ai: openai.OpenAI) -> None:
    asked: Any = {"model": "nano", "prompt": ["The ferry left", "At six"], "n": 2, "max_tokens": 4, "temperature": 0}
    whole = ai.completions.create(**asked, echo=True, logprobs=1)
    chunks = [chunk.choices[0] for chunk in ai.completions.create(**asked, echo=True, logprobs=1, stream=True)]
    for choice in whole.choices:
        parts = [chunk for chunk in chunks if chunk.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        told = [part.logprobs for part in parts if part.logprobs]
        assert [token for each in told for token in each.tokens] == choice.logprobs.tokens
        assert [offset for each in told for offset in each.text_offset] == choice.logprobs.text_offset
    assert chunks[0].text == "The ferry left"


def test_logprobs_seed_stop_and_n(ai: openai.OpenAI) -> None:
    answer = ask(ai, QUESTION, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 12
    assert all(len(entry.top_logprobs) >= 3 and entry.logprob <= 0 for entry in content)
    drawn = [
        ask(ai, QUESTION, temperature=1, seed=seed, max_tokens=20).choices[0].message.content for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    text = ask(ai, QUESTION, max_tokens=30).choices[0].message.content
    stop = text[len(text) // 2 :][:4]
    stopped = ask(ai, QUESTION, max_tokens=30, stop=[stop])
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    two = ask(ai, QUESTION, n=2, temperature=1, seed=3)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[0].message.content != two.choices[1].message.content


def test_json_and_tools(ai: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    for response_format in (
        {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}},
        {"type": "json_object", "schema": schema},
    ):
        answer = ask(ai, QUESTION, response_format=response_format, max_tokens=200, temperature=0.5, seed=1)
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(answer.choices[0].message.content)["n"], int)
        else:
            assert answer.choices[0].message.content.lstrip().startswith("{")
    tool = {"type": "function", "function": {"name": "look_up", "parameters": schema}}
    forced = ask(ai, QUESTION, tools=[tool], tool_choice="required", max_tokens=200)
    assert forced.choices[0].message.tool_calls[0].function.name == "look_up"
    assert forced.choices[0].message.tool_calls[0].function.arguments.startswith("{")


NAME = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


def test_strings_of_a_schema_are_json(ai: openai.OpenAI) -> None:
    """llama_cpp's own grammar lets line breaks into them, which this model is fond of."""
    tool = {"type": "function", "function": {"name": "call", "parameters": NAME}}
    n_complete = 0
    for seed in range(12):
        sampling = {"temperature": 0.8, "seed": seed, "max_tokens": 300}
        said = ask(
            ai,
            [{"role": "user", "content": "Make one"}],
            response_format={"type": "json_schema", "json_schema": {"name": "name", "schema": NAME}},
            **sampling,
        ).choices[0]
        called = ask(ai, QUESTION, tools=[tool], tool_choice="required", **sampling).choices[0]
        for reason, text in (
            (said.finish_reason, said.message.content),
            (called.finish_reason, called.message.tool_calls[0].function.arguments),
        ):
            if reason != "length" and text.rstrip().endswith("}"):
                assert set(json.loads(text)) == {"name"}
                n_complete += 1
    assert n_complete >= 6


@pytest.mark.parametrize("stream", [False, True])
def test_one_of_several_tools_is_required(ai: openai.OpenAI, stream: bool) -> None:
    tools = [{"type": "function", "function": {"name": name, "parameters": NAME}} for name in ("greet", "call_up")]
    answer = ask(ai, QUESTION, tools=tools, tool_choice="required", max_tokens=60, stream=stream)
    if stream:
        calls = [call for chunk in answer for choice in chunk.choices for call in choice.delta.tool_calls or []]
        name, arguments = calls[0].function.name, "".join(call.function.arguments for call in calls)
    else:
        [call] = answer.choices[0].message.tool_calls
        name, arguments = call.function.name, call.function.arguments
    assert name in ("greet", "call_up")
    assert re.match(r"\{\s*\"name\"", arguments)


def test_embeddings(ai: openai.OpenAI, client: httpx.Client) -> None:
    texts = ["The ferry left at six.", "The sea was calm."]
    answer = ai.embeddings.create(model="nano", input=texts)
    assert len(answer.data) == 2
    assert np.linalg.norm(answer.data[0].embedding) == pytest.approx(1, abs=0.3)
    plain = client.post("/v1/embeddings", json={"input": texts[0], "encoding_format": "float"}).json()
    np.testing.assert_allclose(plain["data"][0]["embedding"], answer.data[0].embedding, atol=1e-5)
    assert_error(client.post("/v1/embeddings", json={"input": "word " * 2000}), 400, "1 to 512 tokens")


# --- llama.cpp's dialect ----------------------------------------------------------------------------------------------


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
SOUND = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_a_refusal_in_a_history_is_text(client: httpx.Client, path: str) -> None:
    prompts = []
    for part in ({"type": "refusal", "refusal": "I cannot."}, {"type": "output_text", "text": "I cannot."}):
        said = [*QUESTION, {"role": "assistant", "content": [part]}, *QUESTION]
        name = "messages" if "chat" in path else "input"
        limit = "max_tokens" if "chat" in path else "max_output_tokens"
        response = client.post(path, json={name: said, limit: 1, "temperature": 0})
        assert response.status_code == 200, response.text
        usage = response.json()["usage"]
        prompts.append(usage.get("prompt_tokens", usage.get("input_tokens")))
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}, IMAGE]}]},
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [SOUND]}]}),
        ("/v1/completions", {"prompt": [[0.5, -0.25]]}),
        ("/v1/completions", {"prompt": "a", "prompt_embeds": "AAAA"}),
        ("/completion", {"prompt": {"prompt_string": "<__media__>", "multimodal_data": ["AAAA"]}}),
        ("/completion", {"prompt": "[img-1]", "image_data": [{"data": "AAAA", "id": 1}]}),
    ],
)
def test_pictures_sound_and_embeddings_are_refused(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    response = client.post(path, json={**body, "max_tokens": 1, "n_predict": 1})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "\n" not in message
    assert "text" in message or "prompt" in message


def test_health_props_and_slots(client: httpx.Client, server: Served) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    props = client.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == ENDLESS
    assert props["lminf"]["window"] == 128
    assert props["lminf"]["sink"] == 4
    parts = server.engine.parts
    assert props["lminf"]["kv_bytes"] == parts.kv_bytes
    assert props["lminf"]["parts"] == asdict(parts)
    assert (parts.n_layer_full, parts.n_layer_fused, parts.constant_bytes) == (6, 6, parts.sink_bytes)
    assert props["total_slots"] == 2
    assert len(client.get("/slots").json()) == 2
    assert str(Path(server.engine.model.llama.model_path).parent) not in json.dumps(props)


def test_tokenize_and_detokenize(client: httpx.Client) -> None:
    text = "The ferry left — at six."
    tokens = client.post("/tokenize", json={"content": text}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": tokens}).json()["content"].strip() == text
    with_bos = client.post("/tokenize", json={"content": text, "add_special": True}).json()["tokens"]
    assert with_bos[0] == 1
    pieces = client.post("/tokenize", json={"content": text, "with_pieces": True}).json()["tokens"]
    assert [piece["id"] for piece in pieces] == tokens
    assert_error(client.post("/detokenize", json={"tokens": [10**6]}), 400)


def test_a_long_text_is_tokenized_whole(client: httpx.Client, server: Served) -> None:
    """Its answer is encoded in parts."""
    text = "The ferry left at six, and nobody slept. " * 500
    expected = server.engine.model.llama.tokenize(text.encode(), add_bos=False)
    assert len(expected) > 2 * N_AT_ONCE
    assert client.post("/tokenize", json={"content": text}).json() == {"tokens": expected}
    assert client.post("/detokenize", json={"tokens": expected}).json()["content"].strip() == text.strip()
    pieces = client.post("/tokenize", json={"content": text, "with_pieces": True}).json()["tokens"]
    assert [piece["id"] for piece in pieces] == expected
    assert client.post("/tokenize", json={"content": ""}).json() == {"tokens": []}


def test_llama_cpp_completion(client: httpx.Client) -> None:
    body = {"prompt": "The ferry left at six", "n_predict": 8, "temperature": 0}
    whole = client.post("/completion", json=body).json()
    assert whole["content"]
    assert whole["stop"]
    assert (whole["stop_type"], whole["tokens_predicted"], whole["truncated"]) == ("limit", 8, False)
    *chunks, last = events(client.post("/completion", json={**body, "stream": True}).text)
    assert "".join(chunk["content"] for chunk in chunks) == whole["content"]
    assert last["stop"]
    assert last["tokens_cached"] >= last["tokens_evaluated"] - 1
    mixed = client.post("/completion", json={"prompt": [1, "The ferry", 400], "n_predict": 2}).json()
    assert mixed["tokens_predicted"] == 2


def test_penalties_and_ends_as_llama_server_has_them(client: httpx.Client) -> None:
    def said(**fields: Any) -> dict[str, Any]:
        body = {"prompt": "The sea was calm, and the sea", "n_predict": 24, "temperature": 0, **fields}
        answer: dict[str, Any] = client.post("/completion", json=body).json()
        return answer

    plain = said()["content"]
    assert said(repeat_penalty=3)["content"] != plain
    assert said(repeat_penalty=3, repeat_last_n=0)["content"] == plain
    end = {"logit_bias": [[2, 100]]}  # the end-of-text token
    assert said(**end)["stop_type"] == "eos"
    assert said(**end, ignore_eos=True)["tokens_predicted"] == 24


def test_a_chat_that_has_not_begun(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(model="nano", messages=[], max_tokens=4)
    assert answer.usage is not None
    assert 0 < answer.usage.prompt_tokens < 10
    with pytest.raises(openai.BadRequestError, match="only an assistant's"):
        ai.chat.completions.create(model="nano", messages=[], extra_body={"continue_final_message": True})


def test_llama_servers_other_paths(client: httpx.Client) -> None:
    assert client.get("/models").json() == client.get("/v1/models").json()
    body = {"messages": QUESTION, "max_tokens": 3, "temperature": 0}
    one, other = (client.post(f"{prefix}/chat/completions", json=body).json() for prefix in ("", "/v1"))
    assert one["choices"] == other["choices"]
    body = {"input": "Hello", "max_output_tokens": 3, "temperature": 0}
    one, other = (client.post(f"{prefix}/responses", json=body).json() for prefix in ("", "/v1"))
    assert one["output"][0]["content"] == other["output"][0]["content"]
    counts = [client.post(f"{prefix}/responses/input_tokens", json={"input": "Hello"}).json() for prefix in ("", "/v1")]
    assert counts[0] == counts[1]


def test_a_grammar(client: httpx.Client) -> None:
    body = {"prompt": "Is it?", "n_predict": 5, "grammar": 'root ::= "yes" | "no"'}
    assert client.post("/completion", json=body).json()["content"] in ("yes", "no")
    assert_error(client.post("/completion", json={**body, "grammar": "root ::= ("}), 400, "grammar")
    assert client.get("/health").status_code == 200


def test_metrics(client: httpx.Client) -> None:
    text = client.get("/metrics").text
    values = dict(re.findall(r"^(lminf_\w+) ([\d.e+]+)$", text, re.M))
    assert float(values["lminf_slots"]) == 2
    assert float(values["lminf_requests_total"]) > 0
    assert float(values["lminf_memory_bytes"]) <= float(values["lminf_memory_budget_bytes"])


def test_the_openapi_document(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/models", "/completion", "/metrics"} <= set(document["paths"])


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "parts"),
    [
        ("/v1/chat/completions", {}, ("messages",)),
        ("/v1/chat/completions", {"messages": [{"content": "no role"}]}, ("messages",)),
        ("/v1/chat/completions", {"messages": QUESTION, "temperature": -1}, ("temperature",)),
        ("/v1/chat/completions", {"messages": QUESTION, "temperature": "hot"}, ("temperature",)),
        ("/v1/chat/completions", {"messages": QUESTION, "n": 0}, ("n",)),
        ("/v1/chat/completions", {"messages": QUESTION, "logit_bias": {"a": 1}}, ("logit_bias",)),
        ("/v1/chat/completions", {"messages": QUESTION, "response_format": {"type": "xml"}}, ("response_format",)),
        ("/v1/chat/completions", {"messages": QUESTION, "tool_choice": "required"}, ("tool_choice",)),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            ("only text",),
        ),
        ("/v1/completions", {"prompt": [99999]}, ("tokens are 0 to",)),
        ("/v1/completions", {"prompt": {"a": 1}}, ("prompt",)),
        ("/completion", {"prompt": "a", "n_predict": -7}, ("n_predict",)),
        ("/completion", {"prompt": "a", "grammar": "root ::= 1", "json_schema": {}}, ("not both",)),
        ("/tokenize", {"content": 7}, ("content",)),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(
    client: httpx.Client, path: str, body: Any, parts: tuple[str, ...]
) -> None:
    assert_error(client.post(path, json=body), 400, *parts)
    if "stream" not in body:
        assert_error(client.post(path, json={**body, "stream": True}), 400, *parts)


def test_other_wrong_requests(client: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}
    assert_error(client.post("/v1/chat/completions", content=b"{not json", headers=headers), 400, "not JSON")
    assert_error(client.get("/nothing"), 404, "/nothing")
    assert_error(client.get("/v1/chat/completions"), 405)


def test_unknown_fields_are_ignored(client: httpx.Client) -> None:
    body = {"messages": QUESTION, "max_tokens": 1, "cache_prompt": True, "frobnicate": {"a": [1]}, "user": "me"}
    assert client.post("/v1/chat/completions", json=body).status_code == 200


def hang_up(server: Served, body: dict[str, Any], after: float, path: str = "") -> None:
    """Sends a request, for a chat unless there is a path, and closes the connection some seconds after it has begun."""
    data = json.dumps(body).encode()
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port)) as connection:
        head = (
            f"POST {path or '/v1/chat/completions'} HTTP/1.1",
            "Host: 127.0.0.1",
            "Content-Type: application/json",
            f"Content-Length: {len(data)}",
        )
        connection.sendall("\r\n".join((*head, "", "")).encode() + data)
        deadline = time.monotonic() + 10
        while not (state_of(server)._working if path else server.engine.n_busy):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(after)


def state_of(server: Served) -> ServerState:
    state: ServerState = server.server.config.app.state.server  # type: ignore[union-attr]
    return state


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("long_prompt", [False, True])
def test_a_client_that_hangs_up_stops_its_work(server: Served, stream: bool, long_prompt: bool) -> None:
    content = "the sea was calm. " * (40_000 if long_prompt else 1)
    cancelled = server.engine.counters.cancelled
    hang_up(server, {"messages": [{"role": "user", "content": content}], "stream": stream}, after=0.2)
    deadline = time.monotonic() + 5
    while server.engine.n_busy or server.engine.n_waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert server.engine.counters.cancelled == cancelled + 1


NAMES = [f"p{i}" for i in range(900)]
STRICT: Any = {
    "strict": True,
    "parameters": {"type": "object", "properties": {name: {} for name in NAMES}, "required": NAMES},
}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/detokenize", {"tokens": [500] * 2_500_000}),
        ("/tokenize", {"content": "the sea was calm. " * 200_000, "with_pieces": True}),
        ("/v1/completions", {"prompt": "the sea was calm. " * 6_000, "echo": True, "logprobs": 5}),
        ("/v1/completions", {"prompt": [500] * 2_500_000, "echo": True, "max_tokens": 1}),
        ("/v1/completions", {"prompt": "the sea was calm. " * 400_000, "suffix": "the sea was calm. " * 400_000}),
        ("/completion", {"prompt": [1, *["a "] * 1_000_000]}),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "x"}],
                "tools": [{"type": "function", "function": {"name": f"f{i}", **STRICT}} for i in range(900)],
            },
        ),
    ],
)
def test_whatever_a_client_asks_for_ends_when_it_hangs_up(server: Served, path: str, body: dict[str, Any]) -> None:
    hang_up(server, body, 0.3, path)
    deadline = time.monotonic() + 3
    while state_of(server)._working or server.engine.n_busy or server.engine.n_waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_echo_reports_on_so_many_tokens(client: httpx.Client) -> None:
    body = {"prompt": [500] * 50_000, "echo": True, "logprobs": 5, "max_tokens": 1}
    assert_error(client.post("/v1/completions", json=body), 400, "may have 43,690 tokens, not 50,000")


def test_there_are_so_many_prompts(client: httpx.Client) -> None:
    assert_error(client.post("/v1/completions", json={"prompt": ["a"] * 2049}), 400, "2048 of them at most")


def test_progress_and_keep_alives(nano_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(model_name="nano", ping_seconds=0.005)
    with serve(nano_path, settings, lminf=WINDOW, n_ubatch=64) as served:
        body = {
            "messages": [{"role": "user", "content": "the sea was calm. " * 5000}],
            "max_tokens": 2,
            "stream": True,
            "return_progress": True,
        }
        text = kept_alive(served, monkeypatch, "/v1/chat/completions", body)
        progress = [chunk["prompt_progress"] for chunk in events(text)[:-1] if "prompt_progress" in chunk]
        assert len(progress) > 2
        assert all(a["processed"] < b["processed"] for a, b in pairwise(progress))
        assert progress[-1]["processed"] == progress[-1]["total"] > 20_000
        assert ": keep-alive" in text


# --- safety -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(nano_path: str) -> Iterator[Served]:
    settings = Settings(
        model_name="nano", api_keys=("sésame",), origins=("https://friend.example",), max_body=20_000, max_requests=2
    )
    with serve(nano_path, settings, lminf=WINDOW) as served:
        yield served


def test_the_key(guarded: Served) -> None:
    key = {"Authorization": "Bearer sésame".encode()}
    assert httpx.get(f"{guarded.url}/v1/models", headers=key).status_code == 200
    assert httpx.get(f"{guarded.url}/v1/models", headers={"X-Api-Key": "sésame".encode()}).status_code == 200
    for wrong in ({}, {"Authorization": "Bearer sesame"}, {"Authorization": "Basic x"}, {"X-Api-Key": "sesame"}):
        assert_error(httpx.get(f"{guarded.url}/v1/models", headers=wrong), 401, "API key")
        assert_error(httpx.get(f"{guarded.url}/metrics", headers=wrong), 401, "API key")
    assert httpx.get(f"{guarded.url}/health").status_code == 200
    assert httpx.get(f"{guarded.url}/").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_hosts_and_origins(guarded: Served) -> None:
    key = {"Authorization": "Bearer sésame".encode()}
    url = f"{guarded.url}/v1/models"
    assert_error(httpx.get(url, headers={**key, "Host": "evil.example"}), 403, "Host header")
    assert_error(httpx.get(f"{guarded.url}/", headers={"Host": "evil.example:8080"}), 403)
    assert httpx.get(url, headers={**key, "Host": "localhost:1234"}).status_code == 200
    assert_error(httpx.get(url, headers={**key, "Origin": "https://evil.example"}), 403, "evil.example")
    assert_error(httpx.get(url, headers={**key, "Origin": "null"}), 403)
    friend = httpx.get(url, headers={**key, "Origin": "https://friend.example"})
    assert friend.headers["access-control-allow-origin"] == "https://friend.example"
    assert "access-control-allow-credentials" not in friend.headers
    preflight = {"Origin": "https://friend.example", "Access-Control-Request-Method": "POST"}
    assert httpx.options(f"{guarded.url}/v1/chat/completions", headers=preflight).status_code == 200
    own = httpx.get(url, headers={**key, "Origin": guarded.url})
    assert own.status_code == 200


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost:80", "localhost"),
        ("[::1]:80", "::1"),
        ("127.0.0.1", "127.0.0.1"),
        ("LOCALHOST", "localhost"),
        ("[", ""),
        ("", ""),
    ],
)
def test_host_names(header: str, name: str) -> None:
    assert host_name(header) == name


def test_limits(guarded: Served) -> None:
    key = {"Authorization": "Bearer sésame".encode()}
    big = {"messages": [{"role": "user", "content": "x" * 30_000}]}
    assert_error(httpx.post(f"{guarded.url}/v1/chat/completions", json=big, headers=key), 413, "20,000 bytes")
    parts = (b"x" * 1000 for _ in range(30))  # without a Content-Length
    chunked = httpx.post(
        f"{guarded.url}/v1/chat/completions", content=parts, headers={**key, "Content-Type": "application/json"}
    )
    assert_error(chunked, 413)
    assert httpx.get(f"{guarded.url}/v1/models", headers={**key, "X": "y" * 60_000}).status_code in (400, 431)
    with httpx.Client(base_url=guarded.url, headers=key, timeout=60) as client:
        body = {"messages": QUESTION, "stream": True}
        with (
            client.stream("POST", "/v1/chat/completions", json=body) as one,
            client.stream("POST", "/v1/chat/completions", json=body) as two,
        ):
            assert (one.status_code, two.status_code) == (200, 200)
            refused = httpx.get(f"{guarded.url}/v1/models", headers=key)
            assert_error(refused, 503, "try again")
            assert refused.headers["retry-after"] == "1"
    deadline = time.monotonic() + 5
    while httpx.get(f"{guarded.url}/v1/models", headers=key).status_code == 503:
        assert time.monotonic() < deadline


def test_the_page_and_nothing_else(guarded: Served) -> None:
    page = httpx.get(f"{guarded.url}/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for path in (
        "/page/../app.py",
        "/page/..%2fapp.py",
        "/page//etc/passwd",
        "/page/%2e%2e/settings.py",
        "/page/nothing.js",
    ):
        with socket.create_connection((httpx.URL(guarded.url).host, httpx.URL(guarded.url).port)) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while part := connection.recv(65536):
                answer += part
        assert answer.startswith(b"HTTP/1.1 404"), path


def test_answers_are_not_held_back() -> None:
    """Nagle's algorithm is off for whoever connects: with it, the second piece of a stream waits for 40 ms."""

    async def connected() -> int:
        undelayed: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def note(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peer = writer.get_extra_info("socket")
            undelayed.set_result(peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listening = listen("127.0.0.1", 0)
        port = listening.getsockname()[1]
        async with await asyncio.start_server(note, sock=listening):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            result = await undelayed
            writer.close()
        return result

    assert asyncio.run(connected()) != 0


def test_the_log_holds_no_messages(guarded: Served, caplog: pytest.LogCaptureFixture) -> None:
    key = {"Authorization": "Bearer sésame".encode()}
    secret = "the treasure is under the lighthouse"
    with caplog.at_level("DEBUG"):
        body = {"messages": [{"role": "user", "content": secret}], "max_tokens": 1}
        httpx.post(f"{guarded.url}/v1/chat/completions", json=body, headers=key)
        httpx.post(f"{guarded.url}/v1/chat/completions", json={"messages": secret}, headers=key)
    assert secret not in caplog.text
