"""Chat messages to a prompt and what its answer needs, by llama.cpp's chat library or one of llama_cpp's formats."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import llama_cpp

from lminf_edge.cache.token_log import Tokens
from lminf_edge.engine.params import Grammar
from lminf_edge.text.answer import NewReader, PlainReader
from lminf_edge.text.library import ChatGrammar
from lminf_edge.text.tokenizer import CachedTokenizer

# tokens; a message shorter than this is not worth a checkpoint of its own
_MIN_MESSAGE = 8

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatOptions:
    """What is asked of an answer besides its messages. None: what the template or the service has as its default.

    strict                  names of the tools whose calls must follow their schema in all
    tool_choice             "none", "auto", "required", or {"function": {"name": ...}}
    continue_final_message  the last message, an assistant's, is continued: its "content", its "reasoning_content", or
                            (True) what it has
    reasoning_format        "none": thoughts stay in the content
    thinking_budget         tokens of thoughts; -1: any number
    budget_message          said where the budget ends them
    json_schema             of the answer's content
    grammar                 of the whole answer, in place of others
    template_kwargs         more arguments of the template
    """

    tools: Sequence[Mapping[str, Any]] = ()
    strict: frozenset[str] = frozenset()
    tool_choice: Literal["none", "auto", "required"] | Mapping[str, Any] = "auto"
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool | str = False
    reasoning_format: str | None = None
    enable_thinking: bool | None = None
    thinking_budget: int | None = None
    budget_message: str | None = None
    json_schema: Any = None
    grammar: Grammar | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatPrompt:
    """
    text         the rendered template
    tokens       int32 (n_tokens,)
    boundaries   where messages begin, the answer's among them, in tokens
    n_system     tokens before the first message after the system block; None if that is not known
    n_pinned     tokens of the system block, 0 if there is none
    stops        strings that end the completion
    grammar      that the answer must follow
    preserved    special tokens whose text is part of the answer's
    new_reader   makes a reader of the answer
    """

    text: str
    tokens: Tokens
    boundaries: list[int] = field(default_factory=list)
    n_system: int | None = None
    n_pinned: int = 0
    stops: list[str] = field(default_factory=list)
    grammar: Grammar | None = None
    preserved: frozenset[int] = frozenset()
    new_reader: NewReader = PlainReader


@dataclass(frozen=True)
class Rendered:
    """What a format makes of messages. `has_bos`: the text begins with the token that the tokenizer would add."""

    text: str
    has_bos: bool
    stops: list[str]
    grammar: Grammar | None = None
    preserved: Sequence[str] = ()
    new_reader: NewReader = PlainReader


class ChatFormat(Protocol):
    """How a model is talked to. Thread-safe."""

    source: str  # the text of its templates, "" if it has none

    def render(self, messages: Messages, options: ChatOptions, is_cancelled: Callable[[], bool]) -> Rendered:
        """Raises UserError, with the template's message, for what it refuses, and RequestCancelled."""


class ChatTemplate:
    """The chat format of a model, with its tokens. Thread-safe."""

    def __init__(self, llm: llama_cpp.Llama, chat_format: ChatFormat, tokenizer: CachedTokenizer) -> None:
        self._llm, self._format, self._tokenizer = llm, chat_format, tokenizer
        self.source = chat_format.source

    def render(
        self,
        messages: Messages,
        options: ChatOptions | None = None,
        owner: str = "",
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> ChatPrompt:
        """Raises UserError, with the template's message, for what it refuses, and RequestCancelled."""
        made = self._format.render(messages, options or ChatOptions(), is_cancelled)
        if isinstance(made.grammar, ChatGrammar):
            made.grammar.check(self._llm._model.vocab)
        tokens, pieces, starts = self._tokenizer.encode(made.text, not made.has_bos, owner, is_cancelled)
        n_system, n_pinned = self._find_system(messages, made.text, pieces, starts, owner)
        return ChatPrompt(
            text=made.text,
            tokens=tokens,
            boundaries=_spaced(starts),
            n_system=n_system,
            n_pinned=n_pinned,
            stops=made.stops,
            grammar=made.grammar,
            preserved=self._preserved(tuple(made.preserved)),
            new_reader=made.new_reader,
        )

    @functools.lru_cache(16)  # noqa: B019 - a template lives as long as its model
    def _preserved(self, texts: tuple[str, ...]) -> frozenset[int]:
        """Those of the texts that are one token."""
        encoded = [self._llm.tokenize(text.encode("utf-8"), add_bos=False, special=True) for text in texts]
        return frozenset(tokens[0] for tokens in encoded if len(tokens) == 1)

    def _find_system(
        self, messages: Messages, text: str, pieces: list[str], starts: list[int], owner: str
    ) -> tuple[int | None, int]:
        """ChatPrompt.n_system and .n_pinned."""
        found = _first_content(messages, text)
        if found is None:
            return None, 0
        system_end, at = found
        has_system = _is_system(messages[0])
        offset = 0
        for piece, start in zip(pieces, starts, strict=False):
            if offset + len(piece) > at:
                if offset >= system_end and self._tokenizer.begins_with_control(piece):
                    return start, start * has_system
                # no control token stands between the system block and the first message
                return None, (start + len(self._tokenizer.tokens_of(piece[: at - offset], owner))) * has_system
            offset += len(piece)
        return None, 0


# --- messages ---------------------------------------------------------------------------------------------------------


def text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content)
    return content if isinstance(content, str) else ""


def _is_system(message: Mapping[str, Any]) -> bool:
    return message.get("role") in ("system", "developer")


def _spaced(starts: list[int]) -> list[int]:
    """The starts, without those closer than _MIN_MESSAGE to the next one."""
    return [start for start, after in zip(starts, [*starts[1:], 1 << 62], strict=True) if after - start >= _MIN_MESSAGE]


def _first_content(messages: Messages, text: str) -> tuple[int, int] | None:
    """Where in the text the content of the system messages ends (0: there are none), and where that of the first other
    message begins; None if one of them is not there."""
    system_end = offset = 0
    for message in messages:
        content = text_of(message).strip()
        if not content:
            return None
        offset = text.find(content, offset)
        if offset < 0:
            return None
        if not _is_system(message):
            return system_end, offset
        system_end = offset = offset + len(content)
    return None
