"""How large a JSON schema may be, as the grammar that is made of it grows with it, and its numbers."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

from lminf_edge.errors import UserError
from lminf_edge.text import library
from lminf_edge.text.pattern import MAX_REPEATS, json_pattern

MAX_DEPTH = 256  # of a schema
MAX_PARTS = 10_000  # of a schema
PATTERN_PART = 16  # characters of a pattern that count as a part
MAX_NAME = 1000  # characters of a property's name, or of a reference
MAX_PATTERN = 4096  # characters
MAX_OPTIONAL = 400  # properties of an object that may be left out: a grammar has rules for each after each
MAX_INTEGER = 1 << 53

REPEATS = ("minItems", "maxItems", "minLength", "maxLength")
NUMBER_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_TOO_LARGE = "the JSON schema is too large"
VALUES = ("const", "enum", "default", "examples")  # of these, keys say nothing
_NAMED = ("properties", "patternProperties", "$defs", "definitions")  # keys are names
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_number(bounds: dict[str, Any]) -> None:
    """Raises UserError for bounds of a number that have no grammar."""
    for name, bound in bounds.items():
        if not is_number(bound) or not _is_double(bound):
            raise UserError(f"{name} is a number of double precision")
    try:
        library.load().schema_grammar({"type": "number", **bounds})
    except library.ChatError as error:
        raise UserError(str(error).removeprefix("JSON schema conversion failed: ")) from None


def _is_double(number: float) -> bool:
    try:
        return math.isfinite(number) and float(number) == number
    except OverflowError:
        return False


def make_flags_bounds(node: dict[str, Any]) -> None:
    """Until the sixth draft, exclusiveMinimum was a flag that said how minimum is meant; now it is a bound itself."""
    for name, flag in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(node.get(flag), bool):
            is_exclusive = node.pop(flag)
            if is_exclusive and name in node:
                node[flag] = node.pop(name)


def check_size(schema: Any) -> None:
    """Raises UserError for what is no JSON schema, or one whose grammar would be enormous."""
    if not isinstance(schema, dict):
        raise UserError("a JSON schema is an object")
    for part in _parts(schema):
        if isinstance(part, dict):
            _check_part(part)


def count_parts(schema: Any) -> int:
    """What the work that a schema makes grows with. Raises UserError if that is too much."""
    n_parts = 0
    for part in _parts(schema):
        pattern = part.get("pattern") if isinstance(part, dict) else None
        n_parts += 1 + (len(pattern) // PATTERN_PART if isinstance(pattern, str) else 0)
    if n_parts > MAX_PARTS:
        raise UserError(_TOO_LARGE)
    return n_parts


def check_made(schema: Any) -> None:
    """Raises UserError if a rewritten schema has become too large: what is in several places counts in each."""
    for _ in _parts(schema, 2 * MAX_PARTS):
        pass


def _parts(schema: Any, most: int = MAX_PARTS) -> Iterator[Any]:
    level: list[Any] = [schema]
    n_parts = 0
    for _ in range(MAX_DEPTH):
        if not level:
            return
        n_parts += len(level)
        if n_parts > most:
            break
        yield from level
        level = [
            child
            for part in level
            for child in (part.values() if isinstance(part, dict) else part if isinstance(part, list) else ())
        ]
    raise UserError(_TOO_LARGE)


def loosened(schema: Any) -> Any:
    """A schema without bounds that are too large for a grammar, and patterns that have none; the others made to fit.

    For tools that are not strict: agents' real ones have such limits, and go on without them. What llama.cpp or
    templates fail at, though it is right, is said in another way.
    """
    if isinstance(schema, list):
        return [loosened(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _NAMED and isinstance(value, dict):
            made[name] = {each: _loosened_child(child) for each, child in value.items()}
        elif name in _LISTS and isinstance(value, list):
            made[name] = [_loosened_child(child) for child in value]
        elif name in VALUES:
            made[name] = value
        elif name == "pattern" and isinstance(value, str):
            with contextlib.suppress(UserError, re.error, OverflowError, RecursionError):
                if len(value) <= MAX_PATTERN and re.compile(value) and len(text := json_pattern(value)) <= MAX_PATTERN:
                    made[name] = text
        elif not is_number(value) or abs(value) <= (MAX_REPEATS if name in REPEATS else MAX_INTEGER):
            made[name] = loosened(value)
    if isinstance(made.get("items"), bool):
        del made["items"]
    if made.get("type") == "array" and not made.keys() & {"items", "prefixItems"}:
        made["items"] = {}  # templates ask for it, and take a function of this name for it
    _drop_bounds(made)
    return made


def _loosened_child(schema: Any) -> Any:
    """llama.cpp knows no schemas that are true or false."""
    return {} if isinstance(schema, bool) else loosened(schema)


def _drop_bounds(node: dict[str, Any]) -> None:
    """Removes the bounds of a schema's numbers if no grammar enforces them."""
    types = node.get("type")
    if types == "number" or (isinstance(types, list) and "number" in types):
        make_flags_bounds(node)
        for given_up in ((), ("multipleOf",), NUMBER_BOUNDS):  # as few as possible
            for name in given_up:
                node.pop(name, None)
            bounds = {name: node[name] for name in NUMBER_BOUNDS if name in node}
            with contextlib.suppress(UserError):
                if bounds:
                    check_number(bounds)
                return


def _check_part(part: dict[str, Any]) -> None:
    for name in REPEATS:
        if isinstance(part.get(name), (int, float)) and part[name] > MAX_REPEATS:
            raise UserError(f"{name} may be {MAX_REPEATS:,} at most")
    properties, required = part.get("properties"), part.get("required")
    if isinstance(properties, dict):
        n_optional = len(properties) - (len(required) if isinstance(required, list) else 0)
        if n_optional > MAX_OPTIONAL:
            raise UserError(f"an object may have {MAX_OPTIONAL:,} properties at most that are not required")
    if any(len(name) > MAX_NAME for name in part):
        raise UserError(f"a name may have {MAX_NAME:,} characters at most")
    for name, most in (("$ref", MAX_NAME), ("pattern", MAX_PATTERN)):
        if isinstance(part.get(name), str) and len(part[name]) > most:
            raise UserError(f"{name} may have {most:,} characters at most")
