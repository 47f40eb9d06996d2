"""Requests of Anthropic's Messages API, and what they are in the chat completions' terms."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from lminf_edge.server.errors import ApiError
from lminf_edge.server.requests import ChatRequest, Many, Sampling, TokenLimit
from lminf_edge.server.turns import Turns, as_arguments, chat_request, text_of, texts

# a line that Claude Code puts before its system prompt, with a hash that changes with every request
_BILLING = re.compile(r"\Ax-anthropic-billing-header:(?:[^\S\n]*[\w-]+=[^;\n]*;)*[^\S\n]*\n?")

COMPACTION = "compact_20260112"
_CLEARING = ("clear_tool_uses_", "clear_thinking_")  # kinds of edits, with the date of a version behind
COMPACT_AT = 150_000  # tokens, unless the request says otherwise


class CountRequest(Sampling):
    """POST /v1/messages/count_tokens"""

    messages: Many[dict[str, Any]]
    system: str | Many[dict[str, Any]] | None = None
    tools: Many[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = Field(None, description="effort, and a format with a JSON schema")
    output_format: dict[str, Any] | None = Field(None, description="the older name of output_config.format")
    context_management: dict[str, Any] | None = None
    compaction: dict[str, Any] | None = Field(None, description="compact the conversation now, and generate nothing")
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesRequest(CountRequest):
    """POST /v1/messages"""

    max_tokens: TokenLimit = Field(None, description="not given: until the model stops")
    stop_sequences: Many[str] | None = None


@dataclass(frozen=True)
class Compaction:
    """When a conversation is to be compacted, and whether the answer then ends."""

    threshold: int
    pauses: bool


def compaction_of(request: CountRequest) -> Compaction | None:
    """The compaction that a request asks for. What clears results or thoughts is not needed here. Raises ApiError."""
    if request.compaction is not None:
        return Compaction(0, pauses=True)
    edits = (request.context_management or {}).get("edits")
    for edit in edits if isinstance(edits, list) else []:
        kind = edit.get("type") if isinstance(edit, dict) else None
        if not isinstance(kind, str) or not (kind == COMPACTION or kind.startswith(_CLEARING)):
            where = "context_management.edits"
            raise ApiError(400, f"{where}: there is no edit {str(kind)[:50]!r}; there is {COMPACTION}.", param=where)
        if kind == COMPACTION:
            trigger = edit.get("trigger")
            value = trigger.get("value") if isinstance(trigger, dict) else COMPACT_AT
            if type(value) is not int or value < 1:
                where = "context_management.edits.trigger"
                raise ApiError(400, f"{where}: its value must be a number of tokens.", param=where)
            return Compaction(value, bool(edit.get("pause_after_compaction")))
    return None


def split_compacted(messages: list[dict[str, Any]]) -> tuple[str | None, list[dict[str, Any]]]:
    """What the last compaction block names, and the messages after it; (None, all messages) if there is none."""
    for i in range(len(messages) - 1, -1, -1):
        content = messages[i].get("content")
        blocks: list[Any] = content if isinstance(content, list) else []
        for j in range(len(blocks) - 1, -1, -1):
            block = blocks[j]
            if isinstance(block, dict) and block.get("type") == "compaction" and block.get("content") is not None:
                rest = blocks[j + 1 :]
                first = [{**messages[i], "content": rest}] if rest else []
                return str(block.get("encrypted_content") or block["content"]), [*first, *messages[i + 1 :]]
    return None, messages


def chat_of(request: CountRequest, messages: list[dict[str, Any]]) -> ChatRequest:
    """The request as a chat completion's, with these messages. Raises ApiError for what cannot be read."""
    turns = Turns()
    system = without_billing(request.system)
    if system:
        turns.system(system)
    for i, message in enumerate(messages):
        _add(turns, message, f"messages.{i}")
    if messages and not turns.messages:
        raise ApiError(400, "messages: there is no text in them.", param="messages")
    is_prefill = (
        bool(turns.messages) and turns.messages[-1]["role"] == "assistant" and "tool_calls" not in turns.messages[-1]
    )
    config = request.output_config or {}
    choice = request.tool_choice or {}
    effort = "none" if (request.thinking or {}).get("type") == "disabled" else config.get("effort")
    return chat_request(
        request,
        turns,
        {
            "max_tokens": getattr(request, "max_tokens", None),
            "stop": getattr(request, "stop_sequences", None),
            "tools": _tools(request.tools),
            "tool_choice": _tool_choice(choice),
            "parallel_tool_calls": False if choice.get("disable_parallel_tool_use") else None,
            "reasoning_effort": effort if isinstance(effort, str) else None,
            "reasoning_budget_tokens": _budget(request.thinking or {}),
            "response_format": _response_format(config.get("format") or request.output_format),
            "continue_final_message": True if is_prefill else None,
            "chat_template_kwargs": request.chat_template_kwargs,
        },
    )


def without_billing(system: str | list[dict[str, Any]] | None) -> str:
    """The text of the system blocks, without what differs in every request."""
    parts = (_BILLING.sub("", part) for part in texts(system, "system"))
    return "\n".join(part for part in parts if part)


def _add(turns: Turns, message: dict[str, Any], where: str) -> None:
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        what = f'{where}.role: it must be "user" or "assistant", not {str(role)[:50]!r}.'
        raise ApiError(400, what, param=f"{where}.role")
    if role == "system":
        if text := text_of(content, f"{where}.content"):
            turns.system(text)
        return
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise ApiError(400, f"{where}.content: it must be text or a list of blocks.", param=f"{where}.content")
    for j, block in enumerate(blocks):
        at = f"{where}.content.{j}"
        if role == "user":
            _add_user(turns, block, at)
        else:
            _add_assistant(turns, block, at)


def _add_user(turns: Turns, block: dict[str, Any], where: str) -> None:
    if block.get("type") == "tool_result":
        turns.result(block.get("tool_use_id"), _result(block.get("content"), f"{where}.content"), where)
    elif text := _text(block, where):
        turns.user(text)


def _add_assistant(turns: Turns, block: dict[str, Any], where: str) -> None:
    kind = block.get("type")
    if kind == "tool_use":
        call_id, name = block.get("id"), block.get("name")
        if not isinstance(call_id, str) or not isinstance(name, str):
            raise ApiError(400, f"{where}: a tool_use has an id and a name.", param=where)
        turns.call(call_id, name, as_arguments(block.get("input")))
    elif kind == "thinking":
        if thoughts := block.get("thinking"):
            turns.thoughts(str(thoughts))
    elif kind not in ("redacted_thinking", "compaction") and (text := _text(block, where)):
        turns.assistant(text)


def _result(content: Any, where: str) -> str:
    """The text of a tool's result."""
    if not isinstance(content, list):
        return text_of(content, where)
    return "\n".join(_text(part if isinstance(part, dict) else {}, f"{where}.{i}") for i, part in enumerate(content))


def _text(block: dict[str, Any], where: str) -> str:
    """The text of a block, of a document, or of a search result. Raises ApiError if it is none of them."""
    kind = block.get("type")
    if kind == "text" and isinstance(block.get("text"), str):
        return str(block["text"])
    if kind == "search_result":
        return text_of(block.get("content"), f"{where}.content")
    source = block.get("source")
    if kind == "document" and isinstance(source, dict):
        if source.get("type") == "text" and isinstance(source.get("data"), str):
            return str(source["data"])
        if source.get("type") == "content":
            return text_of(source.get("content"), f"{where}.source.content")
    raise ApiError(400, f"{where}: only text can be read, not {str(kind)[:50]!r}.", param=where)


def _tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The client's own tools. Those that a server is to run are none of this one's."""
    functions = []
    for i, tool in enumerate(tools or []):
        if tool.get("type") not in (None, "custom"):
            continue
        if not isinstance(tool.get("name"), str):
            raise ApiError(400, f"tools.{i}: a tool has a name.", param="tools")
        function = {"name": tool["name"], "parameters": tool.get("input_schema"), "strict": tool.get("strict") is True}
        if tool.get("description"):
            function["description"] = tool["description"]
        functions.append({"type": "function", "function": function})
    return functions or None


def _tool_choice(choice: dict[str, Any]) -> Any:
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    known: dict[Any, Literal["auto", "required", "none"]] = {"auto": "auto", "any": "required", "none": "none"}
    if kind is not None and (not isinstance(kind, str) or kind not in known):
        what = f'tool_choice: its type must be "auto", "any", "tool" or "none", not {str(kind)[:50]!r}.'
        raise ApiError(400, what, param="tool_choice")
    return known.get(kind)


def _budget(thinking: dict[str, Any]) -> int | None:
    """Tokens of thoughts, None if that is left to the server."""
    budget = thinking.get("budget_tokens")
    if budget is not None and (type(budget) is not int or budget < 0):
        raise ApiError(400, "thinking.budget_tokens: it must be a number of tokens.", param="thinking.budget_tokens")
    return budget if thinking.get("type") == "enabled" else None


def _response_format(wanted: Any) -> dict[str, Any] | None:
    if not isinstance(wanted, dict):
        return None
    if wanted.get("type") != "json_schema":
        what = 'output_config.format: its type must be "json_schema".'
        raise ApiError(400, what, param="output_config.format")
    return {"type": "json_schema", "json_schema": {"schema": wanted.get("schema")}}
