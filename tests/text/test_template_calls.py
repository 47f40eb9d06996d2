"""What the templates of llama.cpp write as a call of a tool is read as one, whole and as it is generated."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pace import within
from repository import ROOT
from test_chat_library import (
    ANSWERED,
    ARGUMENTS,
    ASKED,
    TOOLS,
    apply,
    message,
    opened,
    read,
    read_pieces,
    templates,
)

from lminf_edge import Llama
from lminf_edge.errors import UserError
from lminf_edge.models.named import NAMED_MODELS
from lminf_edge.text.chat import ChatOptions
from lminf_edge.text.detokenizer import Detokenizer, StopScanner
from lminf_edge.text.formats import ChatDefaults, LibraryFormat
from lminf_edge.text.library import ChatError, Parser
from lminf_edge.text.schema import enforceable
from lminf_edge.text.schema_bounds import loosened
from lminf_edge.text.strict import Strictness


def tokens_of(llm: Llama, text: str) -> Iterator[str]:
    """A text as generation hands it over: token by token, of those that end inside a character the whole ones."""
    tokens = llm.tokenize(text.encode(), add_bos=False, special=True)
    special = {token for token in tokens if llm.detokenize([token], special=True) and not llm.detokenize([token])}
    detokenizer, scanner = Detokenizer(llm, [1], [], special), StopScanner([])
    for token in tokens:
        for part in scanner.push(detokenizer.piece(token), None):
            yield part.text
    for part in scanner.flush():
        yield part.text


# What templates do not do, and llama.cpp's library does not for them. The sets are exact, so that a new version of
# either is noticed. Templates that show the model no tools:
NO_TOOLS = {
    "HuggingFaceTB-SmolLM3-3B": "a copy made for inference engines, from which they were cut",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "it knows calls and their results, and not the tools",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "the same",
    "deepseek-ai-DeepSeek-V3.1": "the same",
    "google-gemma-2-2b-it": "a model that was trained on none",
    "llama-cpp-rwkv-world": "the same",
    "microsoft-Phi-3.5-mini-instruct": "the same",
}
# templates that leave out the calls of the history, so there is nothing to read:
NO_CALLS = {
    "HuggingFaceTB-SmolLM3-3B": "as above",
    "LFM2-8B-A1B": "a call is a text to it: it writes the content alone",
    "LFM2.5-Instruct": "the same",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "it writes a call where the content is null: llama.cpp has '' for that",
    "google-gemma-2-2b-it": "it refuses a tool's message, and writes no call",
    "ibm-granite-granite-3.3-2B-Instruct": "it writes the content alone",
    "llama-cpp-rwkv-world": "the same",
    "microsoft-Phi-3.5-mini-instruct": "the same",
}
# templates whose notation of values is not JSON, where the grammar of a call holds it to names:
NAMES_ONLY = {
    "Kimi-K3": "parameters are tags with types, in any order",
    "LFM2-8B-A1B": "a call is Python's; values are any of Python's",
    "LFM2.5-8B-A1B": "the same",
    "LFM2.5-Instruct": "the same",
    "google-gemma-4-31B-it": "values are in a notation of its own, names of parameters are free",
    "google-gemma-4-31B-it-interleaved": "the same",
}
# templates where a text stands in tags as it is, not as JSON: it may be any that is not the tag behind it
TEXTS_AS_THEY_ARE = {
    *("ByteDance-Seed-OSS", "GLM-4.6", "GLM-4.7-Flash", "MiniMax-M2", "MiniMax-M3"),
    *("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "Qwen3-Coder", "Qwen3.5-4B", "Spark2.5", "StepFun3.5-Flash"),
    *("deepseek-ai-DeepSeek-V3.2", "deepseek-ai-DeepSeek-V4", "deepseek-ai-DeepSeek-V4-Flash-0731"),
    *("inclusionai-ling-3.0-flash", "muse-glimmer", "openbmb-MiniCPM5-1B", "poolside-Laguna-S-2.1"),
    *("poolside-Laguna-XS-2.1", "poolside-Laguna-XS.2", "tencent-Hy3"),
}


def rendered_call(name: str) -> tuple[str, dict[str, Any]] | None:
    """What a template makes of an answer that calls a tool, after its generation prompt; and what parses it."""
    [_, question], [*_, answer] = ASKED, ANSWERED[:3]
    without_thoughts = {key: value for key, value in answer.items() if key != "reasoning_content"}
    for told, last in itertools.product((ASKED, [question]), (answer, without_thoughts)):
        made = apply(name, told, tools=TOOLS, parallel_tool_calls=False)
        answered = apply(name, [*told, last], tools=TOOLS, add_generation_prompt=False)["prompt"]
        prompt = made["prompt"]
        if answered.startswith(prompt):
            return answered[len(prompt) :], made
        # thoughts that the prompt begins; the template may leave them out of the history
        start, lines = made["thinking_start"].strip(), prompt.rstrip()
        for begun in (lines.removesuffix(start), lines[: lines.rfind("\n") + 1]):
            if start and answered.startswith(begun):
                text, thoughts = answered[len(begun) :].removeprefix(start).lstrip(), answer["reasoning_content"]
                return text if thoughts in text else f"{thoughts}\n{made['thinking_ends'][0]}{text}", made
    # what the prompt says behind the question, it says behind the answer, too
    _, found, text = answered.partition(question["content"])[2].partition(made["generation_prompt"])
    return (text, made) if found else None


@pytest.fixture(scope="module")
def vocabularies(nano_path: str) -> Iterator[list[Llama]]:
    """Of nano, in which most characters beyond ASCII are bytes; and SmolLM2's, if it is there."""
    smol = ROOT / "build" / "models" / NAMED_MODELS["smollm2"].file
    made = [Llama(path, vocab_only=True, verbose=False) for path in (nano_path, smol) if Path(path).exists()]
    yield made
    for llm in made:
        llm.close()


def test_what_a_template_writes_as_a_call_is_read_as_one(vocabularies: list[Llama]) -> None:
    """Whole, and as it comes: in pieces of a few characters, and of one token."""
    n_read, n_pieces, others = 0, 0, []
    for name in templates():
        rendered = rendered_call(name)
        assert rendered is not None, name
        text, made = rendered
        whole = Parser(made["parser"])
        try:
            found = whole.parse(text, False)["tool_calls"]
        except ChatError:
            # what ends the message is not part of an answer: a stop, or an end-of-generation token
            found = []
            for end in range(len(text) - 1, 0, -1):
                try:
                    found = whole.parse(text[:end], False)["tool_calls"]
                except ChatError:
                    continue
                text = text[:end]
                break
        if not found:
            others.append(name)
            continue
        assert [call["name"] for call in found] == ["get_weather"], name
        assert json.loads(found[0]["arguments"]) == ARGUMENTS, name
        expected = message(read(made["parser"], text, len(text)))
        assert expected[2] == [("get_weather", ARGUMENTS)], name
        assert message(read(made["parser"], text, 3)) == expected, name
        for llm in vocabularies:
            _, *pieces = tokens_of(llm, text)
            first = text.removesuffix("".join(pieces))  # sentencepiece may begin with another space
            if first == text:
                assert "▁" in text, name  # which is nano's space
                continue
            pieces = [first, *pieces]
            assert message(read_pieces(made["parser"], pieces)) == expected, name
            n_pieces += len(pieces)
        n_read += 1
    assert set(others) == NO_CALLS.keys()
    assert n_read + len(others) == len(templates())
    assert n_pieces > 20 * n_read


def test_which_templates_show_no_tools() -> None:
    silent = {name for name in templates() if "get_weather" not in apply(name, ASKED, tools=TOOLS)["prompt"]}
    assert silent == NO_TOOLS.keys()


def grammar_of(name: str, schema: Any) -> str:
    """Of a call that must come, of a function with a parameter of this schema."""
    parameters = {"type": "object", "properties": {"x": schema, "y": {"type": "string"}}, "required": ["x", "y"]}
    tool = {"type": "function", "function": {"name": "f", "description": "F.", "parameters": parameters}}
    return str(apply(name, ASKED, tools=[tool], tool_choice="required")["grammar"])


def test_which_grammars_hold_calls_to_their_schemas() -> None:
    free, loose = set(), set()
    for name in templates():
        integer = grammar_of(name, {"type": "integer"})
        if not integer:
            assert name in NO_CALLS  # a call is JSON then, by a grammar that we make
        elif integer == grammar_of(name, {"type": "boolean"}):
            free.add(name)
        elif grammar_of(name, {"type": "string"}) == grammar_of(name, {"type": "string", "enum": ["a", "b"]}):
            loose.add(name)
    assert free == NAMES_ONLY.keys()
    assert loose == TEXTS_AS_THEY_ARE


@functools.cache
def strictness(name: str) -> Strictness:
    return Strictness(opened(name))


def unheld(name: str, parameters: Any, must_call: bool = True) -> str | None:
    return strictness(name).unheld({"name": "f", "parameters": enforceable(parameters)}, must_call)


def test_what_the_grammars_hold() -> None:
    """By templates, without those that hold all of a schema."""
    less = {}
    for name in templates():
        held = dataclasses.asdict(strictness(name).held)
        if not all(held.values()):
            less[name] = {what for what, is_held in held.items() if not is_held}
    tags = {"texts", "whole"}
    nothing = {"texts", "others", "nested", "required", "whole"}
    expected = dict.fromkeys(TEXTS_AS_THEY_ARE, tags) | {name: nothing for name in NAMES_ONLY if name not in NO_CALLS}
    expected |= dict.fromkeys(("LFM2-8B-A1B", "LFM2.5-Instruct"), nothing)
    expected |= {"MiniMax-M3": tags | {"nested"}}
    expected |= dict.fromkeys(("muse-glimmer", "openbmb-MiniCPM5-1B"), tags | {"required"})
    expected |= {name: nothing | {"names"} for name in NAMES_ONLY if "gemma-4" in name}
    untriggered = [name for name in templates() if name.startswith("meta-llama-Llama-3")]
    expected |= {key: {"choice"} for key in [*untriggered, "meetkai-functionary-medium-v3.2"]}
    assert less == expected


TEXT = {"type": "string"}
ENUM = {"type": "string", "enum": ["a", "b"]}


@pytest.mark.parametrize(
    ("schema", "is_text", "is_nested"),
    [
        (True, False, False),
        ({"type": "string", "description": "Any.", "format": "date-time", "minLength": 0}, False, False),
        ({"anyOf": [TEXT, {"type": "null"}], "default": None}, False, False),
        ({"type": ["string", "null"]}, False, False),
        ({"$ref": "#/$defs/text"}, False, False),
        (ENUM, True, False),
        ({"$ref": "#/$defs/enum"}, True, False),
        ({"anyOf": [ENUM, {"type": "null"}]}, True, False),
        ({"enum": ["a", None]}, True, False),
        ({"anyOf": [TEXT, {"type": "integer", "minimum": 3}]}, True, False),
        ({"type": "string", "pattern": "^a+$"}, True, False),
        ({"type": "string", "maxLength": 3}, True, False),
        ({"type": "integer", "minimum": 1}, False, False),
        ({"enum": [1, 2]}, False, False),
        ({"type": "array", "items": ENUM}, False, True),
        ({"type": "object", "properties": {"a": ENUM}, "required": ["a"]}, False, True),
        ({"$ref": "#/$defs/tree"}, False, True),
    ],
)
def test_what_a_grammar_does_not_hold_is_known(schema: Any, is_text: bool, is_nested: bool) -> None:
    tree = {"type": "object", "properties": {"x": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}}
    parameters = {
        "type": "object",
        "properties": {"y": TEXT, "x": schema},
        "$defs": {"text": TEXT, "enum": ENUM, "tree": tree},
    }
    for name in templates():
        held = strictness(name).held
        if not held.others:
            expected = "y"
        else:
            expected = "x" if (is_text and not held.texts) or (is_nested and not held.nested) else None
        found = unheld(name, parameters)
        assert found == (expected and f"the parameter {expected!r} of 'f'"), name


def test_more_than_a_parameter_may_be_unheld() -> None:
    number = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    empty = {"type": "object", "properties": {}, "additionalProperties": False}
    for parameters in ({"$ref": "#/$defs/x", "$defs": {"x": number}}, {"anyOf": [number, empty]}):
        assert unheld("GLM-4.6", parameters) == "a call of 'f'"
        assert unheld("Qwen-Qwen3-0.6B", parameters) is None
    assert unheld("google-gemma-4-31B-it", empty) == "a call of 'f'"
    assert unheld("google-gemma-4-31B-it", {"type": "object"}) is None
    assert unheld("LFM2-8B-A1B", empty) is None
    assert unheld("openbmb-MiniCPM5-1B", number) == "the parameter 'x' of 'f'"
    assert unheld("openbmb-MiniCPM5-1B", {**number, "required": []}) is None
    llama = "meta-llama-Llama-3.1-8B-Instruct"
    assert unheld(llama, number, must_call=False) == "a call of 'f' that may be left out"
    assert unheld(llama, number) is None


def test_choices_without_end_are_looked_at_in_no_time() -> None:
    many = {"anyOf": [{"type": "string", "maxLength": i} for i in range(1, 700)]}
    wrapped = {f"x{i}": {"anyOf": [{"$ref": "#/$defs/many"}]} for i in range(700)}
    parameters = {"type": "object", "properties": wrapped, "required": [*wrapped], "$defs": {"many": many}}
    loop = {
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/a"}},
        "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}},
    }
    with within(5, time.monotonic):
        assert unheld("GLM-4.6", parameters) == "the parameter 'x0' of 'f'"
        assert unheld("GLM-4.6", loop) is None


def test_parameters_whose_names_a_grammar_writes_alike() -> None:
    """Each has a rule of its own: with one of them for all, a call had that one several times."""
    schemas = {"a_b": {"type": "integer"}, "a-b": {"type": "boolean"}, "a.b": {"type": "string"}}
    for name in templates():
        tool = {"type": "function", "function": {"name": "f", "description": "F.", "parameters": object_of(schemas)}}
        grammar = str(apply(name, ASKED, tools=[tool], tool_choice="required")["grammar"])
        if grammar and strictness(name).held.names:
            assert all(each in grammar for each in schemas), name


def test_arrays_of_anything_and_schemas_that_are_true() -> None:
    """Where nothing is said of an array's items, templates take a function of that name, `items`, for it."""
    given = object_of({"list": {"type": "array"}, "any": True, "lists": {"type": "array", "items": True}})
    for prepared in (loosened, enforceable):
        for name in templates().keys() - {
            "ByteDance-Seed-OSS",  # it wants to know the type of each
            "CohereForAI-c4ai-command-r-plus-tool_use",  # and of each item
        }:
            function = {"name": "f", "description": "F.", "parameters": prepared(given)}
            made = apply(name, ASKED, tools=[{"type": "function", "function": function}])
            assert name in NO_TOOLS or "lists" in made["prompt"], name
        pair = prepared({"type": "array", "prefixItems": [{"type": "integer"}, True], "items": False})
        assert grammar_of("Qwen-Qwen3-0.6B", pair)


def object_of(schemas: Any) -> dict[str, Any]:
    return {"type": "object", "properties": schemas, "required": [*schemas]}


def test_a_strict_function_that_cannot_be_held_is_refused(vocabularies: list[Llama]) -> None:
    enum = {"type": "object", "properties": {"mode": {"type": "string", "enum": ["a", "b"]}}, "required": ["mode"]}
    tool = {"type": "function", "function": {"name": "f", "description": "F.", "parameters": enum}}
    chat_format = LibraryFormat(vocabularies[0], ChatDefaults(template=templates()["Qwen3-Coder"]))

    def render(**options: Any) -> None:
        chat_format.render([{"role": "user", "content": "Hi."}], ChatOptions(tools=[tool], **options), lambda: False)

    for choice in ("auto", "required", {"function": {"name": "f"}}):
        with pytest.raises(
            UserError, match="the parameter 'mode' of 'f' cannot be held to its schema: leave strict out"
        ):
            render(strict=frozenset({"f"}), tool_choice=choice)
    render(strict=frozenset({"f"}), tool_choice="none")
    render(strict=frozenset({"g"}))
    render()
