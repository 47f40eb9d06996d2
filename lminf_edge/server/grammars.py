"""Grammars from what clients send: GBNF text and JSON schemas.

A client can ask for a grammar that takes any time and any memory to build. Building is bounded here, in the chat
library (native/chat/lminf-chat-work.h) and in libllama (native/src/lminf-grammar.h). It can still take a few tenths of
a second, so these functions belong in a worker thread. They keep no state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import llama_cpp
from llama_cpp.llama_grammar import LlamaGrammar

from lminf_edge import native
from lminf_edge.engine.sampler import TOO_MUCH
from lminf_edge.errors import UserError
from lminf_edge.server.errors import ApiError
from lminf_edge.text.pattern import MAX_REPEATS
from lminf_edge.text.schema import enforceable, schema_gbnf

MAX_CHARACTERS = 256 << 10


def text_grammar(llm: llama_cpp.Llama, text: str, param: str) -> LlamaGrammar:
    """Raises ApiError for an invalid grammar, and for one that takes too much work."""
    if len(text) > MAX_CHARACTERS:
        raise ApiError(400, f"{param}: a grammar has {MAX_CHARACTERS:,} characters at most.", param=param)
    if any(
        len(number) > 9 or int(number) > MAX_REPEATS
        for numbers in re.findall(r"\{\s*([\d,\s]+)\}", text)
        for number in re.findall(r"[0-9]+", numbers)
    ):
        raise ApiError(400, f"{param}: nothing may be repeated more than {MAX_REPEATS:,} times.", param=param)
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(400, f"{param}: half of a surrogate pair is no character.", param=param) from None
    if b"\0" in data:
        raise ApiError(400, f"{param}: a grammar has no zero characters.", param=param)
    with native.captured_errors():
        sampler = llama_cpp.llama_sampler_init_grammar(llm._model.vocab, data, b"root")
    if not sampler:
        if native.load().grammar_overran():
            raise ApiError(400, f"{param}: {TOO_MUCH}.", param=param)
        raise ApiError(400, f"{param}: this is no grammar in llama.cpp's GBNF with a rule named root.", param=param)
    llama_cpp.llama_sampler_free(sampler)
    return LlamaGrammar(_grammar=text)


def schema_grammar(llm: llama_cpp.Llama, schema: Any, param: str) -> LlamaGrammar:
    """Raises ApiError for a schema that cannot be enforced: it is never silently replaced."""
    try:
        text = schema_gbnf(schema)
    except UserError as error:
        raise _refused(error, param) from None
    return text_grammar(llm, text, param)


def answer_schema(schema: Any, param: str) -> dict[str, Any]:
    """A schema that a chat template can hold an answer to. Raises ApiError for one that cannot be enforced."""
    try:
        return enforceable(schema)
    except UserError as error:
        raise _refused(error, param) from None


def response_schema(value: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema of OpenAI's response_format, None for plain text. Raises ApiError for an invalid one."""
    kind, param = value.get("type"), "response_format"
    if kind == "text":
        return None
    if kind == "json_object":
        schema = value.get("schema")
    elif kind == "json_schema":
        inner = value.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else 0  # not an object: refused
    else:
        raise ApiError(
            400,
            f'{param}: its type must be "text", "json_object" or "json_schema", not {str(kind)[:50]!r}.',
            param=param,
        )
    return answer_schema({"type": "object"} if schema is None else schema, param)


def _refused(error: UserError, param: str) -> ApiError:
    return ApiError(400, f"{param}: no grammar can be made of this JSON schema: {error}.", param=param)
