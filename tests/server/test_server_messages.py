"""Anthropic's Messages API, by its own package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from served import Served, serve

from lminf_edge import LMInfConfig
from lminf_edge.server import Settings
from lminf_edge.text.chat import ChatTemplate
from lminf_edge.text.formats import ChatDefaults, LibraryFormat

SYSTEM = "Go on with the story, in the words of a sailor who has seen a lot, and never hurry."
QUESTION: Any = [{"role": "user", "content": "The ferry left at six, an hour before the sun came over the hills."}]
ALWAYS: Any = {"model": "nano", "max_tokens": 12, "extra_body": {"temperature": 0}}
TOOL: Any = {
    "name": "look_up",
    "description": "Looks a word up.",
    "input_schema": {"type": "object", "properties": {"page": {"type": "integer"}}, "required": ["page"]},
}
WINDOW = LMInfConfig(n_global=4, n_local=128)


@pytest.fixture(scope="module")
def served(nano_path: str) -> Iterator[Served]:
    with serve(nano_path, Settings(model_name="nano", api_keys=("one", "two")), lminf=WINDOW) as served:
        yield served


@pytest.fixture(scope="module")
def claude(served: Served) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url, api_key="one", max_retries=0)


def read(usage: Any) -> int:
    """Tokens of the prompt that were processed."""
    return int(usage.input_tokens)


def test_a_conversation_is_read_once(claude: anthropic.Anthropic) -> None:
    first = claude.messages.create(**ALWAYS, system=SYSTEM, messages=QUESTION)
    assert (first.type, first.role, first.model, first.stop_reason) == ("message", "assistant", "nano", "max_tokens")
    assert first.usage.output_tokens == 12
    assert first.usage.cache_read_input_tokens == 0
    assert first.content[0].type == "text"
    history = [*QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": "And then?"}]
    counted = claude.messages.count_tokens(model="nano", system=SYSTEM, messages=history).input_tokens
    with claude.messages.stream(**ALWAYS, system=SYSTEM, messages=history) as stream:
        kinds = [event.type for event in stream if event.type != "text"]
    second = stream.get_final_message()
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    n_cached = second.usage.cache_read_input_tokens or 0
    assert n_cached + read(second.usage) == counted
    assert n_cached >= read(first.usage)  # the whole first prompt, and most of the answer
    assert read(second.usage) < 30
    again = claude.messages.create(**ALWAYS, system=SYSTEM, messages=history)
    assert again.content[0].text == second.content[0].text  # type: ignore[union-attr]
    assert read(again.usage) <= 1


def test_what_differs_in_every_request_is_left_out(claude: anthropic.Anthropic) -> None:
    def ask(stamp: str, *more: Any) -> anthropic.types.Message:
        header = f"x-anthropic-billing-header: cc_version=2.1.197.{stamp}; cc_entrypoint=cli; cch={stamp};"
        system: Any = [
            {"type": "text", "text": header},
            {"type": "text", "text": f"You tell of ships. {SYSTEM}", "cache_control": {"type": "ephemeral"}},
        ]
        return claude.messages.create(
            **ALWAYS,
            system=system,
            messages=[*QUESTION, *more],
            metadata={"user_id": stamp},
            extra_headers={"x-request": stamp},
        )

    first = ask("1c0ab")
    # a side request for a title in between, on a server of two slots, and another
    for i in range(3):
        claude.messages.create(**ALWAYS, system=f"Title {i}, in three words.", messages=QUESTION)
    second = ask("9fe21", {"role": "assistant", "content": first.content}, {"role": "user", "content": "Why?"})
    assert second.usage.cache_read_input_tokens >= read(first.usage) - 1  # type: ignore[operator]
    joined = claude.messages.count_tokens(
        model="nano", messages=QUESTION, system="x-anthropic-billing-header: cc_version=2; cch=a5145;Tell of ships."
    )
    plain = claude.messages.count_tokens(model="nano", messages=QUESTION, system="Tell of ships.")
    assert joined == plain


def test_tools(claude: anthropic.Anthropic) -> None:
    tools = [TOOL, {"type": "web_search_20250305", "name": "web_search"}]  # the second is none of ours: skipped
    asked: Any = {"tools": tools, "tool_choice": {"type": "tool", "name": "look_up"}, "messages": QUESTION}
    answer = claude.messages.create(**{**ALWAYS, "max_tokens": 60}, **asked)
    assert answer.stop_reason == "tool_use"
    (call,) = answer.content
    assert call.type == "tool_use"
    assert call.name == "look_up"
    assert call.id.startswith("toolu_")
    assert isinstance(call.input["page"], int)
    with claude.messages.stream(**{**ALWAYS, "max_tokens": 60}, **asked) as stream:
        parts = [event.partial_json for event in stream if event.type == "input_json"]
    assert stream.get_final_message().content[0].input == call.input  # type: ignore[union-attr]
    assert len(parts) > 1
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "A boat."}]}
    history = [*QUESTION, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    more = claude.messages.create(**ALWAYS, tools=tools, messages=history)
    assert more.content[0].type == "text"
    result["tool_use_id"] = "toolu_other"
    with pytest.raises(anthropic.BadRequestError, match="no such call"):
        claude.messages.create(**ALWAYS, tools=tools, messages=history)


def test_blocks_of_all_kinds(claude: anthropic.Anthropic) -> None:
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]},
        {"role": "system", "content": "Somebody has come in."},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "none"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Yes."},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "A page."}},
                {"type": "search_result", "source": "x", "title": "y", "content": [{"type": "text", "text": "Found."}]},
            ],
        },
    ]
    answer = claude.messages.create(
        **{**ALWAYS, "extra_body": {"top_k": 5, "output_config": {"effort": "low"}}},
        messages=messages,
        thinking={"type": "disabled"},
    )
    assert answer.usage.output_tokens == 12
    shape = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    answer = claude.messages.create(
        model="nano",
        max_tokens=40,
        messages=QUESTION,
        extra_body={"temperature": 0, "output_config": {"format": {"type": "json_schema", "schema": shape}}},
    )
    assert answer.content[0].text.startswith("{")  # type: ignore[union-attr]


THINKS = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""


def test_thoughts_have_a_budget(served: Served, claude: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch) -> None:
    service = served.service
    thinks = LibraryFormat(service.llm, ChatDefaults(template=THINKS))
    monkeypatch.setattr(service, "template", ChatTemplate(service.llm, thinks, service.tokenizer))
    asked = {**ALWAYS, "max_tokens": 60, "messages": QUESTION}
    kinds = []
    for budget in (8, 50_000):
        answer = claude.messages.create(**asked, thinking={"type": "enabled", "budget_tokens": budget})
        kinds.append([block.type for block in answer.content])
        if budget == 8:
            thoughts: Any = answer.content[0]
            assert len(service.llm.tokenize(thoughts.thinking.encode(), False)) <= 8 + 4
    assert kinds == [["thinking", "text"], ["thinking"]]  # nano never ends thoughts by itself


def test_stop_sequences(claude: anthropic.Anthropic) -> None:
    text = claude.messages.create(**{**ALWAYS, "max_tokens": 40}, messages=QUESTION).content[0].text  # type: ignore[union-attr]
    word = text.split()[3]
    answer = claude.messages.create(**ALWAYS, messages=QUESTION, stop_sequences=["qqq", word])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", word)
    assert answer.content[0].text == text[: text.index(word)]  # type: ignore[union-attr]


def test_compaction_is_answered_and_costs_nothing(claude: anthropic.Anthropic) -> None:
    def ask(messages: Any, at: int = 50, **more: Any) -> Any:
        edit = {"type": "compact_20260112", "trigger": {"type": "input_tokens", "value": at}, **more}
        return claude.beta.messages.create(
            **ALWAYS,
            system=SYSTEM,
            messages=messages,
            context_management={"edits": [edit]},
            betas=["compact-2026-01-12"],
        )

    whole: list[Any] = list(QUESTION)
    short: list[Any] = list(QUESTION)  # what a client sends that drops everything before the last compaction
    n_compacted = 0
    before = 0
    for turn in range(6):
        answer = ask(short)
        kinds = [block.type for block in answer.content]
        assert kinds in (["text"], ["compaction", "text"])
        text = answer.content[-1].text
        n_prompt = read(answer.usage) + answer.usage.cache_read_input_tokens
        whole += [{"role": "assistant", "content": text}, {"role": "user", "content": f"And then, {turn}?"}]
        blocks = [block.model_dump() for block in answer.content]
        short += [{"role": "assistant", "content": blocks}, {"role": "user", "content": f"And then, {turn}?"}]
        if kinds[0] == "compaction":
            n_compacted += 1
            short = short[-2:]
        if turn:
            assert read(answer.usage) < 30  # only what is new
            assert n_prompt > before
        before = n_prompt
    assert 1 < n_compacted < 6
    both = [claude.beta.messages.count_tokens(model="nano", system=SYSTEM, messages=each) for each in (whole, short)]
    assert both[0].input_tokens == both[1].input_tokens
    paused = ask(short, 1, pause_after_compaction=True)
    assert (paused.stop_reason, [block.type for block in paused.content]) == ("compaction", ["compaction"])
    now = claude.beta.messages.create(**ALWAYS, system=SYSTEM, messages=short, compaction={"type": "summarize"})
    assert [block.type for block in now.content] == ["compaction"]
    edit: Any = {"edits": [{"type": "compact_20260112", "trigger": {"type": "input_tokens", "value": 1}}]}
    with claude.beta.messages.stream(
        **ALWAYS, messages=QUESTION, context_management=edit, betas=["compact-2026-01-12"]
    ) as stream:
        for _ in stream:
            pass
    block = stream.get_final_message().content[0]
    assert block.type == "compaction"
    assert block.content
    other = anthropic.Anthropic(base_url=str(claude.base_url), api_key="two", max_retries=0)
    with pytest.raises(anthropic.BadRequestError, match="does not keep"):  # another key's
        other.beta.messages.create(**ALWAYS, messages=short)


def test_a_chat_that_has_not_begun(claude: anthropic.Anthropic) -> None:
    assert claude.messages.create(**ALWAYS, messages=[]).usage.input_tokens < 10
    assert claude.messages.count_tokens(model="nano", messages=[]).input_tokens < 10


@pytest.mark.parametrize(
    ("body", "about"),
    [
        ({}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "base64"}}]}]}, "document"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": 3}]}, "content"),
        ({"messages": [{"role": "user", "content": ""}]}, "no text"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "tool_use"),
        ({"messages": QUESTION, "system": [{"type": "image"}]}, "system"),
        ({"messages": QUESTION, "max_tokens": 0}, "max_tokens"),
        ({"messages": QUESTION, "tools": [{"description": "x"}]}, "tools"),
        ({"messages": QUESTION, "tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "no tool"),
        ({"messages": QUESTION, "tool_choice": {"type": "some"}}, "tool_choice"),
        ({"messages": QUESTION, "output_config": {"format": {"type": "x"}}}, "json_schema"),
        (
            {"messages": QUESTION, "context_management": {"edits": [{"type": "compact_20260112", "trigger": {}}]}},
            "edits",
        ),
        ({"messages": QUESTION, "context_management": {"edits": [{"type": "forget"}]}}, "forget"),
        ({"messages": QUESTION, "thinking": {"type": "enabled", "budget_tokens": "x"}}, "budget_tokens"),
        ({"messages": QUESTION, "lminf": {"recall": 5}}, "recall"),
    ],
)
def test_bad_input(served: Served, body: Any, about: str) -> None:
    for stream in (False, True):
        answer = httpx.post(f"{served.url}/v1/messages", json={**body, "stream": stream}, headers={"x-api-key": "one"})
        assert answer.status_code == 400, answer.text
        error = answer.json()
        assert error["type"] == "error"
        assert error["error"]["type"] == "invalid_request_error"
        assert about in error["error"]["message"]


def test_clearing_needs_no_work(served: Served, claude: anthropic.Anthropic) -> None:
    edits: Any = [{"type": "clear_tool_uses_20250919"}, {"type": "clear_thinking_20251015", "keep": "all"}]
    made = claude.beta.messages.create(**ALWAYS, messages=QUESTION, context_management={"edits": edits})
    assert made.stop_reason


def test_errors_have_the_shape_of_the_api(served: Served, claude: anthropic.Anthropic) -> None:
    answer = httpx.post(f"{served.url}/v1/messages?beta=true", json={"messages": QUESTION})
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"
    assert httpx.get(f"{served.url}/v1/messages", headers={"x-api-key": "one"}).json()["type"] == "error"
    assert httpx.head(f"{served.url}/").status_code == 200
    assert claude.models.list().data[0].id == "nano"


def test_compacted_conversations_survive_a_restart(nano_path: str, tmp_path: Path) -> None:
    edit: Any = {"edits": [{"type": "compact_20260112", "trigger": {"type": "input_tokens", "value": 1}}]}
    for turn in range(2):
        with serve(nano_path, lminf=WINDOW, folder=tmp_path) as served:
            claude = anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)
            if turn == 0:
                answer: Any = claude.beta.messages.create(
                    **ALWAYS, system=SYSTEM, messages=QUESTION, context_management=edit
                )
                continue
            blocks = [block.model_dump() for block in answer.content]
            messages: Any = [{"role": "assistant", "content": blocks}, {"role": "user", "content": "Why?"}]
            again = claude.beta.messages.create(**ALWAYS, system=SYSTEM, messages=messages)
            n_first = answer.usage.input_tokens
            assert again.usage.cache_read_input_tokens >= n_first  # type: ignore[operator]
