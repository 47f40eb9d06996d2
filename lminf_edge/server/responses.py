"""Events to OpenAI's format: whole responses, or chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import llama_cpp

import lminf_edge
from lminf_edge.engine.request import Request
from lminf_edge.server.events import Event
from lminf_edge.text.answer import Call
from lminf_edge.text.logprobs import TokenLogprobs, as_lists
from lminf_edge.text.service import Exchange

# llama-server's names its build, and clients compare it
FINGERPRINT = f"b{llama_cpp.__version__}-lminf-edge-{lminf_edge.__version__}"


def _head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4()}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": FINGERPRINT,
    }


def _costs(exchange: Exchange) -> dict[str, Any]:
    usage = exchange.usage
    return {"usage": usage.openai(), "timings": usage.timings(), "lminf": exchange.stream_info()}


# --- chat -------------------------------------------------------------------------------------------------------------


def chat_answer(exchange: Exchange, events: Iterable[Event], model: str) -> dict[str, Any]:
    """A whole chat completion."""
    choices: list[dict[str, Any]] = []
    for event in events:
        if event.choice == len(choices):
            message = {"role": "assistant", "content": None}
            choices.append({"index": event.choice, "message": message, "logprobs": None, "finish_reason": None})
        choice = choices[event.choice]
        message = choice["message"]
        if event.call is not None:
            calls: list[dict[str, Any]] = message.setdefault("tool_calls", [])
            if event.call.index == len(calls):
                function = {"name": event.call.name, "arguments": ""}
                calls.append({"id": event.call.id, "type": "function", "function": function})
            if event.part is not None:
                calls[event.call.index]["function"]["arguments"] += event.part.text
        elif event.part is not None:
            name = "reasoning_content" if event.reasoning else "content"
            message[name] = (message.get(name) or "") + event.part.text
        if event.finish_reason is not None:
            choice["finish_reason"] = event.finish_reason
            if "tool_calls" not in message:
                message["content"] = message["content"] or ""
            if event.answer is not None and event.answer.text.entries:
                choice["logprobs"] = chat_logprobs(event.answer.text.entries)
    return {**_head("chat.completion", "chatcmpl", model), "choices": choices, **_costs(exchange)}


def chat_chunks(
    exchange: Exchange, events: Iterable[Event], model: str, include_usage: bool
) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed chat completion."""
    head = _head("chat.completion.chunk", "chatcmpl", model)
    usage = {"usage": None} if include_usage else {}

    def chunk(event: Event, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        logprobs = chat_logprobs(event.part.logprobs) if event.part is not None and event.part.logprobs else None
        choice = {"index": event.choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice], **usage}

    begun: set[int | Call] = set()
    for event in events:
        if event.choice not in begun:
            begun.add(event.choice)
            yield chunk(Event(event.choice), {"role": "assistant", "content": None})
        if event.call is not None:
            yield chunk(event, {"tool_calls": [_call_delta(event, event.call, event.call not in begun)]})
            begun.add(event.call)
        elif event.part is not None:
            yield chunk(event, {"reasoning_content" if event.reasoning else "content": event.part.text})
        if event.finish_reason is not None:
            yield chunk(event, {}, event.finish_reason)
    if include_usage:
        yield {**head, "choices": [], **_costs(exchange)}


def _call_delta(event: Event, call: Call, begins: bool) -> dict[str, Any]:
    """A call as clients add it up: its id and name come once, and its arguments in parts."""
    arguments = event.part.text if event.part is not None else ""
    if not begins:
        return {"index": call.index, "function": {"arguments": arguments}}
    function = {"name": call.name, "arguments": arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def chat_logprobs(entries: list[TokenLogprobs]) -> dict[str, Any]:
    def told(token: str, logprob: float | None) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode("utf-8"))}

    return {
        "content": [
            {
                **told(entry.text, entry.logprob),
                "top_logprobs": [told(token, logprob) for token, logprob in (entry.top or {}).items()],
            }
            for entry in entries
        ],
        "refusal": None,
    }


# --- completions ------------------------------------------------------------------------------------------------------


Echo = tuple[str, list[TokenLogprobs]]  # what precedes the text of a choice, and its log probabilities


def completion_answer(exchange: Exchange, events: Iterable[Event], echoed: list[Echo], model: str) -> dict[str, Any]:
    """A whole completion; `echoed` is that of each choice."""
    choices: list[dict[str, Any]] = []
    for event in events:
        if event.choice == len(choices):
            text, _ = echoed[event.choice]
            choices.append({"index": event.choice, "text": text, "logprobs": None, "finish_reason": None})
        choice = choices[event.choice]
        if event.part is not None:
            choice["text"] += event.part.text
        if event.answer is not None:
            choice["finish_reason"] = event.finish_reason
            if event.answer.reports_logprobs:
                choice["logprobs"] = as_lists([*echoed[event.choice][1], *event.answer.text.entries])
    return {**_head("text_completion", "cmpl", model), "choices": choices, **_costs(exchange)}


def completion_chunks(
    exchange: Exchange, events: Iterable[Event], echoed: list[Echo], model: str, include_usage: bool
) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed completion; `echoed` is that of each choice."""
    head = _head("text_completion", "cmpl", model)
    usage = {"usage": None} if include_usage else {}

    def chunk(event: Event, text: str, entries: list[TokenLogprobs]) -> dict[str, Any]:
        logprobs = as_lists(entries) if entries else None
        choice = {"index": event.choice, "text": text, "logprobs": logprobs, "finish_reason": event.finish_reason}
        return {**head, "choices": [choice], **usage}

    n_begun = 0
    for event in events:
        if event.choice == n_begun:
            n_begun += 1
            text, entries = echoed[event.choice]
            if text or entries:
                yield chunk(Event(event.choice), text, entries)
        yield chunk(event, event.part.text if event.part else "", event.part.logprobs if event.part else [])
    if include_usage:
        yield {**head, "choices": [], **_costs(exchange)}


# --- progress ---------------------------------------------------------------------------------------------------------


def progress_of(request: Request, seconds: float) -> dict[str, Any]:
    """Prefill progress, in llama.cpp's format."""
    return {
        "total": len(request.prompt),
        "cache": request.stats.n_cached,
        "processed": request.n_done,
        "time_ms": round(1e3 * seconds, 1),
    }


def progress_chunk(request: Request, seconds: float) -> dict[str, Any]:
    """Prefill progress in a stream of OpenAI's format."""
    return {"object": "chat.completion.chunk", "choices": [], "prompt_progress": progress_of(request, seconds)}
