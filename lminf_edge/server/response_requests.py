"""Requests of OpenAI's Responses API, and what they are in the chat completions' terms."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from pydantic import Field

from lminf_edge.server.errors import ApiError
from lminf_edge.server.requests import MAX_LOGPROBS, ChatRequest, Many, Sampling, TokenLimit
from lminf_edge.server.turns import Turns, as_arguments, chat_request, text_of

_TEXTS = ("input_text", "output_text", "refusal", "text", "summary_text", "reasoning_text")
COMPACTIONS = ("compaction", "compaction_summary", "context_compaction")
TRIGGER = "compaction_trigger"
COMPACT_AT = 200_000  # tokens, unless the request says otherwise

# what other servers have run for the model: nothing that could be rendered
_SKIPPED = (
    *("web_search_call", "file_search_call", "computer_call", "computer_call_output", "image_generation_call"),
    *("code_interpreter_call", "mcp_list_tools", "mcp_call", "mcp_approval_request", "mcp_approval_response"),
    *(TRIGGER, *COMPACTIONS),
)


class InputRequest(Sampling):
    """POST /v1/responses/input_tokens, /v1/responses/compact"""

    input: str | Many[dict[str, Any]] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: Many[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = Field(None, description="format: text, json_object, or json_schema with a schema")
    truncation: str | None = Field(None, description="nothing is ever truncated")
    conversation: Any = Field(None, description="not kept here: previous_response_id is")
    prompt: Any = Field(None, description="no prompts are kept here")
    chat_template_kwargs: dict[str, Any] | None = None


class ResponsesRequest(InputRequest):
    """POST /v1/responses"""

    max_output_tokens: TokenLimit = Field(None, description="not given: until the model stops")
    store: bool | None = Field(None, description="true if not given")
    include: Many[str] | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    background: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    context_management: Many[dict[str, Any]] | None = None


def check(request: InputRequest) -> None:
    """Raises ApiError for what this server does not have."""
    for name, instead in (
        ("conversation", "go on from a response with previous_response_id"),
        ("prompt", "send the prompt itself, as instructions and input"),
        ("background", "ask for a stream"),
    ):
        if getattr(request, name, None):
            raise ApiError(400, f"{name}: this is not kept here; {instead}.", "unsupported_parameter", name)


def items_of(request: InputRequest) -> list[dict[str, Any]]:
    """The input as items."""
    if isinstance(request.input, str):
        return [{"type": "message", "role": "user", "content": request.input}] if request.input else []
    return list(request.input or [])


def split_compacted(items: list[dict[str, Any]]) -> tuple[str | None, list[dict[str, Any]]]:
    """What the last compaction item names, and the items after it; (None, all items) if there is none."""
    for i in range(len(items) - 1, -1, -1):
        if items[i].get("type") in COMPACTIONS:
            return str(items[i].get("encrypted_content") or items[i].get("id") or ""), items[i + 1 :]
    return None, items


def compaction_threshold(request: InputRequest, items: list[dict[str, Any]]) -> int | None:
    """After how many tokens the conversation is to be compacted; 0: now, and nothing else; None: not at all."""
    if any(item.get("type") == TRIGGER for item in items):
        return 0
    for entry in getattr(request, "context_management", None) or []:
        if entry.get("type") == "compaction":
            threshold = entry.get("compact_threshold", COMPACT_AT)
            if type(threshold) is not int or threshold < 1:
                where = "context_management.compact_threshold"
                raise ApiError(400, f"{where}: it must be a number of tokens.", param=where)
            return threshold
    return None


def chat_of(request: InputRequest, items: list[dict[str, Any]]) -> ChatRequest:
    """The request as a chat completion's, with these items. Raises ApiError for what cannot be read."""
    turns = Turns()
    if request.instructions:
        turns.system(request.instructions)
    for i, item in enumerate(items):
        _add(turns, item, f"input.{i}")
    if all(message["role"] == "system" for message in turns.messages):
        turns.user("")  # Codex asks with nothing to see whether the server is there
    tools, choice = _tools(request.tools, request.tool_choice)
    effort = (request.reasoning or {}).get("effort")
    include = getattr(request, "include", None) or []
    n_top = getattr(request, "top_logprobs", None)
    return chat_request(
        request,
        turns,
        {
            "max_tokens": getattr(request, "max_output_tokens", None),
            "tools": tools,
            "tool_choice": choice,
            "parallel_tool_calls": request.parallel_tool_calls,
            "reasoning_effort": effort if isinstance(effort, str) else None,
            "response_format": _response_format((request.text or {}).get("format")),
            "logprobs": True if n_top or "message.output_text.logprobs" in include else None,
            "top_logprobs": n_top,
            "chat_template_kwargs": request.chat_template_kwargs,
        },
    )


# --- items ------------------------------------------------------------------------------------------------------------


def _add(turns: Turns, item: dict[str, Any], where: str) -> None:
    kind = item.get("type") or ("message" if "role" in item else None)
    if kind == "message":
        _add_message(turns, item, where)
    elif kind in ("function_call", "custom_tool_call"):
        call_id, name = item.get("call_id"), item.get("name")
        if not isinstance(call_id, str) or not isinstance(name, str):
            raise ApiError(400, f"{where}: a call has a call_id and a name.", param=where)
        arguments = item.get("arguments") if kind == "function_call" else {"input": item.get("input")}
        turns.call(call_id, name, as_arguments(arguments))
    elif kind in ("function_call_output", "custom_tool_call_output"):
        turns.result(item.get("call_id"), text_of(item.get("output"), f"{where}.output", _TEXTS), where)
    elif kind == "reasoning":
        if thoughts := _thoughts(item, where):
            turns.thoughts(thoughts)
    elif kind not in _SKIPPED:
        raise ApiError(400, f"{where}: {str(kind)[:50]!r} is no item that can be read.", param=where)


def _add_message(turns: Turns, item: dict[str, Any], where: str) -> None:
    role, content = item.get("role"), item.get("content")
    text = text_of(content, f"{where}.content", _TEXTS)
    if role in ("system", "developer"):
        if text:
            turns.system(text)
    elif role == "user":
        turns.user(text)
    elif role == "assistant":
        turns.assistant(text)
    else:
        what = f'{where}.role: it must be "user", "assistant", "system" or "developer", not {str(role)[:50]!r}.'
        raise ApiError(400, what, param=f"{where}.role")


def _thoughts(item: dict[str, Any], where: str) -> str:
    """The text of a reasoning item: as it is, as we have given it in encrypted_content, or what sums it up."""
    text = text_of(item.get("content"), f"{where}.content", _TEXTS)
    return text or opened(item.get("encrypted_content")) or text_of(item.get("summary"), f"{where}.summary", _TEXTS)


_SEAL = "lminf:"


def sealed(text: str) -> str:
    """Text as encrypted_content, which clients pass on as it is. It hides nothing: they have the text anyway."""
    return _SEAL + base64.b64encode(text.encode("utf-8")).decode("ascii")


def opened(value: Any) -> str:
    """What `sealed` has made, "" for anything else."""
    if not isinstance(value, str) or not value.startswith(_SEAL):
        return ""
    try:
        return base64.b64decode(value[len(_SEAL) :], validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return ""


# --- tools ------------------------------------------------------------------------------------------------------------


def _tools(tools: list[dict[str, Any]] | None, choice: Any) -> tuple[list[dict[str, Any]] | None, Any]:
    """The functions among the tools, and the choice. What a server is to run is none of this one's tools."""
    functions: list[dict[str, Any]] = []
    for i, tool in enumerate(tools or []):
        if tool.get("type") != "function":
            continue
        function = tool.get("function") if isinstance(tool.get("function"), dict) else tool
        assert isinstance(function, dict)
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise ApiError(400, f"tools.{i}: a function has a name.", param="tools")
        named = {name: function[name] for name in ("name", "description") if function.get(name)}
        held = {"parameters": function.get("parameters"), "strict": function.get("strict") is True}
        functions.append({"type": "function", "function": {**named, **held}})
    if isinstance(choice, dict):
        if choice.get("type") == "allowed_tools":
            listed = choice.get("tools")
            if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
                raise ApiError(400, "tool_choice.tools: it must be a list of tools.", param="tool_choice.tools")
            allowed = {str(tool.get("name")) for tool in listed}
            functions = [tool for tool in functions if tool["function"]["name"] in allowed]
            choice = choice.get("mode", "auto")
        elif choice.get("type") == "function":
            choice = {"type": "function", "function": {"name": choice.get("name")}}
        else:
            kind = str(choice.get("type"))[:50]
            raise ApiError(400, f"tool_choice: there is no tool {kind!r} here.", param="tool_choice")
    return functions or None, choice


def _response_format(wanted: Any) -> dict[str, Any] | None:
    if not isinstance(wanted, dict):
        return None
    if wanted.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {"schema": wanted.get("schema")}}
    kind = wanted.get("type")
    if kind in ("text", "json_object"):
        return {"type": kind}
    what = 'text.format: its type must be "text", "json_object" or "json_schema".'
    raise ApiError(400, what, param="text.format")
