"""Calls of strict functions, asked for by the providers' own packages, are valid at a high temperature."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import jsonschema
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field
from served import Served, serve

from lminf_edge import LMInfConfig
from lminf_edge.models.named import NAMED_MODELS
from lminf_edge.server import Settings

SMOL = Path(__file__).parents[2] / "build" / "models" / NAMED_MODELS["smollm2"].file
ASKED: Any = [{"role": "user", "content": "Book a trip to Oslo for two, or look up what there is."}]
SEEDS = range(4)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Leg(Strict):
    train: str = Field(pattern=r"^[A-Z]{2}-\d{3}$")
    seats: int = Field(ge=1, le=9)
    price: float = Field(ge=0.5, lt=1000)


class Trip(Strict):
    legs: list[Leg] = Field(min_length=1, max_length=2)
    mood: Literal["early", 'late "or" later'] | None
    name: str = Field(max_length=12)


class Search(Strict):
    query: str = Field(min_length=1, max_length=20)
    after: int | None
    is_cheap: bool


FUNCTIONS: dict[str, dict[str, Any]] = {"book": Trip.model_json_schema(), "search": Search.model_json_schema()}

# (name, arguments) of the calls that were made to their end
Calls = list[tuple[str, Any]]


def completions(url: str, seed: int, name: str | None) -> Calls:
    ai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    tools: Any = [
        {"type": "function", "function": {"name": each, "parameters": schema, "strict": True}}
        for each, schema in FUNCTIONS.items()
    ]
    choice: Any = "required" if name is None else {"type": "function", "function": {"name": name}}
    [done] = ai.chat.completions.create(
        model="it", messages=ASKED, tools=tools, tool_choice=choice, temperature=1.5, seed=seed, max_tokens=250
    ).choices
    if done.finish_reason == "length":
        return []
    return [(call.function.name, json.loads(call.function.arguments)) for call in done.message.tool_calls or ()]


def responses(url: str, seed: int, name: str | None) -> Calls:
    ai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    tools: Any = [
        {"type": "function", "name": each, "parameters": schema, "strict": True} for each, schema in FUNCTIONS.items()
    ]
    choice: Any = "required" if name is None else {"type": "function", "name": name}
    done = ai.responses.create(
        model="it",
        input=ASKED,
        tools=tools,
        tool_choice=choice,
        temperature=1.5,
        max_output_tokens=250,
        extra_body={"seed": seed},
    )
    if done.status != "completed":
        return []
    return [(item.name, json.loads(item.arguments)) for item in done.output if item.type == "function_call"]


def messages(url: str, seed: int, name: str | None) -> Calls:
    ai = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    tools: Any = [{"name": each, "input_schema": schema, "strict": True} for each, schema in FUNCTIONS.items()]
    choice: Any = {"type": "any"} if name is None else {"type": "tool", "name": name}
    done = ai.messages.create(
        model="it",
        messages=ASKED,
        tools=tools,
        tool_choice=choice,
        max_tokens=250,
        extra_body={"seed": seed, "temperature": 1.5},
    )
    if done.stop_reason == "max_tokens":
        return []
    return [(block.name, block.input) for block in done.content if block.type == "tool_use"]


@pytest.fixture(scope="module")
def smollm() -> Iterator[Served]:
    if not SMOL.exists():
        pytest.skip("make real-models downloads it")
    with serve(str(SMOL), Settings(model_name="it"), lminf=LMInfConfig(), n_threads=2, n_threads_batch=2) as served:
        yield served


@pytest.mark.parametrize("ask", [completions, responses, messages])
@pytest.mark.parametrize("name", [None, "book"])
def test_calls_are_valid(smollm: Served, ask: Callable[[str, int, str | None], Calls], name: str | None) -> None:
    made = [call for seed in SEEDS for call in ask(smollm.url, seed, name)]
    for called, arguments in made:
        assert called == (name or called)
        jsonschema.validate(arguments, FUNCTIONS[called])
    assert len(made) >= len(SEEDS) // 2  # others were too long
    assert len({json.dumps(arguments) for _, arguments in made}) > 1  # the temperature was meant
