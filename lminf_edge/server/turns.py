"""A conversation of any API as messages that chat templates take, and as a request for a chat completion."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from lminf_edge.server.arguments import AskedChat, part_text
from lminf_edge.server.errors import ApiError, invalid
from lminf_edge.server.events import Event
from lminf_edge.server.requests import ChatRequest, Sampling
from lminf_edge.server.stored import Response as Stored
from lminf_edge.text.answer import Call
from lminf_edge.text.service import Answer, Exchange

_PARAGRAPH = "\n\n"
_TAIL = 64  # tokens at the end of an answer among which a stop string is looked for


class Turns:
    """Messages in the order in which they come, as most templates demand them.

    There is one system message, at the beginning: what comes later is part of the user's turn. Messages of the same
    side that follow each other are one, and results belong to calls that were made.
    """

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._texts: dict[str, list[str]] = {}  # what the last message's fields grow by
        self._calls: set[str] = set()

    @property
    def messages(self) -> list[dict[str, Any]]:
        for name, texts in self._texts.items():
            before = self._messages[-1].get(name)
            self._messages[-1][name] = _PARAGRAPH.join([before, *texts] if before else texts)
        self._texts = {}
        return self._messages

    def system(self, text: str) -> None:
        if not self._messages:
            self.messages.append({"role": "system", "content": text})
        elif self._messages[-1]["role"] == "system":
            self._add(text)
        else:
            self.user(text)

    def user(self, text: str) -> None:
        if self._begins("user"):
            self.messages.append({"role": "user", "content": text})
        else:
            self._add(text)

    def assistant(self, text: str) -> None:
        self._assistant()
        self._add(text)

    def thoughts(self, text: str) -> None:
        self._assistant()
        self._add(text, "reasoning_content")

    def call(self, call_id: str, name: str, arguments: str) -> None:
        function = {"name": name, "arguments": arguments}
        calls = self._assistant().setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": function})
        self._calls.add(call_id)

    def result(self, call_id: Any, text: str, where: str) -> None:
        """What a call has returned. Raises ApiError if there was no such call."""
        if not isinstance(call_id, str) or call_id not in self._calls:
            message = f"{where}: this is the result of {str(call_id)[:100]!r}, but there is no such call before it."
            raise ApiError(400, message, param=where)
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def _begins(self, role: str) -> bool:
        return not self._messages or self._messages[-1]["role"] != role

    def _assistant(self) -> dict[str, Any]:
        if self._begins("assistant"):
            self.messages.append({"role": "assistant", "content": ""})
        return self._messages[-1]

    def _add(self, text: str, name: str = "content") -> None:
        self._texts.setdefault(name, []).append(text)  # joined once: there may be as many as fit a request


def texts(value: Any, where: str, kinds: tuple[str, ...] = ("text",)) -> list[str]:
    """The texts of what is a string or a list of parts. Raises ApiError for pictures and the like."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value] if value else []
    if not isinstance(value, list):
        raise ApiError(400, f"{where}: it must be text or a list of parts.", param=where)
    found = []
    for i, part in enumerate(value):
        text = part_text(part, kinds)
        if text is None:
            kind = part.get("type") if isinstance(part, dict) else None
            raise ApiError(400, f"{where}.{i}: only text can be read, not {str(kind)[:50]!r}.", param=where)
        if text:
            found.append(text)
    return found


def text_of(value: Any, where: str, kinds: tuple[str, ...] = ("text",)) -> str:
    return "\n".join(texts(value, where, kinds))


def as_arguments(value: Any) -> str:
    """The arguments of a call as the JSON text that templates expect."""
    return value if isinstance(value, str) else json.dumps({} if value is None else value, ensure_ascii=False)


def chat_request(request: Sampling, turns: Turns, fields: Mapping[str, Any]) -> ChatRequest:
    """The same request in the chat completions' terms; sampling parameters and the like are taken over.

    Raises ApiError.
    """
    taken = request.model_dump(include=set(Sampling.model_fields), exclude_unset=True)
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return ChatRequest.model_validate({**taken, **given, "messages": turns.messages})
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_input=False)[0]) from None


def check_path(before: Stored | None, path: str, param: str) -> None:
    """Raises ApiError for a stored conversation whose items are another API's."""
    if before is not None and before.path not in ("", path):
        message = f"{param}: the conversation that this stands for is one of {before.path}: go on with it there."
        raise ApiError(400, message, param=param)


def count_prompt(exchange: Exchange, asked: AskedChat) -> int:
    """Tokens of the prompt of a chat."""
    return len(exchange.chat_prompt(asked.messages, asked.options).tokens)


# --- answers ----------------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """A part of an answer: thoughts, text, or a call, whose text is its arguments."""

    kind: Literal["thoughts", "text", "call"]
    call: Call | None = None
    text: str = ""


@dataclass(frozen=True)
class Step:
    """One thing that happens to an answer; a block begins, grows, and ends before the next one begins."""

    kind: Literal["begin", "delta", "end", "finish"]
    block: Block
    event: Event


def steps(events: Iterator[Event]) -> Iterator[Step]:
    """The events of one choice as blocks; there is at least one."""
    block: Block | None = None
    for event in events:
        kind: Literal["thoughts", "text", "call"] = "call" if event.call else "thoughts" if event.reasoning else "text"
        text = event.part.text if event.part is not None else ""
        if event.call is not None or text or (event.finish_reason is not None and block is None):
            if block is None or block.kind != kind or block.call != event.call:
                if block is not None:
                    yield Step("end", block, event)
                block = Block(kind, event.call)
                yield Step("begin", block, event)
            if text:
                block.text += text
                yield Step("delta", block, event)
        if event.finish_reason is not None:
            assert block is not None
            yield Step("end", block, event)
            yield Step("finish", block, event)
            return


def found_stop(exchange: Exchange, answer: Answer | None, stops: list[str]) -> str | None:
    """The string of these that has ended an answer."""
    if answer is None or answer.text.stop_type != "word" or not stops:
        return None
    tail = exchange.service.llm.detokenize(answer.text.tokens[-_TAIL:].tolist()).decode("utf-8", "ignore")
    found = [(tail.find(stop), stop) for stop in stops if stop in tail]
    return min(found)[1] if found else None
