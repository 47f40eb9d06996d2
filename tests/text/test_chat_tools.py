"""Tools, thoughts and schemas through a model: nano, talked to in the templates of others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
from conftest import MakeLlama
from reference.gguf_file import copy_with_tokens
from schemas import SCHEMAS
from served import Served, serve
from test_chat_library import ASKED, TOOLS, templates

from lminf_edge import Llama, LMInfConfig
from lminf_edge.engine.sampler import sample_checked
from lminf_edge.errors import UserError
from lminf_edge.text.chat import ChatOptions, ChatTemplate
from lminf_edge.text.formats import ChatDefaults, LibraryFormat
from lminf_edge.text.schema import schema_gbnf
from lminf_edge.text.tokenizer import CachedTokenizer

PARAMETERS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
CALLING = ("Qwen-Qwen2.5-7B-Instruct", "Qwen3-Coder", "LFM2-8B-A1B")  # JSON, XML, Python


def with_template(llm: Any, name: str) -> ChatTemplate:
    chat_format = LibraryFormat(llm, ChatDefaults(template=templates()[name]))
    return ChatTemplate(llm, chat_format, CachedTokenizer(llm, chat_format.source, 1 << 20))


@pytest.fixture
def llm(make_llama: MakeLlama) -> Llama:
    made = make_llama(lminf=LMInfConfig(n_global=4, n_local=252))
    made.set_seed(1)
    return made


def saying(llm: Llama, text: str) -> Any:
    """A logits processor that lets the model begin with this text."""
    tokens = llm.tokenize(text.encode(), add_bos=False, special=True)
    left = iter(tokens)

    def process(_: Any, scores: Any) -> Any:
        token = next(left, None)
        if token is not None:
            scores[:] = -1e9
            scores[token] = 1e9
        return scores

    return [process]


def ends_strings(llm: Llama) -> dict[int, float]:
    """A bias without which nano's texts in JSON have no end."""
    return dict.fromkeys((token for text in (b'"', b'",', b'"}') for token in llm.tokenize(text, False)), 5.0)


def check_call(call: dict[str, Any]) -> None:
    jsonschema.validate(json.loads(call["function"]["arguments"]), PARAMETERS[call["function"]["name"]])


@pytest.mark.parametrize("name", CALLING)
def test_a_required_call_is_one(llm: Llama, name: str) -> None:
    llm.__dict__["_chat_template"] = with_template(llm, name)
    settings: Any = {"tools": TOOLS, "temperature": 0.7, "max_tokens": 200, "logit_bias": ends_strings(llm)}
    for choice in ("required", {"type": "function", "function": {"name": "send_mail"}}):
        done = llm.create_chat_completion(ASKED, tool_choice=choice, seed=2, **settings)["choices"][0]
        chunks: Any = list(llm.create_chat_completion(ASKED, tool_choice=choice, seed=2, stream=True, **settings))
        calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
        assert calls[0]["function"]["name"] == done["message"]["tool_calls"][0]["function"]["name"]
        streamed = "".join(call["function"]["arguments"] for call in calls if call["index"] == 0)
        assert streamed == done["message"]["tool_calls"][0]["function"]["arguments"]
        if done["finish_reason"] == "tool_calls":
            for call in done["message"]["tool_calls"]:
                check_call(call)
        if choice != "required":
            assert {call["function"]["name"] for call in done["message"]["tool_calls"]} == {"send_mail"}


NUMBERS = {
    "type": "object",
    "properties": {
        "p": {"type": "number", "minimum": 0, "maximum": 1},
        "t": {"type": ["number", "null"], "exclusiveMinimum": -5.5, "maximum": 17.25},
        "price": {"type": "number", "exclusiveMinimum": 0, "maximum": 99, "multipleOf": 0.1},
    },
    "required": ["p", "t", "price"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("name", CALLING[:2])
def test_numbers_of_a_call_are_within_their_bounds(llm: Llama, name: str) -> None:
    llm.__dict__["_chat_template"] = template = with_template(llm, name)
    function = {"name": "rate", "description": "Rates.", "parameters": NUMBERS, "strict": True}
    tools = [{"type": "function", "function": function}]
    settings: Any = {"temperature": 1.0, "max_tokens": 300, "logit_bias": ends_strings(llm)}
    numbers = list[Decimal]()
    for seed in range(4):
        done: Any = llm.create_chat_completion(ASKED, tools=tools, tool_choice="required", seed=seed, **settings)
        calls = done["choices"][0]["message"]["tool_calls"]
        for call in calls if done["choices"][0]["finish_reason"] == "tool_calls" else calls[:-1]:
            made = json.loads(call["function"]["arguments"], parse_float=Decimal)
            assert 0 <= made["p"] <= 1
            assert Decimal("-5.5") < (made["t"] or 0) <= Decimal("17.25")
            assert 0 < made["price"] <= 99
            assert made["price"] * 10 == int(made["price"] * 10)
            numbers += made.values()
    assert numbers
    # the model is told the bounds as they were given
    prompt = template.render(ASKED, ChatOptions(tools=tools, tool_choice="required")).text
    assert "-5.5" in prompt


@pytest.mark.parametrize("n_words", [1, 250])
def test_a_grammar_waits_for_its_trigger(llm: Llama, n_words: int) -> None:
    """And sees it inside of a token, after any length of text."""
    llm.__dict__["_chat_template"] = with_template(llm, "Qwen-Qwen2.5-7B-Instruct")
    before = "Well. " * n_words
    done: Any = llm.create_chat_completion(
        ASKED,
        tools=TOOLS,
        logits_processor=saying(llm, f"{before}<tool_call>\n"),
        logit_bias=ends_strings(llm),
        temperature=1.0,
        max_tokens=3 * n_words + 300,
    )
    choice = done["choices"][0]
    assert choice["message"]["content"].strip() == before.strip()
    calls = choice["message"]["tool_calls"]
    for call in calls if choice["finish_reason"] == "tool_calls" else calls[:-1]:
        check_call(call)
    assert {call["function"]["name"] for call in calls} <= PARAMETERS.keys()


def test_bounds_without_a_grammar_are_left_out(llm: Llama) -> None:
    price = {"type": "number", "minimum": 0, "multipleOf": 0.5}
    function: dict[str, Any] = {"name": "sell", "parameters": {"type": "object", "properties": {"price": price}}}
    tools: Any = [{"type": "function", "function": function}]
    assert llm.create_chat_completion(ASKED, tools=tools, tool_choice="required", max_tokens=1)
    function["strict"] = True
    with pytest.raises(ValueError, match="multipleOf"):
        llm.create_chat_completion(ASKED, tools=tools, tool_choice="required", max_tokens=1)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"tools": [{}]}, "a tool has a function with a name"),
        ({"tools": [{"function": {"name": ""}}]}, "a tool has a function with a name"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "two functions"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "give no tools"),
        ({"response_format": {"type": "xml"}}, "'xml'"),
    ],
)
def test_what_llama_refuses(llm: Llama, asked: Any, why: str) -> None:
    with pytest.raises(UserError, match=why):
        llm.create_chat_completion(ASKED, max_tokens=1, **asked)


def test_no_tools_no_trigger(llm: Llama) -> None:
    llm.__dict__["_chat_template"] = with_template(llm, "Qwen-Qwen2.5-7B-Instruct")
    text = '<tool_call>\n{"name": 1'
    settings: Any = {"temperature": 0.0, "max_tokens": len(llm.tokenize(text.encode(), False)) + 3}
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        done: Any = llm.create_chat_completion(ASKED, logits_processor=saying(llm, text), **settings, **more)
        assert done["choices"][0]["message"]["content"].strip().startswith(text)


def test_the_prompt_takes_nothing_of_a_budget(make_llama: MakeLlama, nano_path: str, tmp_path: Path) -> None:
    """Neither where it begins the thoughts, nor where it ends them."""
    model = tmp_path / "thinks.gguf"
    copy_with_tokens(nano_path, model, {1000: "<think>", 1001: "</think>"})  # one token each, as models that think have
    llm = make_llama(str(model), lminf=LMInfConfig(n_global=4, n_local=252))
    llm.__dict__["_chat_template"] = with_template(llm, "Qwen3.5-4B")
    settings: Any = {
        "temperature": 0.7,
        "seed": 3,
        "max_tokens": 40,
        "reasoning_budget_message": "That is quite enough.",
    }
    for budget in (0, 1, 2):
        done: Any = llm.create_chat_completion(ASKED, reasoning_budget_tokens=budget, **settings)
        said = done["choices"][0]["message"]
        thoughts = said["reasoning_content"].strip()
        assert thoughts.endswith("That is quite enough.")
        assert len(llm.tokenize(thoughts.removesuffix("That is quite enough.").encode(), False)) <= budget + 1
        assert said["content"]
    kwargs = {"enable_thinking": False}
    done = llm.create_chat_completion(ASKED, reasoning_budget_tokens=0, chat_template_kwargs=kwargs, **settings)
    said = done["choices"][0]["message"]
    assert "enough" not in said["content"]
    assert "think>" not in said["content"]


@pytest.mark.parametrize("name", ["Qwen-Qwen3-0.6B", "Qwen3.5-4B"])
def test_thoughts_have_a_budget(llm: Llama, name: str) -> None:
    llm.__dict__["_chat_template"] = with_template(llm, name)
    begun = "" if name == "Qwen3.5-4B" else "<think>\n"
    settings: Any = {"temperature": 0.7, "seed": 3, "max_tokens": 60}
    for budget, message in ((12, " Enough."), (-1, "")):
        done: Any = llm.create_chat_completion(
            ASKED,
            logits_processor=saying(llm, begun) if begun else None,
            reasoning_budget_tokens=budget,
            reasoning_budget_message=message,
            **settings,
        )
        said = done["choices"][0]["message"]
        n_thought = len(llm.tokenize(said["reasoning_content"].encode(), False))
        if budget < 0:
            assert n_thought > 30  # nano never ends them by itself
        else:
            assert said["reasoning_content"].strip().endswith("Enough.")
            assert n_thought <= 12 + 8
            assert said["content"]
    kept: Any = llm.create_chat_completion(
        ASKED, logits_processor=saying(llm, begun) if begun else None, reasoning_format="none", **settings
    )
    assert "reasoning_content" not in kept["choices"][0]["message"]


def test_a_message_is_continued(llm: Llama) -> None:
    llm.__dict__["_chat_template"] = template = with_template(llm, "Qwen-Qwen2.5-7B-Instruct")
    messages = [*ASKED, {"role": "assistant", "content": "The weather is"}]
    settings: Any = {"temperature": 0.0, "max_tokens": 10, "add_generation_prompt": False}
    done: Any = llm.create_chat_completion(messages, continue_final_message=True, **settings)
    prompt = template.render(ASKED).text + "The weather is"
    plain: Any = llm.create_completion(llm.tokenize(prompt.encode(), special=True), temperature=0.0, max_tokens=10)
    assert done["choices"][0]["message"]["content"] == plain["choices"][0]["text"]


# --- schemas ----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, Any] = {
    "no number": {"type": "number", "minimum": 0.5, "exclusiveMaximum": 0.5},
    "other multiples": {"type": "number", "multipleOf": 0.25},
    "multiples": {"type": "integer", "multipleOf": 3},
    "unique": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    "not": {"not": {"type": "string"}},
    "conditions": {"type": "object", "if": {}, "then": {}},
    "two that fit": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "beside a reference": {"$ref": "#/$defs/a", "minLength": 2, "$defs": {"a": {"type": "string"}}},
    "no target": {"$ref": "#/$defs/a"},
    "elsewhere": {"$ref": "http://example.org/schema"},
    "keys of a pattern": {"type": "object", "patternProperties": {"^a": {}}},
    "a word boundary": {"type": "string", "pattern": r"^\bx$"},
    "looking ahead": {"type": "string", "pattern": "^(?=a)a$"},
    "an unknown type": {"type": "text"},
    "closed parts": {
        "allOf": [{"type": "object", "additionalProperties": False}, {"type": "object", "properties": {}}]
    },
    "nothing fits": {"type": "integer", "minimum": 4, "maximum": 3},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_the_grammar_of_a_schema_allows_is_valid(make_llama: MakeLlama, name: str) -> None:
    llm = make_llama(lminf=None, vocab_only=True)
    grammar = schema_gbnf(SCHEMAS[name])
    rng = np.random.default_rng(0)
    n_whole = 0
    for _ in range(6):
        sampler, drawn = llm._init_sampler(grammar=grammar, temp=0.0), list[int]()
        while llm.token_eos() not in drawn and len(drawn) < 200:
            logits = rng.standard_normal(llm.n_vocab()).astype(np.float32)
            logits[llm.token_eos()] = 9.0  # as soon as it may
            logits[llm.tokenize(b'"', add_bos=False)[-1]] = 3.0
            drawn.append(sample_checked(sampler, logits))
        if drawn[-1] == llm.token_eos():
            n_whole += 1
            jsonschema.validate(json.loads(llm.detokenize(drawn[:-1]).decode(errors="replace")), SCHEMAS[name])
    assert n_whole


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused(name: str) -> None:
    with pytest.raises(UserError) as refused:
        schema_gbnf(REFUSED[name])
    assert 5 < len(str(refused.value)) < 300


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(nano_path: str) -> Iterator[Served]:
    with serve(nano_path, lminf=LMInfConfig(n_global=4, n_local=252)) as made:
        made.service.template = with_template(made.service.llm, "Qwen-Qwen2.5-7B-Instruct")
        yield made


def post(served: Served, **body: Any) -> httpx.Response:
    body = {"messages": ASKED, "max_tokens": 200, "temperature": 0, **body}
    return httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)


def test_the_server_streams_what_it_says_whole(served: Served) -> None:
    choice = post(served, tools=TOOLS, tool_choice="required").json()["choices"][0]
    [*calls] = choice["message"]["tool_calls"]
    with httpx.stream(
        "POST",
        f"{served.url}/v1/chat/completions",
        json={"messages": ASKED, "max_tokens": 200, "temperature": 0, "tools": TOOLS, "stream": True}
        | {"tool_choice": "required"},
        timeout=60,
    ) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    parts = [call for each in choices for call in each["delta"].get("tool_calls", ())]
    assert parts[0]["function"]["name"] == calls[0]["function"]["name"]
    arguments = "".join(part["function"]["arguments"] for part in parts if part["index"] == 0)
    assert arguments == calls[0]["function"]["arguments"]
    assert choices[-1]["finish_reason"] == choice["finish_reason"]


RESULT = {"role": "tool", "tool_call_id": "no such", "content": "1"}
ASSISTANT = {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f"}}]}
WRONG: dict[str, Any] = {
    "a picture": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    "a result of no call": {
        "messages": [
            *ASKED,
            {**ASSISTANT, "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]},
            RESULT,
        ]
    },
    "a call without arguments": {"messages": [*ASKED, ASSISTANT, {"role": "user", "content": "x"}]},
    "arguments that are no JSON": {
        "messages": [
            *ASKED,
            {**ASSISTANT, "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}]},
            {"role": "user", "content": "x"},
        ]
    },
    "a broken schema": {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": 1}}}]
    },
    "a schema that cannot be enforced": {
        "tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": REFUSED["not"]}}]
    },
    "two functions of one name": {"tools": [TOOLS[0], TOOLS[0]]},
    "a grammar beside tools": {"tools": TOOLS, "grammar": 'root ::= "a"'},
    "no such tool": {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
    "a schema and a grammar": {"json_schema": {"type": "null"}, "grammar": 'root ::= "a"'},
    "two messages to continue": {"messages": [*ASKED, *[{"role": "assistant", "content": "a"}] * 2]},
    "a format of thoughts": {"reasoning_format": "loud"},
    "thoughts that may be": {"chat_template_kwargs": {"enable_thinking": "perhaps"}},
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_told(served: Served, name: str, stream: bool) -> None:
    answer = post(served, stream=stream, **WRONG[name])
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"].endswith(".")


def test_an_answer_is_continued_unless_not_wanted(served: Served) -> None:
    messages = [*ASKED, {"role": "assistant", "content": "The weather"}]
    prompts = [
        post(served, messages=messages, max_tokens=1, **more).json()["usage"]["prompt_tokens"]
        for more in ({}, {"continue_final_message": False})
    ]
    assert prompts[0] < prompts[1]
