"""Schemas of everything that a grammar can hold an answer to."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class Point(BaseModel):
    x: int = Field(ge=-5, le=5)
    y: int = Field(gt=0, lt=100)


class Node(BaseModel):
    name: str = Field(min_length=1, max_length=12)
    point: Point | None
    children: list[Node] = Field(max_length=2)


class Rated(BaseModel):
    confidence: float = Field(ge=0, le=1)
    celsius: float = Field(gt=-273.15, lt=1e7)
    tiny: float | None = Field(ge=1e-7)


class Tagged(BaseModel):
    code: str = Field(pattern=r"^[A-Z]{2}-\d{3}$")
    kind: str = Field(pattern="^(a|b)$")
    loose: str = Field(pattern="x")
    lazy: str = Field(pattern=r"^a+?b{2}?$")


SCHEMAS: dict[str, Any] = {
    "nested": Point.model_json_schema(),
    "recursion": Node.model_json_schema(),
    "decimals": Rated.model_json_schema(),
    "a number by its bounds": {"minimum": -0.5, "exclusiveMaximum": 3},
    "a flag of the fourth draft": {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "type": "number",
        "minimum": 2,
        "exclusiveMinimum": True,
        "maximum": 3,
    },
    "patterns": Tagged.model_json_schema(),
    "union": {"oneOf": [{"type": "integer", "minimum": 10}, {"type": "boolean"}, {"enum": ["a", 'b"\\', None]}]},
    "several types": {"type": ["string", "null", "integer"], "maxLength": 3},
    "enum of a type": {"type": "string", "enum": ["a", 1, "b"]},
    "both bounds": {"type": "integer", "minimum": 3, "exclusiveMinimum": 5.5, "maximum": 9},
    "allOf": {
        "allOf": [{"$ref": "#/$defs/a"}, {"properties": {"b": {"type": "null"}}, "required": ["b"]}],
        "$defs": {"a": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}},
    },
    "other keys": {
        "type": "object",
        "properties": {"a]": {"type": "null"}, "a-z": {"type": "null"}, "^": {"type": "null"}},
        "additionalProperties": {"type": "boolean"},
        "required": ["a]"],
    },
    "a required key without a schema": {"type": "object", "required": ["z"]},
    "a tuple": {"type": "array", "prefixItems": [{"type": "integer"}, {"const": "x"}], "items": False},
    "a list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    "dates": {"type": "object", "properties": {"d": {"type": "string", "format": "date"}}, "required": ["d"]},
}
