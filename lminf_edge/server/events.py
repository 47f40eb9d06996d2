"""What is generated for a request, as events; the same for all dialects."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llama_cpp.llama_grammar import LlamaGrammar

from lminf_edge.engine.params import SamplingParams
from lminf_edge.server.arguments import Asked, AskedChat, tool_named
from lminf_edge.server.grammars import schema_grammar
from lminf_edge.text.chat import CALLING_FORMAT, ChatPrompt
from lminf_edge.text.detokenizer import Part
from lminf_edge.text.logprobs import LogprobReporter
from lminf_edge.text.service import Answer, Exchange, with_seed

MAX_CALLS = 16  # of tools in one answer


@dataclass(frozen=True)
class Call:
    """A tool call: its index within the choice, and its name."""

    index: int
    name: str
    id: str


@dataclass(frozen=True)
class Event:
    """Of one choice: a part of its text, a part of a tool call, or its end."""

    choice: int
    part: Part | None = None
    call: Call | None = None  # that the part belongs to, if there is one
    reasoning: bool = False  # the part is of the model's thoughts
    finish_reason: str | None = None
    answer: Answer | None = None  # the last one of the choice, at its end


def text_events(exchange: Exchange, asked: Asked, prompts: Sequence[ChatPrompt], offset: int = 0) -> Iterator[Event]:
    """`asked.n` choices for each of several prompts, one after the other; `offset` as LogprobReporter's."""
    for i in range(len(prompts) * asked.n):
        answer = _answer(exchange, asked, prompts[i // asked.n], i % asked.n, offset=offset)
        yield from _parts(answer, i)


def chat_events(exchange: Exchange, asked: AskedChat) -> Iterator[Event]:
    """`asked.n` choices, one after the other."""
    calls_by_itself = exchange.service.template.name == CALLING_FORMAT
    for i in range(asked.n):
        if isinstance(asked.tool_choice, dict):
            yield from _named_call(exchange, asked, asked.tool_choice["function"]["name"], i)
        elif asked.tool_choice == "required":
            name = _chosen_name(exchange, asked)
            yield from _named_call(exchange, replace(asked, tool_choice=_choice(name)), name, i)
        elif asked.tool_choice == "auto" and calls_by_itself and asked.tools:
            yield from _free_calls(exchange, asked, i)
        else:
            yield from _parts(_answer(exchange, asked, _prompt(exchange, asked), i), i)


def _prompt(exchange: Exchange, asked: AskedChat, suffix: str = "") -> ChatPrompt:
    more = {"tools": asked.tools, "tool_choice": asked.tool_choice} if asked.tools else {}
    return exchange.chat_prompt(asked.messages, suffix, {**more, **asked.template})


def _answer(exchange: Exchange, asked: Asked, prompt: ChatPrompt, i: int, offset: int = 0, **more: Any) -> Answer:
    reporter = None if asked.n_top is None else LogprobReporter(exchange.service.llm, asked.n_top, offset)
    return exchange.answer(
        prompt,
        with_seed(replace(asked.sampling, **more), i),
        max_tokens=asked.max_tokens,
        stops=asked.stops,
        logprobs=reporter,
        counts_prompt=i == 0,
    )


def _parts(answer: Answer, choice: int, call: Call | None = None) -> Iterator[Event]:
    for part in answer:
        yield Event(choice, part=part, call=call)
    reason = answer.text.finish_reason
    if call is not None and reason == "stop":
        reason = "tool_calls"  # type: ignore[assignment]
    yield Event(choice, finish_reason=reason, answer=answer)


# --- tools ------------------------------------------------------------------------------------------------------------


def _choice(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _call(index: int, name: str) -> Call:
    return Call(index, name, f"call_{uuid.uuid4().hex[:24]}")


def _arguments_grammar(exchange: Exchange, asked: AskedChat, name: str) -> LlamaGrammar:
    return schema_grammar(exchange.service.llm, tool_named(asked.tools, name)["parameters"], "tools")


def _named_call(exchange: Exchange, asked: AskedChat, name: str, i: int) -> Iterator[Event]:
    """A call of one function; a grammar enforces its arguments."""
    call = _call(0, name)
    suffix = f"functions.{name}:\n" if exchange.service.template.name == CALLING_FORMAT else ""
    grammar = _arguments_grammar(exchange, asked, name)
    answer = _answer(exchange, asked, _prompt(exchange, asked, suffix), i, grammar=grammar)
    yield Event(i, call=call)
    yield from _parts(answer, i, call)


def _chosen_name(exchange: Exchange, asked: AskedChat) -> str:
    """The function, of several, that the model chooses."""
    names = [tool["function"]["name"] for tool in asked.tools]
    grammar = "root ::= " + " | ".join(json.dumps(name) for name in names)
    sampling = replace(asked.sampling, grammar=grammar)
    return _word(exchange, _prompt(exchange, replace(asked, tool_choice="auto")), sampling)


def _free_calls(exchange: Exchange, asked: AskedChat, i: int) -> Iterator[Event]:
    """A message, or calls one after the other: the model says first which, in its format's words."""
    names = [tool["function"]["name"] for tool in asked.tools]
    call_words = " | ".join(json.dumps(f"functions.{name}:") for name in names)
    first = replace(asked.sampling, temperature=0.0, grammar=f'root ::= {call_words} | "message:"')
    said = _word(exchange, _prompt(exchange, asked), first)
    if said.startswith("message"):
        yield from _parts(_answer(exchange, asked, _prompt(exchange, asked, "message:\n"), i), i)
        return
    suffix = ""
    for index in range(MAX_CALLS):
        name = said.removeprefix("functions.").removesuffix(":")
        call = _call(index, name)
        suffix += f"functions.{name}:\n"
        grammar = _arguments_grammar(exchange, asked, name)
        answer = _answer(exchange, asked, _prompt(exchange, asked, suffix), i, grammar=grammar)
        arguments = _whole(answer)
        yield Event(i, part=Part(arguments, []), call=call)
        suffix += arguments + "\n"
        if answer.text.finish_reason == "length":
            yield Event(i, finish_reason="length", answer=answer)
            return
        more = replace(asked.sampling, grammar=f'root ::= {call_words} | "<|im_end|>"')
        said = _word(exchange, _prompt(exchange, asked, suffix), more)
        if not said.startswith("functions."):
            break
    yield Event(i, finish_reason="tool_calls", answer=answer)


def _word(exchange: Exchange, prompt: ChatPrompt, sampling: SamplingParams) -> str:
    """What the model chooses of the words of a grammar, never cut short by the server's own limit."""
    return _whole(exchange.answer(prompt, sampling, max_tokens=1 << 30, counts_prompt=False))


def _whole(answer: Answer) -> str:
    return "".join(part.text for part in answer)
