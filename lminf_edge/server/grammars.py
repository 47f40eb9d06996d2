"""Grammars out of what clients send: GBNF text and JSON schemas. Checked before llama.cpp sees them.

llama.cpp's parser recurses, and what it refuses makes a sampler that is not there: either would end the process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import llama_cpp
from llama_cpp.llama_grammar import LlamaGrammar, json_schema_to_gbnf

from lminf_edge.engine.sampling import strict_strings
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
    return strict_strings(text_grammar(llm, text, param))


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
