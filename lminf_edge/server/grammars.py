"""Grammars from what clients send: GBNF text and JSON schemas.

A client can ask for a grammar that takes any time and any memory to build. Building is bounded here, sampling in
libllama (native/src/lminf-grammar.h). Both can still take a few tenths of a second, so these functions belong in a
worker thread. They keep no state.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import llama_cpp
from llama_cpp import llama_grammar
from llama_cpp.llama_grammar import INVALID_RULE_CHARS_RE, LlamaGrammar, SchemaConverter

from lminf_edge import native
from lminf_edge.engine.sampler import TOO_MUCH
from lminf_edge.server.errors import ApiError

MAX_CHARACTERS = 256 << 10
MAX_DEPTH = 256  # of a schema
MAX_REPEATS = 1000  # minItems, maxLength and the like
MAX_PARTS = 10_000  # of a schema
MAX_NAME = 8192  # characters of a rule's name, which holds the names of all its parents
MAX_PATTERN = 4096  # characters
MAX_WRITTEN = 8 << 20  # characters of rules while a schema is converted: many are written repeatedly

# the dot of a pattern, in a string of JSON
_DOT = r'[^"\\\x7F\x00-\x1F] | "\\" ["\\/bft]'

# a character of a string as llama_cpp writes it for a JSON schema, and without what JSON forbids there: line breaks
_LOOSE_CHARACTER, _CHARACTER = r'char ::= [^"\\] |', r'char ::= [^"\\\x7F\x00-\x1F] |'

REPEATS = ("minItems", "maxItems", "minLength", "maxLength")


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
    """Raises ApiError for a schema that cannot be converted: it is never silently replaced."""
    check_schema(schema, param)
    try:
        text = schema_gbnf(json.dumps(schema))
    except TooMuchError:
        raise ApiError(400, f"{param}: the JSON schema is too large.", param=param) from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ApiError(400, f"{param}: no grammar can be made of this JSON schema: {reason}.", param=param) from None
    return text_grammar(llm, text.replace(_LOOSE_CHARACTER, _CHARACTER), param)


class TooMuchError(ValueError):
    """A schema takes too much work to convert."""


class _Converter(SchemaConverter):
    """llama_cpp's, limited to MAX_WRITTEN characters. Unknown constructs raise exceptions of any kind."""

    def __init__(self, prop_order: Sequence[str]) -> None:
        order = {name: i for i, name in enumerate(prop_order)}
        super().__init__(prop_order=order, allow_fetch=False, dotall=False, raw_pattern=False)  # type: ignore[no-untyped-call]
        self._n_left = MAX_WRITTEN
        self._n_renamed: dict[str, int] = {}

    def visit(self, schema: Any, name: str) -> str:
        if len(name) > MAX_NAME:
            raise TooMuchError
        self._write(64 + len(name) + 64 * self._n_combined(schema))
        return str(super().visit(schema, name))  # type: ignore[no-untyped-call]

    def _n_combined(self, schema: Any) -> int:
        """Properties that an allOf brings together, repeated for each reference to them."""
        parts = schema.get("allOf", []) if isinstance(schema, dict) else []
        n = 0
        for part in parts if isinstance(parts, list) else []:
            alternatives = part.get("anyOf", [part]) if isinstance(part, dict) else []
            for alternative in alternatives if isinstance(alternatives, list) else []:
                if isinstance(alternative, dict):
                    target = self._refs.get(alternative.get("$ref"), alternative)
                    properties = target.get("properties") if isinstance(target, dict) else None
                    n += 1 + len(properties or ())
        return n

    def _add_rule(self, name: str, rule: str) -> str:
        rule = _DOT if rule == llama_grammar.DOT else rule
        plain = INVALID_RULE_CHARS_RE.sub("-", name)
        n_tried = 0
        if self._rules.get(plain, rule) != rule:  # the name is taken: all numbers behind it are tried in turn
            n_tried = self._n_renamed[plain] = self._n_renamed.get(plain, 0) + 1
        self._write(64 + len(name) + len(rule) + 16 * n_tried)
        return str(super()._add_rule(name, rule))  # type: ignore[no-untyped-call]

    def _visit_pattern(self, pattern: str, name: str) -> str:
        if len(pattern) > MAX_PATTERN:
            raise TooMuchError
        return str(super()._visit_pattern(_json_pattern(pattern), name))  # type: ignore[no-untyped-call]

    def _write(self, n_characters: int) -> None:
        self._n_left -= n_characters
        if self._n_left < 0:
            raise TooMuchError


def schema_gbnf(schema: str, prop_order: Sequence[str] | None = None) -> str:
    """llama_cpp's json_schema_to_gbnf. Raises TooMuchError, and exceptions of any kind for unknown constructs."""
    converter = _Converter(prop_order or ())
    converter.visit(converter.resolve_refs(json.loads(schema), "schema"), "")
    return str(converter.format_grammar())  # type: ignore[no-untyped-call]


# the chat formats of llama_cpp convert the parameters of tools themselves, after the model has chosen one
llama_grammar.json_schema_to_gbnf = schema_gbnf


# of a regular expression: an escape, a class, a quantifier, what closes one that was not opened, a quotation mark
_PATTERN_PART = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{[^}]*\}|[\]}\"]", re.DOTALL)
_CLASS_CHARACTER = r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\[trn\\\"\[\]-]|[^\\]"
_CLASS_PART = re.compile(rf"({_CLASS_CHARACTER})(?:-({_CLASS_CHARACTER}))?")
_UNESCAPED = {"\\t": 9, "\\n": 10, "\\r": 13}
_FORBIDDEN = ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F))  # in a string of JSON, as it stands


def _json_pattern(pattern: str) -> str:
    """The same pattern for what stands in a JSON string, in what llama_cpp's converter understands.

    It waits for ever on what closes without having been opened, and takes no notice of what JSON escapes.

    Raises TooMuchError if something is repeated too often, ValueError for what is no number of repetitions.
    """

    def part(match: re.Match[str]) -> str:
        text = match[0]
        if text[0] == "{":
            if not re.fullmatch(r"\{\s*[0-9]*\s*(,\s*[0-9]*\s*)?\}", text):  # Python's int takes more than digits
                raise ValueError(f"{text[:50]} is no number of repetitions")
            if any(len(number) > 9 or int(number) > MAX_REPEATS for number in re.findall("[0-9]+", text)):
                raise TooMuchError
        if text[0] == "[":
            return _json_class(text)
        if text in ('"', '\\"', "\\\\"):
            return f"(\\\\{text[-1]})" if text[-1] == '"' else "(\\\\\\\\)"
        return f"\\{text}" if text in ("]", "}") else text

    inside = _PATTERN_PART.sub(part, pattern[1:-1])
    return f"{pattern[:1]}({inside}){pattern[-1:]}" if "|" in inside else f"{pattern[:1]}{inside}{pattern[-1:]}"


def _json_class(text: str) -> str:
    """A character class without the characters that JSON escapes."""
    if text.startswith("[^"):
        return f'[^"\\\\\\x7F\\x00-\\x1F{text[2:]}'
    body = text[1:-1]
    ranges = [(_code_point(low), _code_point(high or low)) for low, high in _CLASS_PART.findall(body)]
    if not any(low <= end and start <= high for low, high in ranges for start, end in _FORBIDDEN):
        return text
    for start, end in _FORBIDDEN:
        ranges = [
            piece
            for low, high in ranges
            for piece in ((low, min(high, start - 1)), (max(low, end + 1), high))
            if piece[0] <= piece[1]
        ]
    if not ranges:
        raise ValueError(f"{text[:50]} takes only characters that JSON escapes")
    return "[" + "".join(f"\\U{low:08X}-\\U{high:08X}" for low, high in ranges) + "]"


def _code_point(character: str) -> int:
    if character[:2] in ("\\x", "\\u", "\\U") and len(character) > 2:
        return int(character[2:], 16)
    return _UNESCAPED.get(character, ord(character[-1]))


def check_schema(schema: Any, param: str) -> None:
    """Raises ApiError for an invalid JSON schema, or one whose grammar would be enormous."""
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
                for name in REPEATS:
                    if isinstance(part.get(name), (int, float)) and part[name] > MAX_REPEATS:
                        raise ApiError(400, f"{param}: {name} may be {MAX_REPEATS:,} at most.", param=param)
        level = [
            child
            for part in level
            for child in (part.values() if isinstance(part, dict) else part if isinstance(part, list) else ())
        ]
    raise ApiError(400, f"{param}: the JSON schema is too large.", param=param)


def response_grammar(llm: llama_cpp.Llama, value: Mapping[str, Any]) -> LlamaGrammar | None:
    """The grammar for OpenAI's response_format, None for plain text. Raises ApiError for an invalid one."""
    kind, param = value.get("type"), "response_format"
    if kind == "text":
        return None
    if kind == "json_object":
        schema = value.get("schema")
        if schema is None:
            return text_grammar(llm, llama_grammar.JSON_GBNF, param)
    elif kind == "json_schema":
        inner = value.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else None
    else:
        raise ApiError(
            400,
            f'{param}: its type must be "text", "json_object" or "json_schema", not {str(kind)[:50]!r}.',
            param=param,
        )
    return schema_grammar(llm, schema, param)
