"""Requests with large schemas, on templates with calls of every kind: each is served, or refused, within a few seconds.

Each kind took five to fifteen seconds once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pace import within
from repository import ROOT

from lminf_edge import Llama
from lminf_edge.errors import UserError
from lminf_edge.text.chat import ChatOptions
from lminf_edge.text.formats import ChatDefaults, LibraryFormat
from lminf_edge.text.library import ChatGrammar, Templates
from lminf_edge.text.tools import check_tools

TEMPLATES = ROOT / "build" / "upstream" / "llama.cpp" / "models" / "templates"
MOST = 4.0  # seconds of work: twice what was seen
ASKED = [{"role": "user", "content": "?"}]


def objects(properties: dict[str, Any], required: bool = True) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties) if required else []}


def tools(schemas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made = [{"type": "function", "function": {"name": f"f{i}", "parameters": each}} for i, each in enumerate(schemas)]
    return check_tools(made).functions


LONG = "n" * 990
SCHEMAS: dict[str, list[dict[str, Any]]] = {
    "integers": [objects({f"p{i}": {"type": "integer"} for i in range(2400)})],
    "integers of many tools": [objects({f"p{i}": {"type": "integer"} for i in range(800)})] * 12,
    "long names": [objects({f"{i}{LONG}": {"type": "integer"} for i in range(2400)})],
    "optional": [objects({f"option_{i}": {"type": "string"} for i in range(390)}, required=False)] * 20,
    "numbers": [objects({f"p{i}": {"type": "number", "minimum": t + i / 7} for i in range(130)}) for t in range(40)],
    "patterns": [objects({f"p{i}": {"type": "string", "pattern": f"^(a|b){{1,9}}-[0-9]+{i}$"} for i in range(1200)})],
}


@pytest.fixture(scope="module")
def vocabulary(nano_path: str) -> Iterator[Llama]:
    made = Llama(nano_path, vocab_only=True, verbose=False)
    yield made
    made.close()


SLOWEST = {  # where each kind took longest
    "integers": ["GLM-4.6"],
    "integers of many tools": ["GLM-4.6", "openai-gpt-oss-120b"],
    "long names": ["GLM-4.6", "openai-gpt-oss-120b"],
    "optional": ["chatml", "openai-gpt-oss-120b"],
    "numbers": ["chatml", "Qwen3-Coder"],
    "patterns": ["Qwen-Qwen3-0.6B"],
}


@pytest.mark.parametrize(("name", "template"), [(name, each) for name in SLOWEST for each in SLOWEST[name]])
def test_large_schemas_take_bounded_work(vocabulary: Llama, template: str, name: str) -> None:
    text = "chatml" if template == "chatml" else (TEMPLATES / f"{template}.jinja").read_text("utf-8")
    made = LibraryFormat(vocabulary, ChatDefaults(template=text))
    last = {"type": "function", "function": {"name": f"f{len(SCHEMAS[name]) - 1}"}}
    for choice in ("required", last):
        with within(MOST):
            said = work(vocabulary, made, ChatOptions(tools=tools(SCHEMAS[name]), tool_choice=choice))
        assert not said or "too much work" in said


def work(vocabulary: Llama, made: LibraryFormat, options: ChatOptions) -> str:
    """Renders a prompt and makes its grammar, as a server does; returns why that is refused."""
    try:
        grammar = made.render(ASKED, options, lambda: False).grammar
        if isinstance(grammar, ChatGrammar):
            grammar.check(vocabulary._model.vocab)
    except UserError as error:
        return str(error)
    return ""


def test_twice_as_many_parameters_are_twice_the_work() -> None:
    """Where a sequence of n parameters was n sequences."""
    templates = Templates(None, (TEMPLATES / "GLM-4.6.jinja").read_text("utf-8"), "<s>", "</s>")
    sizes = []
    for n in (500, 1000):
        schema = objects({f"p{i}": {"type": "integer"} for i in range(n)})
        made = templates.apply({"messages": ASKED, "tools": tools([schema]), "tool_choice": "required"})
        sizes.append(len(made["parser"]))
    assert sizes[1] < 2.2 * sizes[0]
