"""Tools: what clients send, and what llama_cpp's chat formats leave out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from llama_cpp.llama_grammar import LlamaGrammar

from lminf_edge.engine.voice import Voice
from lminf_edge.llama import Llama
from lminf_edge.server.errors import ApiError
from lminf_edge.server.grammars import check_schema, schema_grammar

CALLING_FORMAT = "chatml-function-calling"  # the format that finds out by itself whether to call a tool


def checked_tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Tools with all that llama_cpp looks at. Raises ApiError for what is none."""
    checked = []
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ApiError(400, f"tools.{i}: a tool has a function with a name.", param="tools")
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        check_schema(parameters, f"tools.{i}.function.parameters")
        checked.append({**tool, "type": "function", "function": {**function, "parameters": parameters}})
    return checked


def checked_tool_choice(llm: Llama, choice: Any, tools: Sequence[dict[str, Any]]) -> str | dict[str, Any]:
    """A choice that llama_cpp can keep to, or "required" among several. Raises ApiError for another."""
    param = "tool_choice"
    names = [tool["function"]["name"] for tool in tools]
    if choice in ("auto", "none"):
        return str(choice)
    if choice == "required":
        if not tools:
            raise ApiError(400, f'{param}: "required" needs tools.', param=param)
        if len(tools) > 1 and llm.chat_format == CALLING_FORMAT:
            raise ApiError(
                400, f'{param}: "required" is possible with one tool here; name the function to call.', param=param
            )
        chosen = names
    elif isinstance(choice, dict) and isinstance(choice.get("function"), dict):
        name = choice["function"].get("name")
        if name not in names:
            raise ApiError(400, f"{param}: there is no tool {str(name)[:100]!r}.", param=param)
        chosen = [name]
    else:
        raise ApiError(400, f'{param}: it must be "auto", "none", "required" or a function.', param=param)
    for name in chosen:  # as llama_cpp will make it
        schema_grammar(llm, tools[names.index(name)]["function"]["parameters"], "tools")
    return named(chosen[0]) if len(chosen) == 1 else "required"


def named(name: str) -> dict[str, Any]:
    """tool_choice for one function."""
    return {"type": "function", "function": {"name": name}}


def with_tool_named(voice: Voice, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of create_chat_completion in which, of several required tools, the model has named one."""
    if arguments.get("tool_choice") != "required":
        return arguments
    names = [tool["function"]["name"] for tool in arguments["tools"]]
    grammar = LlamaGrammar(_grammar="root ::= " + " | ".join(json.dumps(name) for name in names))
    asked = {**arguments, "tool_choice": "auto", "grammar": grammar, "max_tokens": None, "stop": None, "logprobs": None}
    answer = voice.create_chat_completion(**asked)
    return {**arguments, "tool_choice": named(answer["choices"][0]["message"]["content"])}


def streams_nothing(llm: Llama, arguments: dict[str, Any]) -> bool:
    """Whether llama_cpp cannot stream such an answer, as it must see the whole of it to know whether it is a call."""
    return llm.chat_format == CALLING_FORMAT and bool(arguments.get("tools")) and arguments.get("tool_choice") == "auto"


def as_chunks(answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A whole answer as the chunks of a stream: who speaks, everything, and why it ended."""
    head = {
        **{name: answer[name] for name in ("created", "model")},
        "id": answer["id"],
        "object": "chat.completion.chunk",
    }
    [choice] = answer["choices"]
    message = {name: value for name, value in choice["message"].items() if name != "role" and value is not None}
    calls = [{"index": i, **call} for i, call in enumerate(message.pop("tool_calls", None) or [])]
    deltas: list[dict[str, Any]] = [{"role": "assistant"}, {**message, **({"tool_calls": calls} if calls else {})}, {}]
    for i, delta in enumerate(deltas):
        reason = choice["finish_reason"] if i == len(deltas) - 1 else None
        yield {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}
