"""OpenAI's Responses API, by its own package."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served import Served, serve
from test_server_messages import THINKS

from lminf_edge import LMInfConfig
from lminf_edge.engine.request import RequestCancelled
from lminf_edge.models import find_model
from lminf_edge.server import Settings
from lminf_edge.server.budget import SMALL, Budget, Share
from lminf_edge.server.errors import ApiError
from lminf_edge.server.response_requests import opened, sealed
from lminf_edge.server.stored import SUFFIX, Response, StoredResponses
from lminf_edge.text.chat import ChatTemplate
from lminf_edge.text.formats import ChatDefaults, LibraryFormat

SYSTEM = "Go on with the story, in the words of a sailor who has seen a lot, and never hurry."
QUESTION = "The ferry left at six, an hour before the sun came over the hills."
ALWAYS: Any = {"model": "nano", "max_output_tokens": 12, "temperature": 0}
TOOL: Any = {
    "type": "function",
    "name": "look_up",
    "description": "Looks a word up.",
    "strict": False,
    "parameters": {
        "type": "object",
        "properties": {"page": {"type": "integer"}, "word": {"type": "string", "maxLength": 5000}},
        "required": ["page"],
    },
}
WINDOW = LMInfConfig(n_global=4, n_local=128)


@pytest.fixture(scope="module")
def served(nano_path: str) -> Iterator[Served]:
    with serve(nano_path, Settings(model_name="nano", api_keys=("one", "two")), lminf=WINDOW) as served:
        yield served


@pytest.fixture(scope="module")
def ai(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="one", max_retries=0)


def n_read(response: Any) -> int:
    """Tokens of the prompt that were processed."""
    usage = response.usage
    return int(usage.input_tokens - usage.input_tokens_details.cached_tokens)


def test_a_response(ai: openai.OpenAI) -> None:
    answer = ai.responses.create(**ALWAYS, instructions=SYSTEM, input=QUESTION, metadata={"a": "b"})
    assert answer.id.startswith("resp_")
    assert (answer.status, answer.model, answer.metadata) == ("incomplete", "nano", {"a": "b"})
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 12
    counted = ai.responses.input_tokens.count(model="nano", instructions=SYSTEM, input=QUESTION)
    assert counted.input_tokens == answer.usage.input_tokens
    # the whole history as items, as Codex sends it, with kinds of tools that are none of ours
    items: Any = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": SYSTEM}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        *(item.model_dump() for item in answer.output),
        {"role": "user", "content": "And then?"},
    ]
    tools: Any = [{"type": "web_search"}, {"type": "namespace", "name": "x", "tools": []}]
    more = ai.responses.create(**ALWAYS, input=items, tools=tools, tool_choice="auto", store=False)
    assert more.usage is not None
    assert more.usage.input_tokens_details.cached_tokens >= answer.usage.input_tokens
    assert n_read(more) < 30
    probe = ai.responses.create(model="nano", input=[], max_output_tokens=1, store=False)
    assert probe.status == "incomplete"


def test_telemetry_of_clients_changes_nothing(ai: openai.OpenAI) -> None:
    """Fields and headers that Codex and others send about themselves; kinds of any JSON."""
    asked: Any = {**ALWAYS, "input": QUESTION, "store": False}
    about: Any = {
        "client_metadata": {"x-codex-installation-id": "0", "x-codex-turn-metadata": '{"turn_id":"1"}'},
        "service_tier": "priority",
        "safety_identifier": "a",
        "stream_options": {"include_obfuscation": False},
        "telemetry": [{"trace": None}, 1.5],
        "text": {"verbosity": "low"},
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"summary": "auto"},
    }
    names = ("originator", "session_id", "x-codex-turn-state", "x-codex-beta-features", "x-openai-subagent", "version")
    headers = {**dict.fromkeys(names, "x" * 500), "traceparent": f"00-{'1' * 32}-{'2' * 16}-01", "OpenAI-Beta": "a=b"}
    plain = ai.responses.create(**asked).output_text
    assert ai.responses.create(**asked, extra_body=about, extra_headers=headers).output_text == plain
    *_, last = ai.responses.create(**asked, stream=True, extra_body=about, extra_headers=headers)
    assert last.response.output_text == plain  # type: ignore[union-attr]


def test_the_events_of_a_stream(ai: openai.OpenAI) -> None:
    whole = ai.responses.create(**ALWAYS, input=QUESTION)
    kinds, deltas = [], []
    for i, event in enumerate(ai.responses.create(**ALWAYS, input=QUESTION, stream=True)):
        assert event.sequence_number == i
        kinds.append(event.type.removeprefix("response."))
        if event.type == "response.output_text.delta":
            deltas.append(event.delta)
        if event.type == "response.output_text.done":
            assert event.text == "".join(deltas)
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert event.response.output_text == whole.output_text == "".join(deltas)  # type: ignore[union-attr]
    more: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    *_, last = ai.responses.create(**ALWAYS, input=QUESTION, stream=True, **more)
    part = last.response.output[0].content[0]  # type: ignore[union-attr]
    assert part.text == whole.output_text  # type: ignore[union-attr]
    assert len(part.logprobs[0].top_logprobs) == 2  # type: ignore[union-attr, index]


def test_tools(ai: openai.OpenAI) -> None:
    asked: Any = {**ALWAYS, "max_output_tokens": 80, "tools": [TOOL], "input": QUESTION}
    choice: Any = {"type": "function", "name": "look_up"}
    answer = ai.responses.create(**asked, tool_choice=choice)
    (call,) = answer.output
    assert call.type == "function_call"
    assert call.name == "look_up"
    kinds = []
    for event in ai.responses.create(**asked, tool_choice="required", stream=True):
        kinds.append(event.type.removeprefix("response."))
        if event.type == "response.function_call_arguments.done":
            assert event.arguments == call.arguments
    assert kinds[:3] == ["created", "in_progress", "output_item.added"]
    assert kinds[-3:-1] == ["function_call_arguments.done", "output_item.done"]
    assert set(kinds[3:-3]) == {"function_call_arguments.delta"}
    allowed: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look_up"}]}
    assert ai.responses.create(**asked, tool_choice=allowed).output[0].type == "function_call"
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "A boat."}
    more = ai.responses.create(**ALWAYS, tools=[TOOL], input=[result], previous_response_id=answer.id)
    assert more.output[0].type == "message"
    with pytest.raises(openai.BadRequestError, match="no such call"):
        ai.responses.create(**ALWAYS, tools=[TOOL], input=[result])


def test_text_formats(ai: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    shape: Any = {"format": {"type": "json_schema", "name": "number", "schema": schema, "strict": True}}
    assert ai.responses.create(**{**ALWAYS, "max_output_tokens": 40}, input=QUESTION, text=shape).output_text[0] == "{"
    assert ai.responses.create(**ALWAYS, input=QUESTION, text={"format": {"type": "text"}}).output_text[0] != "{"


def test_a_conversation_of_stored_responses(ai: openai.OpenAI, served: Served) -> None:
    answer: Any = None
    history: list[Any] = []
    for turn in range(5):
        said = QUESTION if turn == 0 else f"And then, {turn}?"
        before = answer.id if answer else None
        answer = ai.responses.create(**ALWAYS, instructions=SYSTEM, input=said, previous_response_id=before)
        if turn:
            assert n_read(answer) < 30
        history += [{"role": "user", "content": said}, {"role": "assistant", "content": answer.output_text}]
    whole = ai.responses.input_tokens.count(model="nano", instructions=SYSTEM, input=history[:-1])
    assert whole.input_tokens == answer.usage.input_tokens
    assert ai.responses.retrieve(answer.id).output_text == answer.output_text
    (item,) = ai.responses.input_items.list(answer.id).data
    assert item.content[0].text == "And then, 4?"  # type: ignore[union-attr]
    reference: Any = [{"type": "item_reference", "id": answer.output[0].id}, {"role": "user", "content": "Why?"}]
    assert ai.responses.create(**ALWAYS, input=reference).output_text
    # another branch, after what it goes on from was deleted
    ai.responses.delete(answer.previous_response_id)
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(answer.previous_response_id)
    assert n_read(ai.responses.create(**ALWAYS, instructions=SYSTEM, input="Why?", previous_response_id=answer.id)) < 30
    other = openai.OpenAI(base_url=str(ai.base_url), api_key="two", max_retries=0)
    for ask in (other.responses.retrieve, other.responses.delete, other.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            ask(answer.id)
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        other.responses.create(**ALWAYS, input="Why?", previous_response_id=answer.id)
    kept = ai.responses.create(**ALWAYS, input=QUESTION, store=False)
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(kept.id)


def test_compaction_is_answered_and_costs_nothing(ai: openai.OpenAI) -> None:
    short: list[Any] = [{"role": "user", "content": QUESTION}]
    n_compacted = before = 0
    for turn in range(6):
        managed: Any = [{"type": "compaction", "compact_threshold": 50}]
        answer = ai.responses.create(
            **ALWAYS, instructions=SYSTEM, input=short, context_management=managed, store=False
        )
        kinds = [item.type for item in answer.output]
        assert kinds in (["message"], ["compaction", "message"])
        if kinds[0] == "compaction":
            n_compacted += 1
            short = []
        assert answer.usage is not None
        assert answer.usage.input_tokens > before  # nothing is lost
        assert not turn or n_read(answer) < 30  # and only what is new is read
        before = answer.usage.input_tokens
        short += [item.model_dump(exclude_none=True) for item in answer.output]
        short += [{"role": "user", "content": f"And then, {turn}?"}]
    assert 1 < n_compacted < 6
    (item,) = ai.responses.compact(model="nano", instructions=SYSTEM, input=short).output
    dumped: Any = item.model_dump(exclude_none=True)
    assert dumped["type"] == "compaction"
    counted = [
        ai.responses.input_tokens.count(
            model="nano", instructions=SYSTEM, input=[*each, {"role": "user", "content": "?"}]
        )
        for each in (short, [dumped])
    ]
    assert counted[0].input_tokens == counted[1].input_tokens
    triggered = ai.responses.create(**ALWAYS, input=[*short, {"type": "compaction_trigger"}])
    assert [item.type for item in triggered.output] == ["compaction"]
    with pytest.raises(openai.BadRequestError, match="does not keep"):
        ai.responses.create(**ALWAYS, input=[{"type": "compaction", "encrypted_content": "x"}])


def test_the_event_of_an_error_is_the_next_one(nano_path: str) -> None:
    body = {"input": QUESTION, "stream": True, "max_output_tokens": 100_000}
    with (
        serve(nano_path, lminf=WINDOW) as served,
        httpx.stream("POST", f"{served.url}/v1/responses", json=body, timeout=60) as stream,
    ):
        events = (json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: "))
        told = [next(events) for _ in range(6)]
        served.server.should_exit = True
        told += events
    assert told[-1]["type"] == "error"
    assert [event["sequence_number"] for event in told] == list(range(len(told)))


def test_thoughts_are_some_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their number is that of their text, which need not be made of the same tokens."""
    with serve(find_model("nano-alibi"), lminf=WINDOW) as served:
        service = served.service
        thinks = LibraryFormat(service.llm, ChatDefaults(template=THINKS))
        monkeypatch.setattr(service, "template", ChatTemplate(service.llm, thinks, service.tokenizer))
        for seed in range(12):
            body = {"input": "Tell", "max_output_tokens": 60, "temperature": 3, "seed": seed}
            usage = httpx.post(f"{served.url}/v1/responses", json=body, timeout=60).json()["usage"]
            assert 0 < usage["output_tokens_details"]["reasoning_tokens"] <= usage["output_tokens"] <= 60


def test_what_is_gone_on_from_may_be_deleted_meanwhile(ai: openai.OpenAI) -> None:
    first = ai.responses.create(**ALWAYS, instructions=SYSTEM, input=QUESTION)
    asked: Any = {**ALWAYS, "instructions": SYSTEM, "input": "And then?", "previous_response_id": first.id}
    with ai.responses.create(**asked, stream=True) as stream:
        next(iter(stream))
        ai.responses.delete(first.id)
        *_, last = stream
    answer = last.response  # type: ignore[union-attr]
    after = ai.responses.create(**ALWAYS, instructions=SYSTEM, input="Why?", previous_response_id=answer.id)
    assert after.usage is not None
    assert after.usage.input_tokens > answer.usage.total_tokens
    assert n_read(after) < 30


def test_input_items_come_in_pages(ai: openai.OpenAI, served: Served) -> None:
    said = [{"role": ("user", "assistant")[i % 2], "content": str(i)} for i in range(5)]
    answer = ai.responses.create(**ALWAYS, input=said)  # type: ignore[arg-type]

    def texts(**how: Any) -> list[str]:
        return [item.content[0].text for item in ai.responses.input_items.list(answer.id, **how)]  # type: ignore[union-attr]

    assert texts() == texts(limit=2) == texts(limit=1) == list("43210")  # the package asks for all pages
    assert texts(order="asc", limit=3) == list("01234")
    page = ai.responses.input_items.list(answer.id, limit=2)
    assert page.has_more
    assert len(page.data) == 2
    after: Any = page.data[-1].id
    assert texts(after=after) == list("210")
    for how in ({"after": "in_1"}, {"limit": 0}, {"order": "up"}):
        with pytest.raises(openai.BadRequestError, match=next(iter(how))):
            texts(**how)
    with pytest.raises(openai.BadRequestError, match="only while it is made"):
        ai.responses.retrieve(answer.id, stream=True)


def test_thoughts_are_passed_on_sealed() -> None:
    assert opened(sealed("Hm, ☃.")) == "Hm, ☃."
    assert [opened(each) for each in (None, "x", "lminf:%", "lminf:/w==")] == [""] * 4


@pytest.mark.parametrize(
    ("body", "about"),
    [
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input_file"),
        ({"input": [{"role": "robot", "content": "x"}]}, "role"),
        ({"input": [{"type": "something"}]}, "something"),
        ({"input": [{"type": "function_call", "name": "x"}]}, "call_id"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "msg_1"),
        ({"input": 5}, "input"),
        ({"input": "x", "previous_response_id": "resp_1"}, "resp_1"),
        ({"input": "x", "conversation": "conv_1"}, "conversation"),
        ({"input": "x", "prompt": {"id": "p"}}, "prompt"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format"),
        ({"input": "x", "tools": [{"type": "function"}]}, "tools"),
        ({"input": "x", "tools": [TOOL], "tool_choice": {"type": "web_search"}}, "web_search"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice"),
        ({"input": "x", "context_management": [{"type": "compaction", "compact_threshold": "x"}]}, "compact_threshold"),
    ],
)
def test_bad_input(served: Served, body: Any, about: str) -> None:
    headers = {"Authorization": "Bearer one"}
    for stream in (False, True):
        answer = httpx.post(f"{served.url}/v1/responses", json={**body, "stream": stream}, headers=headers)
        assert answer.status_code == 400, answer.text
        assert about in answer.json()["error"]["message"]


def test_stored_responses_survive_a_restart(nano_path: str, tmp_path: Path) -> None:
    answers: list[Any] = []
    for _ in range(3):
        with serve(nano_path, lminf=WINDOW, folder=tmp_path) as served:
            ai = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
            before = answers[-1].id if answers else None
            answers.append(
                ai.responses.create(**ALWAYS, instructions=SYSTEM, input=QUESTION, previous_response_id=before)
            )
    assert n_read(answers[2]) < n_read(answers[0])
    sizes = [path.stat().st_size for path in tmp_path.rglob(f"*{SUFFIX}")]
    assert len(sizes) == 3
    assert max(sizes) < min(sizes) + 300  # none has what came before it


def test_a_long_chain_counts_as_a_long_body(nano_path: str) -> None:
    settings = Settings(model_name="nano", max_body=100_000)
    with serve(nano_path, settings, lminf=replace(WINDOW, prefill="tail")) as served:
        ai = openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0)
        budget = served.server.config.app.state.server.budget  # type: ignore[union-attr]
        ids: list[str] = []
        more: Any = {**ALWAYS, "input": "the sea was calm. " * 4500}
        for _ in range(8):  # 4 bodies, and what of each does not count
            before = {"previous_response_id": ids[-1]} if ids else {}
            ids.append(ai.responses.create(**more, **before).id)
        with pytest.raises(openai.APIStatusError, match="compact it, or begin a new one") as refused:
            ai.responses.create(**more, previous_response_id=ids[-1])
        assert refused.value.status_code == 413
        assert budget.n_held == 0
        ai.responses.create(**ALWAYS, input="and", previous_response_id=ids[-3])
        budget.n_held = 4 * 100_000  # others are at work
        with pytest.raises(openai.InternalServerError, match="Other long requests"):
            ai.responses.create(**ALWAYS, input="and", previous_response_id=ids[-3])
        ai.responses.create(**ALWAYS, input="and", previous_response_id=ids[0])
        items = [{"type": "item_reference", "id": f"msg_{each.removeprefix('resp_')}00"} for each in ids]
        with pytest.raises(openai.InternalServerError, match="Other long requests"):
            ai.responses.create(**ALWAYS, input=[*items, {"role": "user", "content": "and"}])  # type: ignore[call-overload]


def test_shares_end() -> None:
    budget = Budget(1000)
    one, two = Share(budget), Share(budget)
    one.take(SMALL)
    assert budget.n_held == 0
    one.take(600)
    two.take(SMALL + 400)
    with pytest.raises(ApiError, match="Other long requests"):
        two.take(1)
    with pytest.raises(ApiError, match="compact it"):
        two.take(601)
    one.close()
    two.take(600)
    two.close()
    with pytest.raises(RequestCancelled):
        two.take(1)
    assert budget.n_held == 0


# --- the store --------------------------------------------------------------------------------------------------------


def made(parent: str = "", text: str = "x", owner: str = "me") -> Response:
    return Response(owner, parent, 1, 0, [{"text": text}], [{"text": text.upper()}], {"id": text})


def chain(stored: StoredResponses, *texts: str) -> list[Response]:
    responses: list[Response] = []
    for text in texts:
        responses.append(made(responses[-1].name if responses else "", text))
        stored.add(responses[-1])
    return responses


def words(stored: StoredResponses, response: Response) -> str:
    return "".join(item["text"] for item in stored.history(response) or [])


@pytest.mark.parametrize("on_disk", [True, False])
def test_chains(tmp_path: Path, on_disk: bool) -> None:
    stored = StoredResponses(tmp_path if on_disk else None, 1 << 20)
    a, b, c = chain(stored, "a", "b", "c")
    d = made(a.name, "d")
    stored.add(d)
    assert words(stored, c) == "aAbBcC"
    assert words(stored, d) == "aAdD"
    assert stored.get(a.name, "you") is None
    assert not stored.delete(a.name, "you")
    assert stored.delete(b.name, "me")
    assert not stored.delete(b.name, "me")
    assert stored.get(b.name, "me") is None
    if on_disk:
        stored = StoredResponses(tmp_path, 1 << 20)
        assert stored.get(b.name, "me") is None
    assert words(stored, c) == "aAbBcC"
    assert stored.delete(a.name, "me")
    assert stored.delete(c.name, "me")  # and b, which nothing needs any more
    assert len(stored) == 2
    assert stored.delete(d.name, "me")
    assert len(stored) == stored.n_bytes == 0
    assert not list(tmp_path.iterdir())


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    stored = StoredResponses(tmp_path, 12 * 1000)
    first, second = chain(stored, "a", "b"), chain(stored, "c", "d")
    for _ in range(20):
        stored.get(first[-1].name, "me")
        stored.add(made(text="x" * 500))
    assert stored.get(second[0].name, "me") is None
    assert words(stored, first[1]) == "aAbB"
    assert stored.n_bytes <= 12 * 1000
    again = StoredResponses(tmp_path, 12 * 1000)
    assert len(again) == len(stored)
    assert words(again, first[1]) == "aAbB"


def test_damage_is_no_error(tmp_path: Path) -> None:
    noted: list[BaseException] = []
    stored = StoredResponses(tmp_path, 1 << 20)
    a, b = chain(stored, "a", "b")
    path = tmp_path / f"{a.name}{SUFFIX}"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    (tmp_path / f"{'0' * 32}{SUFFIX}").write_bytes(b"something else")
    (tmp_path / f"{'1' * 32}{SUFFIX}.part").write_bytes(b"half")
    os.mkfifo(tmp_path / f"{'2' * 32}{SUFFIX}")
    stored = StoredResponses(tmp_path, 1 << 20, noted.append)
    assert len(stored) == 2
    found = stored.get(b.name, "me")
    assert found is not None
    assert stored.history(found) is None
    assert len(noted) == 1
    assert sorted(each.name[0] for each in tmp_path.iterdir() if each.name[:2] in ("00", "11", "22")) == ["0", "2"]
    (tmp_path / "file").write_text("")
    broken = StoredResponses(tmp_path / "file", 1 << 20, noted.append)
    broken.add(a)  # cannot be written: it is kept in memory
    assert words(broken, a) == "aA"
    assert len(noted) == 3
