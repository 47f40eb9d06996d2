"""What the calls of a model's template are held to: functions that ask for strict ones may ask for more.

Templates with a notation of their own for values hold less than a schema says. What a template's grammar holds is tried
out once, with schemas whose parts are found again in the grammar; what that means for a schema follows from it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lminf_edge.text.library import ChatError, Templates
from lminf_edge.text.schema import resolved, type_of
from lminf_edge.text.schema_bounds import NUMBER_BOUNDS

_TEXT, _NESTED, _NUMBER = "lminf-text", "lminf-nested", 71943  # are in no template
_CHOICES = ("anyOf", "oneOf")
MAX_LEAVES = 256  # schemas that one is a choice of
_SAY_WHICH = {"enum", "const", "pattern", "maxLength", *NUMBER_BOUNDS}  # of the values of one type


@dataclass(frozen=True)
class Held:
    """What the grammar of a call that must come holds to a schema.

    texts     parameters that are texts
    others    parameters that are none
    nested    what is in arrays and objects
    names     which parameters there are
    required  which of them there must be
    whole     parameters whose schema is not simply that of an object
    choice    whether there is such a grammar where the model may call or not
    """

    texts: bool
    others: bool
    nested: bool
    names: bool
    required: bool
    whole: bool
    choice: bool


class Strictness:
    """Of the calls of a template."""

    def __init__(self, templates: Templates) -> None:
        self._templates = templates

    @functools.cached_property
    def held(self) -> Held:
        schemas = {
            "text": {"type": "string", "enum": [_TEXT]},
            "number": {"type": "integer", "enum": [_NUMBER]},
            "list": {"type": "array", "items": {"type": "string", "enum": [_NESTED]}},
        }
        grammar = self._grammar(_object(schemas))
        if not grammar:  # the template has no calls: one is written as JSON, by its schema
            return Held(*[True] * 7)
        x, y = ({name: {"type": "integer"}} for name in ("x", "y"))
        free = self._grammar({"type": "object", "properties": x})
        return Held(
            texts=_TEXT in grammar,
            others=str(_NUMBER) in grammar,
            nested=_NESTED in grammar,
            names=free != self._grammar({"type": "object", "properties": y}),
            required=free != self._grammar(_object(x)),
            whole=str(_NUMBER) in self._grammar({"anyOf": [_object(schemas)]}),
            choice=self._is_triggered(_object(x)),
        )

    def unheld(self, function: Mapping[str, Any], must_call: bool) -> str | None:
        """What of a function a call is not held to, or None. Its schema is one of `enforceable`."""
        held = self.held
        name, schema = f"{function['name'][:100]!r}", function["parameters"]
        if not (held.choice or must_call):
            return f"a call of {name} that may be left out"
        if all((held.texts, held.others, held.nested, held.names, held.required, held.whole)):
            return None
        is_object = schema.get("type") == "object" and not schema.keys() & {"$ref", "enum", *_CHOICES}
        if not (held.whole or is_object) or not (held.names or schema.get("additionalProperties", True) is True):
            return f"a call of {name}"
        required = schema.get("required") or []
        for parameter, each in (schema.get("properties") or {}).items():
            is_there = held.required or parameter not in required
            if not (held.others and is_there and self._holds(each, schema)):
                return f"the parameter {parameter[:100]!r} of {name}"
        return None

    def _holds(self, schema: Any, root: dict[str, Any]) -> bool:
        """Whether a parameter is held, where those that are no texts are."""
        leaves = _leaves(schema, root)
        if leaves is None:
            return False
        if any(not leaf.keys() & {"type", "enum", "const"} for leaf in leaves):
            return True  # it may be anything
        types = set().union(*map(_types, leaves))
        if types & {"array", "object"} and not self.held.nested:
            return False
        if "string" not in types or self.held.texts:
            return True
        # it is any text, but where one reads like another value it may be that
        return types <= {"string", "number", "boolean", "null"} and all(map(_is_free, leaves))

    def _grammar(self, parameters: Mapping[str, Any]) -> str:
        return str(self._made(parameters, "required").get("grammar", ""))

    def _is_triggered(self, parameters: Mapping[str, Any]) -> bool:
        """Whether there is a grammar from the first characters of a call on, where the model may make one or not."""
        made = self._made(parameters, "auto")
        patterns = [
            re.escape(trigger["value"]) if trigger["type"] == "word" else trigger["value"]
            for trigger in made.get("triggers", ())
        ]
        # one that is in the prompt is none in the answer (Functionary 3.2)
        return bool(patterns) and not any(re.search(pattern, made["generation_prompt"]) for pattern in patterns)

    def _made(self, parameters: Mapping[str, Any], choice: str) -> dict[str, Any]:
        function = {"name": "probe", "description": "", "parameters": parameters}
        request = {
            "messages": [{"role": "user", "content": "?"}],
            "tools": [{"type": "function", "function": function}],
            "tool_choice": choice,
        }
        try:
            return self._templates.apply(request)
        except ChatError:  # it refuses such a conversation
            return {}


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties]}


def _leaves(schema: Any, root: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The schemas that one is a choice of; None if there are very many, or a chain of references has no end."""
    leaves: list[dict[str, Any]] = []
    left, seen = [schema], set[int]()
    while left and len(seen) < MAX_LEAVES:
        node = resolved(root, left.pop())
        if not isinstance(node, dict):
            return None
        if id(node) not in seen:
            seen.add(id(node))
            choices = next((node[name] for name in _CHOICES if name in node), None)
            if choices is None:
                leaves.append(node)
            else:
                left += choices
    return None if left else leaves


def _types(leaf: Mapping[str, Any]) -> set[str]:
    if "enum" in leaf or "const" in leaf:
        return {type_of(value) for value in (leaf["enum"] if "enum" in leaf else [leaf["const"]])}
    types = leaf["type"]
    return {types} if isinstance(types, str) else set(types)


def _is_free(leaf: Mapping[str, Any]) -> bool:
    """Whether it is any value of its types."""
    return not leaf.keys() & _SAY_WHICH and leaf.get("minLength", 0) == 0
