"""The text of an answer to its message: content, thoughts, tool calls, as they come."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from lminf_edge.text.library import ChatError, Parser

# All of the text is parsed each time. So the next time waits for as many times what the last one took: parsing takes no
# more than its share of the time, and of a short text each token is parsed.
_SHARE = 60


@dataclass(frozen=True)
class Call:
    """A tool call: its index within the message, its name and its id."""

    index: int
    name: str
    id: str


@dataclass(frozen=True)
class Delta:
    """More of a message: of its content, its thoughts, or the arguments of a call."""

    text: str
    reasoning: bool = False
    call: Call | None = None


class Reader(Protocol):
    """Reads one answer."""

    def push(self, text: str) -> list[Delta]:
        """Takes more of the text; returns what this adds to the message."""

    def finish(self) -> list[Delta]:
        """What the end of the text adds."""


NewReader = Callable[[], Reader]


class PlainReader:
    """An answer that is its content."""

    def push(self, text: str) -> list[Delta]:
        return [Delta(text)] if text else []

    def finish(self) -> list[Delta]:
        return []


class ArgumentsReader:
    """An answer that is the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._call = new_call(0, name)
        self._has_begun = False

    def push(self, text: str) -> list[Delta]:
        self._has_begun = True
        return [Delta(text, call=self._call)]

    def finish(self) -> list[Delta]:
        return [] if self._has_begun else [Delta("", call=self._call)]


class NamedCallReader:
    """An answer that is one call, as JSON: {"name": ..., "arguments": {...}}."""

    _BEGIN = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*')

    def __init__(self) -> None:
        self._before = ""
        self._call: Call | None = None
        self._depth, self._in_string, self._escaped = 0, False, False
        self._has_ended = False

    def push(self, text: str) -> list[Delta]:
        if self._call is None:
            self._before += text
            begin = self._BEGIN.match(self._before)
            if begin is None or begin.end() == len(self._before):
                return []
            self._call = new_call(0, json.loads(begin[1]))
            text = self._before[begin.end() :]
        text = self._of_arguments(text)
        return [Delta(text, call=self._call)] if text else []

    def finish(self) -> list[Delta]:
        return [Delta(self._before)] if self._call is None and self._before else []  # cut short

    def _of_arguments(self, text: str) -> str:
        """What of the text is before the end of the arguments, which are an object."""
        for i, character in enumerate(text):
            if self._has_ended:
                return text[:i]
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = character == "\\", character != '"'
            elif character == '"':
                self._in_string = True
            else:
                self._depth += (character in "{[") - (character in "}]")
                self._has_ended = self._depth == 0
        return text


@dataclass
class _Message:
    content: str = ""
    reasoning_content: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


class MessageReader:
    """An answer in the format of its template, read by llama.cpp's chat library."""

    def __init__(self, parser: str, continues: bool) -> None:
        """`parser` is what Templates.apply returned; `continues`: the prompt ends within the message."""
        self._parser = Parser(parser)
        self._pieces: list[str] = []
        self._said = _Message()  # what deltas have been returned of
        self._calls: list[Call] = []  # that were begun
        self._due = 0.0
        if continues:
            self._said = self._read("", True) or self._said

    def push(self, text: str) -> list[Delta]:
        self._pieces.append(text)
        started = time.perf_counter()
        if started < self._due:
            return []
        message = self._read(self._text(), True)
        ended = time.perf_counter()
        self._due = ended + _SHARE * (ended - started)
        return [] if message is None else self._deltas(message, False)

    def finish(self) -> list[Delta]:
        text = self._text()
        message = self._read(text, False) or self._read(text, True)
        if message is None or message == _Message():
            # no message in the template's format: all of it is content
            message = _Message() if self._said != _Message() else _Message(content=text)
        return self._deltas(message, True)

    def _text(self) -> str:
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def _read(self, text: str, is_partial: bool) -> _Message | None:
        try:
            return _Message(**self._parser.parse(text, is_partial))
        except ChatError:
            return None

    def _deltas(self, message: _Message, is_whole: bool) -> list[Delta]:
        said = self._said
        deltas = []
        if text := _more(said.reasoning_content, message.reasoning_content):
            deltas.append(Delta(text, reasoning=True))
            said.reasoning_content += text
        if text := _more(said.content, message.content):
            deltas.append(Delta(text))
            said.content += text
        for i, found in enumerate(message.tool_calls):
            # a name may still grow while there are no arguments
            is_named = bool(found["name"]) and (found["arguments"] or is_whole or i + 1 < len(message.tool_calls))
            if i > len(self._calls) or (i == len(self._calls) and not is_named):
                break
            if i == len(self._calls):
                self._calls.append(new_call(i, found["name"], found["id"]))
                said.tool_calls.append({"arguments": found["arguments"]})
                deltas.append(Delta(found["arguments"], call=self._calls[i]))
            elif text := _more(said.tool_calls[i]["arguments"], found["arguments"]):
                deltas.append(Delta(text, call=self._calls[i]))
                said.tool_calls[i]["arguments"] += text
        return deltas


def new_call(index: int, name: str, id: str = "") -> Call:
    """`id` is the one that the model gave it, if it did."""
    return Call(index, name, id or f"call_{uuid.uuid4().hex[:24]}")


def _more(said: str, text: str) -> str:
    """What a text has after what was said of it; "" if that is not how it begins."""
    return text[len(said) :] if text.startswith(said) else ""
