"""JSON schemas that an answer can be held to: what a grammar can enforce, and a sentence about what it cannot.

llama.cpp's converter ignores what it does not know. Here a schema is refused unless every answer that the grammar
allows is valid by it; where the converter takes a keyword differently, the schema is rewritten for it first.
"""

from __future__ import annotations

import copy
import json
import math
import urllib.parse
from collections.abc import Callable
from typing import Any

from lminf_edge.errors import UserError
from lminf_edge.text import library
from lminf_edge.text.pattern import json_pattern, refuse
from lminf_edge.text.schema_bounds import (
    MAX_DEPTH,
    MAX_INTEGER,
    NUMBER_BOUNDS,
    check_made,
    check_number,
    check_size,
    count_parts,
    is_number,
    make_flags_bounds,
)

_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")

# keywords that say what is valid, by the type they are about; all others may be ignored
_OF_TYPE = {
    "object": {
        *("properties", "required", "additionalProperties", "minProperties", "maxProperties", "patternProperties"),
        *("propertyNames", "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties"),
    },
    "array": {
        *("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "contains"),
        *("minContains", "maxContains", "unevaluatedItems"),
    },
    "string": {"pattern", "minLength", "maxLength"},
    "number": set(NUMBER_BOUNDS),
}
_OF_TYPE["integer"] = _OF_TYPE["number"]
_COMBINING = {"$ref", "anyOf", "oneOf", "allOf"}
_NEVER = {"not", "if", "then", "else", "$dynamicRef", "$recursiveRef"}
_ASSERTIONS = {"type", "enum", "const", *_COMBINING, *_NEVER, *set().union(*_OF_TYPE.values())}


def enforceable(schema: Any) -> dict[str, Any]:
    """A schema that the library makes a grammar of which allows nothing that is invalid by the given one.

    Raises UserError, in a part of a sentence, if there is none.
    """
    count_parts(schema)
    check_size(schema)
    made: dict[str, Any] = copy.deepcopy(schema)
    _Rewriter(made).visit(made, "#")
    check_made(made)
    return made


def schema_gbnf(schema: Any, is_cancelled: Callable[[], bool] = lambda: False) -> str:
    """The grammar of a schema. Raises UserError as `enforceable` does, and RequestCancelled."""
    return library.load().schema_grammar(enforceable(schema), is_cancelled)


def resolved(root: dict[str, Any], node: Any) -> Any:
    """What a chain of references leads to in a schema that is enforceable; None if it has no end."""
    return _Rewriter(root)._resolved(node)


class _Rewriter:
    """Rewrites a schema in place."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._seen: set[int] = set()

    def visit(self, node: Any, place: str) -> None:
        if not isinstance(node, dict):
            refuse(place, "only schemas that are objects can be enforced")
        if id(node) in self._seen:
            return
        self._seen.add(id(node))
        make_flags_bounds(node)
        given = {name for name in _ASSERTIONS & node.keys() if not _says_nothing(name, node[name])}
        for name in sorted(given & _NEVER):
            refuse(place, f"{name} cannot be enforced")
        if "allOf" in given:
            self._merge(node, given, place)
            self._seen.discard(id(node))
            self.visit(node, place)
        elif "$ref" in given:
            self._only(given, {"$ref"}, place)
            self.visit(self._target(node["$ref"], place), str(node["$ref"])[:100])
        elif "oneOf" in given or "anyOf" in given:
            name = "oneOf" if "oneOf" in given else "anyOf"
            self._only(given, {name}, place)
            if not isinstance(node[name], list) or not node[name]:
                refuse(place, f"{name} is a list of schemas")
            for i, child in enumerate(node[name]):
                self.visit(child, f"{place}/{name}/{i}")
            if name == "oneOf" and not self._are_disjoint(node[name]):
                refuse(place, "oneOf can be enforced only where no value fits two of it: use anyOf")
        elif "const" in given or "enum" in given:
            self._values(node, given, place)
        else:
            self._typed(node, given, place)

    @staticmethod
    def _only(given: set[str], allowed: set[str], place: str) -> None:
        if rest := sorted(given - allowed):
            refuse(place, f"{rest[0]} cannot be enforced beside {sorted(allowed)[0]}")

    def _target(self, ref: Any, place: str) -> Any:
        if not isinstance(ref, str) or not ref.startswith("#/"):
            refuse(place, f"only references to parts of the schema can be followed, not {str(ref)[:100]!r}")
        target: Any = self._root
        for part in ref[2:].split("/"):
            key = urllib.parse.unquote(part).replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(key)] if isinstance(target, list) else target[key]
            except (KeyError, IndexError, ValueError, TypeError):
                refuse(place, f"there is nothing at {ref[:100]!r}")
        return target

    def _resolved(self, node: Any) -> Any:
        """What a chain of references leads to; None if it has no end."""
        for _ in range(MAX_DEPTH):
            if not isinstance(node, dict) or "$ref" not in node:
                return node
            node = self._target(node["$ref"], "#")
        return None

    # --- several schemas ----------------------------------------------------------------------------------------------

    def _merge(self, node: dict[str, Any], given: set[str], place: str) -> None:
        """Replaces allOf by what its parts say together."""
        parts = node.pop("allOf")
        if not isinstance(parts, list) or not parts:
            refuse(place, "allOf is a list of schemas")
        if len(parts) == 1 and given <= {"allOf"} and isinstance(parts[0], dict):
            node.update({**parts[0], **{name: node[name] for name in node.keys() - _ASSERTIONS}})
            return
        self._only(given, {"allOf", "type", "properties", "required"}, place)
        properties: dict[str, Any] = {}
        required: list[Any] = []
        for part in [{name: node[name] for name in given - {"allOf"}}, *parts]:
            part = self._resolved(part)
            if not isinstance(part, dict):
                refuse(place, "the parts of allOf are schemas")
            said = {name for name in _ASSERTIONS & part.keys() if not _says_nothing(name, part[name])}
            if said - {"type", "properties", "required"} or part.get("type", "object") != "object":
                refuse(place, "allOf can be enforced only for objects of properties that may have others")
            more, names = _members(part, place)
            for name, schema in more.items():
                if properties.setdefault(name, schema) != schema:
                    refuse(place, f"two parts of allOf have a property {name!r}")
            required += names
        node.update(type="object", properties=properties, required=list(dict.fromkeys(required)))

    def _are_disjoint(self, children: list[Any]) -> bool:
        """Whether no value fits two of these schemas, as far as types and tags tell."""
        told: dict[str, list[Any]] = {}
        for kinds in map(self._kinds, children):
            if kinds is None:
                return False
            for type_, tells in kinds.items():
                told.setdefault(type_, []).append(tells)
        return all(map(_differ, told.values()))

    def _kinds(self, node: Any) -> dict[str, Any] | None:
        """The types of the values that fit, with what tells them apart: values, or properties with values."""
        node = self._resolved(node)
        if not isinstance(node, dict) or node.keys() & {"anyOf", "oneOf"}:
            return None
        if "const" in node or "enum" in node:
            values = [node["const"]] if "const" in node else node["enum"]
            made: dict[str, Any] = {}
            for value in values:
                made.setdefault("number" if is_number(value) else type_of(value), set()).add(json.dumps(value))
            return made
        type_ = node.get("type")
        if not isinstance(type_, str):
            return None
        if type_ != "object":
            return {"number" if type_ == "integer" else type_: None}
        tags = {}
        for name in node.get("required") or ():
            tag = self._resolved((node.get("properties") or {}).get(name))
            if isinstance(tag, dict) and ("const" in tag or "enum" in tag):
                values = [tag["const"]] if "const" in tag else tag["enum"]
                tags[name] = {json.dumps(value) for value in values}
        return {"object": tags}

    # --- one schema ---------------------------------------------------------------------------------------------------

    def _values(self, node: dict[str, Any], given: set[str], place: str) -> None:
        self._only(given, {"enum", "const", "type"}, place)
        values = [node["const"]] if "const" in given else node["enum"]
        if not isinstance(values, list) or not values:
            refuse(place, "enum is a list of values")
        types = node.pop("type", None)
        types = [types] if isinstance(types, str) else types
        if types is not None:
            if not isinstance(types, list) or not all(type_ in _TYPES for type_ in types):
                refuse(place, f"{str(types)[:50]} is no type")
            values = [value for value in values if any(_fits(value, type_) for type_ in types)]
        if "const" in given and "enum" in given:
            values = [value for value in values if any(value == other for other in node["enum"])]
        if not values:
            refuse(place, "no value fits")
        node.pop("const", None)
        node["enum"] = values

    def _typed(self, node: dict[str, Any], given: set[str], place: str) -> None:
        types = node.get("type")
        if types is None:
            types = next((name for name in ("object", "array", "string", "number") if given & _OF_TYPE[name]), None)
            if types is None:
                return
            node["type"] = types
        if isinstance(types, list) and all(isinstance(each, str) for each in types):
            node["type"] = types = list(dict.fromkeys(types))
        for type_ in [types] if isinstance(types, str) else types if isinstance(types, list) else [types]:
            if type_ not in _TYPES:
                refuse(place, f"{str(type_)[:50]!r} is no type")
            said = given & _OF_TYPE.get(type_, set())
            if type_ == "object":
                self._object(node, said, place)
            elif type_ == "array":
                self._array(node, said, place)
            elif type_ == "string":
                _string(node, said, place)
            elif type_ == "integer":
                _integer(node, said, place, alone=isinstance(types, str))
            elif type_ == "number" and said:
                try:
                    check_number({name: node[name] for name in sorted(said)})
                except UserError as error:
                    refuse(place, str(error))

    def _object(self, node: dict[str, Any], said: set[str], place: str) -> None:
        properties, required = _members(node, place)
        additional = node.get("additionalProperties", True)
        for name in required:
            if name not in properties:
                if additional is False:
                    refuse(place, f"{name!r} is required and not allowed")
                properties[name] = {} if additional is True else additional
        if properties:
            node["properties"] = properties
        for name in sorted(said - {"properties", "required", "additionalProperties"}):
            if name in ("minProperties", "maxProperties") and not is_number(node[name]):
                refuse(place, f"{name} is a number")
            # without additionalProperties, an object that has properties gets no others
            is_met = (name == "minProperties" and node[name] <= len(set(required))) or (
                name == "maxProperties"
                and node[name] >= len(properties)
                and (additional is False or (bool(properties) and "additionalProperties" not in node))
            )
            if not is_met:
                refuse(place, f"{name} cannot be enforced")
        for name, child in properties.items():
            if child is True:
                properties[name] = child = {}
            self.visit(child, f"{place}/properties/{name[:100]}")
        if isinstance(additional, dict):
            self.visit(additional, f"{place}/additionalProperties")
        elif not isinstance(additional, bool):
            refuse(place, "additionalProperties is true, false or a schema")

    def _array(self, node: dict[str, Any], said: set[str], place: str) -> None:
        least, most = node.get("minItems", 0), node.get("maxItems", math.inf)
        if not all(is_number(each) for each in (least, most)) or least > most:
            refuse(place, "minItems and maxItems are numbers, one no more than the other")
        for name in sorted(said & {"contains", "minContains", "maxContains", "unevaluatedItems"}):
            refuse(place, f"{name} cannot be enforced")
        if "uniqueItems" in said and most > 1:
            refuse(place, "uniqueItems cannot be enforced")
        items = node.get("items")
        if isinstance(items, list):
            node["prefixItems"] = node.pop("items")
        elif "prefixItems" in node and "items" in node:
            if items is not False:
                refuse(place, "items cannot be enforced beside prefixItems")
            del node["items"]
        if "prefixItems" in node:
            first = node["prefixItems"]
            # an answer has exactly these items
            if not isinstance(first, list) or not least <= len(first) <= most:
                refuse(place, "an array of as many items as prefixItems has is not allowed")
            for i, child in enumerate(first):
                if child is True:
                    first[i] = child = {}
                self.visit(child, f"{place}/prefixItems/{i}")
        elif items is True or items is None:
            node["items"] = {}  # see `loosened`
        else:
            self.visit(items, f"{place}/items")


def _says_nothing(name: str, value: Any) -> bool:
    """Whether an assertion allows everything."""
    if value is True:
        return name in ("additionalProperties", "additionalItems", "unevaluatedProperties", "unevaluatedItems", "items")
    if value is False:
        return name == "uniqueItems"
    return (name in ("minItems", "minLength", "minProperties") and value == 0) or (name == "required" and value == [])


def _string(node: dict[str, Any], said: set[str], place: str) -> None:
    if "pattern" in said:
        if len(said) > 1:
            refuse(place, "lengths cannot be enforced beside pattern")
        if not isinstance(node["pattern"], str):
            refuse(place, "pattern is a text")
        node["pattern"] = json_pattern(node["pattern"], place)
    elif said:
        if not is_number(node.get("minLength", 0)) or not is_number(node.get("maxLength", 0)):
            refuse(place, "minLength and maxLength are numbers")
        if node.get("minLength", 0) > node.get("maxLength", math.inf):
            refuse(place, "no text is as long as minLength and as short as maxLength")


def _integer(node: dict[str, Any], said: set[str], place: str, alone: bool) -> None:
    if node.get("multipleOf", 1) != 1:
        refuse(place, "multipleOf cannot be enforced")
    bounds = said - {"multipleOf"}
    if any(not is_number(node[name]) or abs(node[name]) > MAX_INTEGER for name in bounds):
        refuse(place, f"the bounds of an integer are numbers of at most {MAX_INTEGER:,}")
    leasts, mosts = [-math.inf], [math.inf]
    if "minimum" in node:
        leasts.append(math.ceil(node["minimum"]))
    if "exclusiveMinimum" in node:
        leasts.append(math.floor(node["exclusiveMinimum"]) + 1)
    if "maximum" in node:
        mosts.append(math.floor(node["maximum"]))
    if "exclusiveMaximum" in node:
        mosts.append(math.ceil(node["exclusiveMaximum"]) - 1)
    least, most = max(leasts), min(mosts)
    if least > most:
        refuse(place, "no integer is within the bounds")
    if not alone and bounds:
        refuse(place, "bounds can be enforced only where the type is integer alone")
    for name in bounds:
        del node[name]
    if least > -math.inf:
        node["minimum"] = least
    if most < math.inf:
        node["maximum"] = most


def _members(node: dict[str, Any], place: str) -> tuple[dict[str, Any], list[str]]:
    """The properties of an object, and the names of those that it must have."""
    properties, required = node.get("properties", {}), node.get("required") or []
    if not isinstance(properties, dict) or not isinstance(required, list):
        refuse(place, "properties is an object and required a list")
    if not all(isinstance(name, str) for name in required):
        refuse(place, "required is a list of names")
    return properties, required


def type_of(value: Any) -> str:
    return next(name for name in (*_TYPES[:3], "boolean", "null", "number") if _fits(value, name))


def _fits(value: Any, type_: Any) -> bool:
    """Whether a value is of a type of JSON schemas."""
    python = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    if type_ in python:
        return isinstance(value, python[type_])
    return is_number(value) and (type_ == "number" or (type_ == "integer" and value == int(value)))


def _differ(told: list[Any]) -> bool:
    """Whether what _Rewriter._kinds tells of several schemas of one type sets them apart."""
    if all(isinstance(tells, set) for tells in told):
        return sum(map(len, told)) == len(set().union(*told))
    if not all(isinstance(tells, dict) for tells in told):
        return len(told) == 1
    return all(any(not a[name] & b[name] for name in a.keys() & b.keys()) for i, a in enumerate(told) for b in told[:i])
