"""What is generated for a request, as events; the same for all dialects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lminf_edge.server.arguments import Asked, AskedChat
from lminf_edge.text.answer import Call
from lminf_edge.text.chat import ChatPrompt
from lminf_edge.text.detokenizer import Part
from lminf_edge.text.logprobs import LogprobReporter, TokenLogprobs
from lminf_edge.text.service import Answer, Exchange, with_seed


@dataclass(frozen=True)
class Event:
    """Of one choice: a part of its text, its thoughts or a tool call, or its end."""

    choice: int
    part: Part | None = None
    call: Call | None = None  # that the part belongs to, if there is one
    reasoning: bool = False  # whether the part is of the thoughts
    finish_reason: str | None = None
    answer: Answer | None = None  # the last one of the choice, at its end


def text_events(exchange: Exchange, asked: Asked, prompts: Sequence[ChatPrompt], offset: int = 0) -> Iterator[Event]:
    """`asked.n` choices for each of several prompts, one after the other; `offset` as LogprobReporter's."""
    for i in range(len(prompts) * asked.n):
        answer = begin_answer(exchange, asked, prompts[i // asked.n], i % asked.n, offset)
        for part in answer:
            yield Event(i, part=part)
        yield Event(i, finish_reason=answer.text.finish_reason, answer=answer)


def chat_events(exchange: Exchange, asked: AskedChat) -> Iterator[Event]:
    """`asked.n` choices, one after the other."""
    prompt = exchange.chat_prompt(asked.messages, asked.options)
    for i in range(asked.n):
        answer = begin_answer(exchange, asked, prompt, i)
        reader, calls = prompt.new_reader(), False
        logprobs: list[TokenLogprobs] = []  # of tokens whose text has not been read yet

        for part in answer:
            logprobs += part.logprobs
            for delta in reader.push(part.text):
                calls = calls or delta.call is not None
                yield Event(i, Part(delta.text, logprobs), delta.call, delta.reasoning)
                logprobs = []
        for delta in reader.finish():
            calls = calls or delta.call is not None
            yield Event(i, Part(delta.text, logprobs), delta.call, delta.reasoning)
            logprobs = []
        reason = answer.text.finish_reason
        yield Event(i, finish_reason="tool_calls" if calls and reason == "stop" else reason, answer=answer)


def begin_answer(exchange: Exchange, asked: Asked, prompt: ChatPrompt, i: int, offset: int = 0) -> Answer:
    """Choice `i` of a prompt; `offset` as LogprobReporter's."""
    reporter = (
        None
        if asked.n_top is None
        else LogprobReporter(exchange.service.llm, asked.n_top, offset, asked.after_sampling)
    )
    return exchange.answer(
        prompt,
        with_seed(asked.sampling, i),
        max_tokens=asked.max_tokens,
        stops=asked.stops,
        logprobs=reporter,
        counts_prompt=i == 0,
    )
