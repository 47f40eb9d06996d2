"""Grammars out of what clients send: GBNF text, JSON schemas, tools. Checked before llama.cpp sees them.

llama.cpp's parser recurses, and what it refuses makes a sampler that is not there: either would end the process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import llama_cpp
from llama_cpp.llama_grammar import LlamaGrammar, json_schema_to_gbnf

from lminf_edge.llama import Llama
from lminf_edge.native import captured_errors
from lminf_edge.server.errors import ApiError

MAX_CHARACTERS = 256 << 10
MAX_DEPTH = 256  # of parentheses, and of a schema
MAX_REPEATS = 1000  # minItems, maxLength and the like
MAX_PARTS = 10_000  # of a schema

_REPEATS = ("minItems", "maxItems", "minLength", "maxLength")


def text_grammar(llm: Llama, text: str, param: str) -> LlamaGrammar:
    """Raises ApiError for what is no grammar."""
    if len(text) > MAX_CHARACTERS or _depth(text) > MAX_DEPTH:
        raise ApiError(
            400,
            f"{param}: a grammar has {MAX_CHARACTERS:,} characters and {MAX_DEPTH} nested parentheses at most.",
            param=param,
        )
    if any(
        int(number) > MAX_REPEATS
        for numbers in re.findall(r"\{\s*([\d,\s]+)\}", text)
        for number in re.findall(r"\d+", numbers)
    ):
        raise ApiError(400, f"{param}: nothing may be repeated more than {MAX_REPEATS:,} times.", param=param)
    with captured_errors():
        sampler = llama_cpp.llama_sampler_init_grammar(llm._model.vocab, text.encode("utf-8"), b"root")
    if not sampler:
        raise ApiError(400, f"{param}: this is no grammar in llama.cpp's GBNF with a rule named root.", param=param)
    llama_cpp.llama_sampler_free(sampler)
    return LlamaGrammar(_grammar=text)


def _depth(text: str) -> int:
    depth = most = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        most = max(most, depth)
    return most


def schema_grammar(llm: Llama, schema: Any, param: str) -> LlamaGrammar:
    """Raises ApiError for a schema that no grammar can be made of: it is never replaced by another silently."""
    check_schema(schema, param)
    try:
        text = json_schema_to_gbnf(json.dumps(schema))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ApiError(400, f"{param}: no grammar can be made of this JSON schema: {reason}.", param=param) from None
    return text_grammar(llm, text, param)


def check_schema(schema: Any, param: str) -> None:
    """Raises ApiError for what is no JSON schema, or one that would make an enormous grammar."""
    if not isinstance(schema, dict):
        raise ApiError(400, f"{param}: a JSON schema is an object.", param=param)
    level: list[Any] = [schema]
    n_parts = 0
    for _ in range(MAX_DEPTH):
        if not level:
            return
        n_parts += len(level)
        if n_parts > MAX_PARTS:
            break
        for part in level:
            if isinstance(part, dict):
                for name in _REPEATS:
                    if isinstance(part.get(name), (int, float)) and part[name] > MAX_REPEATS:
                        raise ApiError(400, f"{param}: {name} may be {MAX_REPEATS:,} at most.", param=param)
        level = [
            child
            for part in level
            for child in (part.values() if isinstance(part, dict) else part if isinstance(part, list) else ())
        ]
    raise ApiError(400, f"{param}: the JSON schema is too large.", param=param)


def response_format(llm: Llama, value: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of create_chat_completion for OpenAI's response_format."""
    kind, param = value.get("type"), "response_format"
    if kind == "text":
        return {}
    if kind == "json_object":
        schema = value.get("schema")
        if schema is None:
            return {"response_format": {"type": "json_object"}}
    elif kind == "json_schema":
        inner = value.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else None
    else:
        raise ApiError(
            400,
            f'{param}: its type must be "text", "json_object" or "json_schema", not {str(kind)[:50]!r}.',
            param=param,
        )
    return {"grammar": schema_grammar(llm, schema, param)}


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
    """A choice that llama_cpp can keep to. Raises ApiError for another."""
    param = "tool_choice"
    names = [tool["function"]["name"] for tool in tools]
    if choice in ("auto", "none"):
        return str(choice)
    if choice == "required":
        if len(tools) != 1:
            raise ApiError(
                400, f'{param}: "required" is possible with one tool; name the function to call.', param=param
            )
        name = names[0]
    elif isinstance(choice, dict) and isinstance(choice.get("function"), dict):
        name = choice["function"].get("name")
        if name not in names:
            raise ApiError(400, f"{param}: there is no tool {str(name)[:100]!r}.", param=param)
    else:
        raise ApiError(400, f'{param}: it must be "auto", "none", "required" or a function.', param=param)
    schema_grammar(llm, tools[names.index(name)]["function"]["parameters"], "tools")  # as llama_cpp will make it
    return {"type": "function", "function": {"name": name}}
