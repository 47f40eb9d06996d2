"""Chat messages to a prompt, by the model's own template or one of llama_cpp's formats."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
from llama_cpp import llama_chat_format
from llama_cpp.llama_chat_format import ChatFormatter, ChatFormatterResponse

from lminf_edge.cache.token_log import Tokens
from lminf_edge.errors import UserError
from lminf_edge.text.tokenizer import CachedTokenizer

# tokens; a message shorter than this is not worth a checkpoint of its own
_MIN_MESSAGE = 8

CALLING_FORMAT = "chatml-function-calling"  # the format in which the model itself decides whether to call a tool

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatPrompt:
    """
    text         the rendered template
    tokens       int32 (n_tokens,)
    boundaries   where messages begin, the answer's among them, in tokens
    n_system     tokens before the first message after the system block; None if that is not known
    n_pinned     tokens of the system block, 0 if there is none
    stops        strings that end the completion
    """

    text: str
    tokens: Tokens
    boundaries: list[int]
    n_system: int | None
    n_pinned: int
    stops: list[str]


class ChatTemplate:
    """The chat format of a model. Thread-safe."""

    def __init__(self, llm: llama_cpp.Llama, tokenizer: CachedTokenizer) -> None:
        """Raises UserError for a format of llama_cpp that is not a template."""
        self.name = str(llm.chat_format)
        self._formatter = find_formatter(llm)
        self._tokenizer = tokenizer

    def render(
        self,
        messages: Messages,
        suffix: str = "",
        arguments: Mapping[str, Any] | None = None,
        owner: str = "",
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> ChatPrompt:
        """The prompt for an answer that begins with `suffix`; `arguments` are the template's.

        Raises UserError, with the template's message, for messages that it refuses, and RequestCancelled.
        """
        made = self.format(messages, arguments or {})
        text = made.prompt + suffix
        tokens, pieces, starts = self._tokenizer.encode(text, not made.added_special, owner, is_cancelled)
        n_system, n_pinned = self._find_system(messages, text, pieces, starts, owner)
        stop = made.stop or []
        return ChatPrompt(
            text=text,
            tokens=tokens,
            boundaries=_spaced(starts),
            n_system=n_system,
            n_pinned=n_pinned,
            stops=[stop] if isinstance(stop, str) else list(stop),
        )

    def format(self, messages: Messages, arguments: Mapping[str, Any]) -> ChatFormatterResponse:
        try:
            return self._formatter(messages=[dict(each) for each in messages], **arguments)  # type: ignore[misc]
        except Exception as error:  # whatever a template does with what the client sent
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise UserError(f"The model's chat template refuses these messages: {reason}.") from error

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


def find_formatter(llm: llama_cpp.Llama) -> ChatFormatter:
    """The function that renders messages. Raises UserError for a format of llama_cpp that generates by itself."""
    name = str(llm.chat_format)
    if name == CALLING_FORMAT:
        return calling_format
    try:
        handler = (
            llm.chat_handler or llm._chat_handlers.get(name) or llama_chat_format.get_chat_completion_handler(name)
        )
    except Exception as error:
        raise UserError(f"llama_cpp has no chat format {name!r}: leave it out to use the model's own.") from error
    formatter: ChatFormatter | None = inspect.getclosurevars(handler).nonlocals.get("chat_formatter")
    if formatter is None:
        raise UserError(f"The chat format {name!r} is no template: leave it out to use the model's own.")
    return formatter


def calling_format(
    *, messages: Sequence[Any], tools: Sequence[Mapping[str, Any]] | None = None, **_: Any
) -> ChatFormatterResponse:
    """ChatML in which the model first says whether it writes a message or calls a function."""
    parts = []
    for message in messages:
        role, content = message["role"], message.get("content") or ""
        if tools and role == "system":
            content += _calling_instructions(tools)
        elif role == "assistant":
            said = [f"message:\n{content}" if tools else content] if content else []
            functions = [call["function"] for call in message.get("tool_calls") or ()]
            said += [f"functions.{function['name']}:\n{function['arguments']}" for function in functions]
            content = "\n".join(said)
        parts.append(f"<|im_start|>{role}\n{content}<|im_end|>\n")
    return ChatFormatterResponse(prompt="".join(parts) + "<|im_start|>assistant\n", stop="<|im_end|>")


def _calling_instructions(tools: Sequence[Mapping[str, Any]]) -> str:
    described = "".join(
        f"\n\nfunctions.{tool['function']['name']}:\n{json.dumps(tool['function']['parameters'])}" for tool in tools
    )
    return (
        f"\n\nThese functions can be called:{described}\n\n"
        'Begin a message with "message:". Begin a call with "functions.NAME:" and write its arguments as JSON.'
    )


def chat_template(llm: llama_cpp.Llama) -> str:
    """The Jinja template of the model, "" if it has none."""
    default = llm.metadata.get("tokenizer.chat_template", "")
    return str(llm.metadata.get(f"tokenizer.{llm.chat_format}", default))  # chat_template.NAME, if it has several


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
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            return None
        offset = text.find(content.strip(), offset)
        if offset < 0:
            return None
        if not _is_system(message):
            return system_end, offset
        system_end = offset = offset + len(content.strip())
    return None
