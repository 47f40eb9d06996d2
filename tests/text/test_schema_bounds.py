"""Schemas that are small to send and much work to look at: each is refused, or done with, within a second or two."""

from __future__ import annotations

from typing import Any

import pytest
from pace import within

from lminf_edge.errors import UserError
from lminf_edge.text.schema import enforceable, schema_gbnf
from lminf_edge.text.schema_bounds import MAX_PARTS, loosened
from lminf_edge.text.tools import MAX_TOOL_PARTS, ToolError, check_tools

MOST = 2.0  # seconds of work
TOO_LARGE = "the JSON schema is too large"


def objects(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), **more}


def number(i: int) -> dict[str, Any]:
    return {"type": "number", "minimum": i + 0.123456789012, "maximum": i + 987654321.123456789}


NULLS = {f"p{i}": {"type": "null"} for i in range(1000)}
REFERENCES = [{"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y"}]
PATTERN = {"type": "string", "pattern": "^" + "[a-z]{1,9}" * 400 + "$"}
# a schema, and what is said of it
SCHEMAS: dict[str, tuple[Any, str]] = {
    "alternatives that differ": ({"oneOf": [{"const": i} for i in range(4900)]}, ""),
    "alternatives that do not": ({"oneOf": [*({"const": i} for i in range(4900)), {"const": 7}]}, "no value fits two"),
    "alternatives of every type": ({"oneOf": [*({"const": i} for i in range(4900)), {"type": "integer"}]}, "fits two"),
    "alternatives with tags": ({"oneOf": [objects({"tag": {"const": i}}) for i in range(1200)]}, ""),
    "copies of a large one": (
        {"type": "object", "required": [f"r{i}" for i in range(1500)], "additionalProperties": objects(NULLS)},
        TOO_LARGE,
    ),
    "merged copies": (
        {"$defs": {"x": objects(NULLS), "y": objects({"z": {}})}, "anyOf": [{"allOf": REFERENCES}] * 1500},
        TOO_LARGE,
    ),
    "numbers": (objects({f"p{i}": number(i) for i in range(1900)}), ""),
    "patterns": (objects({f"p{i}": PATTERN for i in range(1000)}), TOO_LARGE),
    "a pattern in an array": ({"type": "array", "items": {"pattern": "a" * 200_000}}, TOO_LARGE),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_that_are_much_work(name: str) -> None:
    schema, said = SCHEMAS[name]
    with within(MOST):
        if said:
            with pytest.raises(UserError, match=said):
                enforceable(schema)
        else:
            assert "root ::= " in schema_gbnf(schema)


def tool(name: str, parameters: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


@pytest.mark.parametrize("strict", [False, True])
def test_tools_have_a_bound_together(strict: bool) -> None:
    n = 1000
    tools = [tool(f"f{t}", objects({f"p{i}": number(t * n + i) for i in range(n)}), strict=strict) for t in range(60)]
    refused = pytest.raises(ToolError, match=f"tools: their schemas have more than {MAX_TOOL_PARTS:,} parts")
    with within(MOST), refused:
        check_tools(tools)
    # far more than real agents have
    parameters = objects({f"p{i}": {"type": "string", "description": "x" * 200} for i in range(10)})
    assert len(check_tools([tool(f"f{t}", parameters, strict=strict) for t in range(300)]).functions) == 300


def test_a_pattern_that_grows_is_left_out_of_tools() -> None:
    schema = {"type": "string", "pattern": "^[" + "abc" * 200 + "]$"}
    assert loosened(schema) == {"type": "string"}
    [checked] = check_tools([tool("f", objects({"x": schema}))]).functions
    assert checked["function"]["parameters"]["properties"]["x"] == {"type": "string"}


def test_what_is_in_several_places_is_looked_at_once_and_counts_in_each() -> None:
    point = objects({"x": {"type": "number", "minimum": 0}, "y": {"const": 1}})
    schema = {"type": "object", "required": ["a", "b"], "additionalProperties": point}
    made = enforceable(schema)
    assert made["properties"]["a"] == made["properties"]["b"] == made["additionalProperties"]
    assert made["additionalProperties"]["properties"]["y"] == {"enum": [1]}
    n = MAX_PARTS // 4
    with pytest.raises(UserError, match=TOO_LARGE):
        enforceable({**schema, "required": [f"r{i}" for i in range(n)]})
