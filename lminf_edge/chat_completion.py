"""llama_cpp.Llama.create_chat_completion by llama.cpp's chat library: its arguments and formats, for every template."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from lminf_edge.errors import UserError
from lminf_edge.text.answer import Delta, Reader
from lminf_edge.text.chat import ChatOptions, ChatTemplate, Messages
from lminf_edge.text.schema import enforceable
from lminf_edge.text.tools import check_tools

# of create_chat_completion besides llama_cpp's, and what they are in ChatOptions
CHAT_ARGUMENTS = {
    "parallel_tool_calls": "parallel_tool_calls",
    "add_generation_prompt": "add_generation_prompt",
    "continue_final_message": "continue_final_message",
    "reasoning_format": "reasoning_format",
    "enable_thinking": "enable_thinking",
    "reasoning_budget_tokens": "thinking_budget",
    "reasoning_budget_message": "budget_message",
    "chat_template_kwargs": "template_kwargs",
}


def chat_options(
    functions: Sequence[Mapping[str, Any]] | None,
    function_call: str | Mapping[str, Any] | None,
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: Any,
    response_format: Mapping[str, Any] | None,
    grammar: Any,
    more: Mapping[str, Any],
) -> ChatOptions:
    """From the arguments of create_chat_completion. Raises UserError for what cannot be done."""
    if functions is not None:  # the older name of tools
        tools = [{"type": "function", "function": function} for function in functions]
    if function_call is not None:
        tool_choice = function_call if isinstance(function_call, str) else {"function": function_call}
    checked = check_tools(list(tools or ()), tool_choice)
    schema = None
    kind = (response_format or {}).get("type", "text")
    if kind not in ("text", "json_object", "json_schema"):
        raise UserError(f'The type of response_format is "text", "json_object" or "json_schema", not {kind!r}.')
    if response_format is not None and kind != "text":
        inner = response_format.get("json_schema") or response_format
        schema = enforceable(inner.get("schema") or {"type": "object"})
    if checked.functions and checked.choice != "none" and (grammar is not None or schema is not None):
        what = "grammar" if grammar is not None else "response_format"
        raise UserError(f"{what}: an answer that may call tools cannot have one: give no tools.")
    return ChatOptions(
        tools=checked.functions,
        strict=checked.strict,
        tool_choice=checked.choice,
        json_schema=schema,
        grammar=grammar,
        **more,
    )


def complete_chat(
    template: ChatTemplate,
    messages: Messages,
    options: ChatOptions,
    complete: Callable[..., Any],
    stop: str | Sequence[str] | None,
    stream: bool,
) -> dict[str, Any] | Iterator[dict[str, Any]]:
    """`complete` is create_completion with all that is not about the chat. Raises UserError as ChatTemplate.render."""
    said = [{**message, "content": message.get("content") or ""} for message in messages]
    prompt = template.render(said, options)
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    made = complete(
        prompt=prompt.tokens.tolist(),
        stop=[*stops, *prompt.stops],
        grammar=prompt.grammar,
        preserved=prompt.preserved,
        stream=stream,
    )
    return _chunks(made, prompt.new_reader()) if stream else _whole(made, prompt.new_reader())


def _whole(completion: dict[str, Any], reader: Reader) -> dict[str, Any]:
    choice = completion["choices"][0]
    message: dict[str, Any] = {"role": "assistant", "content": None}
    for delta in [*reader.push(choice["text"]), *reader.finish()]:
        if delta.call is None:
            name = "reasoning_content" if delta.reasoning else "content"
            message[name] = (message.get(name) or "") + delta.text
            continue
        calls = message.setdefault("tool_calls", [])
        if delta.call.index == len(calls):
            function = {"name": delta.call.name, "arguments": ""}
            calls.append({"id": delta.call.id, "type": "function", "function": function})
        calls[delta.call.index]["function"]["arguments"] += delta.text
    reason = choice["finish_reason"]
    if "tool_calls" in message:
        reason = "tool_calls" if reason == "stop" else reason
    else:
        message["content"] = message["content"] or ""
    return {
        "id": "chat" + completion["id"],
        "object": "chat.completion",
        "created": completion["created"],
        "model": completion["model"],
        "choices": [
            {"index": 0, "message": message, "logprobs": _logprobs(choice["logprobs"]), "finish_reason": reason}
        ],
        "usage": completion["usage"],
    }


def _chunks(chunks: Generator[dict[str, Any], None, None], reader: Reader) -> Iterator[dict[str, Any]]:
    head: dict[str, Any] = {}
    begun = -1  # the last call that was
    waiting: list[Any] = []  # log probabilities of text that has not been read yet

    def chunk(delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]}

    def said(deltas: list[Delta]) -> Iterator[dict[str, Any]]:
        nonlocal begun, waiting
        for delta in deltas:
            logprobs = {"content": waiting, "refusal": None} if waiting else None
            waiting = []
            if delta.call is None:
                yield chunk({"reasoning_content" if delta.reasoning else "content": delta.text}, logprobs)
            else:
                call: dict[str, Any] = {"index": delta.call.index, "function": {"arguments": delta.text}}
                if delta.call.index > begun:
                    call |= {"id": delta.call.id, "type": "function"}
                    call["function"] = {"name": delta.call.name, "arguments": delta.text}
                    begun = delta.call.index
                yield chunk({"tool_calls": [call]}, logprobs)

    with contextlib.closing(chunks):
        for each in chunks:
            choice = each["choices"][0]
            if not head:
                head = {name: each[name] for name in ("created", "model")}
                head |= {"id": "chat" + each["id"], "object": "chat.completion.chunk"}
                yield chunk({"role": "assistant"})
            reason = choice["finish_reason"]
            if reason is None:
                waiting += (_logprobs(choice["logprobs"]) or {}).get("content", ())
                yield from said(reader.push(choice["text"]))
            else:
                yield from said(reader.finish())
                yield chunk({}, None, "tool_calls" if begun >= 0 and reason == "stop" else reason)


def _logprobs(lists: Any) -> Any:
    """The log probabilities of a completion in the form of a chat's."""
    from llama_cpp import llama_chat_format

    return llama_chat_format._convert_text_completion_logprobs_to_chat(lists)
