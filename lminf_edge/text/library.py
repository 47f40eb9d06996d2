"""llama.cpp's chat library: templates, parsers of answers, grammars of JSON schemas. See native/chat/lminf-chat.h."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llama_cpp import llama_cpp as bindings

from lminf_edge import native
from lminf_edge.engine.request import RequestCancelled
from lminf_edge.errors import UserError

LIBRARY_NAMES = ("liblminf-chat.so", "liblminf-chat.dylib", "lminf-chat.dll", "liblminf-chat.dll")

LONG = 256  # characters of a content from which it is no part of the request's JSON

_Cancelled = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)


class ChatError(UserError):
    """What the library says of a request or of a text. `too_much`: it takes too much work."""

    def __init__(self, reason: str, too_much: bool = False) -> None:
        super().__init__(reason)
        self.too_much = too_much


class Library:
    """The functions of lminf-chat.h. Each raises ChatError."""

    def __init__(self, lib: Any) -> None:
        def declare(name: str, result: Any, *arguments: Any) -> Any:
            function = getattr(lib, f"lminf_chat_{name}")
            function.restype, function.argtypes = result, arguments
            return function

        # texts are returned as pointers: ctypes would lose those of c_char_p, which are freed here
        pointer, text = ctypes.c_void_p, ctypes.c_char_p
        error = ctypes.POINTER(pointer)
        self._free_text = declare("free_text", None, pointer)
        self._init = declare("init", pointer, pointer, text, text, text, error)
        self.free = declare("free", None, pointer)
        self._info = declare("info", pointer, pointer)
        size, texts = ctypes.c_size_t, ctypes.POINTER(text)
        to_size = ctypes.POINTER(size)
        self._apply = declare("apply", pointer, pointer, text, texts, size, error, to_size, _Cancelled, pointer)
        self._parser_init = declare("parser_init", pointer, text, error)
        self.parser_free = declare("parser_free", None, pointer)
        self._parse = declare("parse", pointer, pointer, text, ctypes.c_bool)
        self._schema = declare("schema", pointer, text, _Cancelled, pointer)
        self._sampler_init = declare("sampler_init", bindings.llama_sampler_p_ctypes, pointer, text, error)

    def open(self, model: Any, text: str, bos: str, eos: str) -> int:
        """The templates of a llama_cpp model, or the one of a text for a model (or None) with these special tokens."""
        return int(self._made(self._init, model, _bytes(text), _bytes(bos), _bytes(eos)))

    def info(self, chat: int) -> dict[str, Any]:
        return self._result(self._info(chat))

    def apply(self, chat: int, request: Mapping[str, Any], is_cancelled: Callable[[], bool]) -> dict[str, Any]:
        """Raises RequestCancelled, too."""
        messages, contents = _without_contents(request.get("messages"))
        texts = (ctypes.c_char_p * len(contents))(*contents)
        prompt, n_prompt = ctypes.c_void_p(), ctypes.c_size_t()
        asked = _json({**request, "messages": messages} if contents else request)
        made = (ctypes.byref(prompt), ctypes.byref(n_prompt))
        with _cancellable(is_cancelled) as callback:
            result = self._result(self._apply(chat, asked, texts, len(texts), *made, callback, None))
        if not prompt.value:
            raise MemoryError
        try:
            result["prompt"] = ctypes.string_at(prompt.value, n_prompt.value).decode("utf-8", "replace")
        finally:
            self._free_text(prompt)
        return result

    def open_parser(self, parser: str) -> int:
        return int(self._made(self._parser_init, _bytes(parser)))

    def parse(self, parser: int, text: str, is_partial: bool) -> dict[str, Any]:
        return self._result(self._parse(parser, _bytes(text), is_partial))

    def schema_grammar(self, schema: Any, is_cancelled: Callable[[], bool] = lambda: False) -> str:
        """GBNF text. Raises RequestCancelled, too."""
        with _cancellable(is_cancelled) as callback:
            return str(self._result(self._schema(_json(schema), callback, None))["grammar"])

    def sampler(self, vocab: Any, params: Mapping[str, Any]) -> Any:
        """A llama_sampler, for a chain to own."""
        with native.captured_errors():
            return self._made(self._sampler_init, vocab, _json(params))

    def _result(self, pointer: int | None) -> dict[str, Any]:
        if not pointer:
            raise MemoryError
        try:
            result: dict[str, Any] = json.loads(ctypes.string_at(pointer))
        finally:
            self._free_text(pointer)
        if "error" in result:
            raise ChatError(_reason(result["error"]), bool(result["too_much"]))
        return result

    def _made(self, function: Any, *arguments: Any) -> Any:
        error = ctypes.c_void_p()
        made = function(*arguments, ctypes.byref(error))
        if not made:
            self._result(error.value)
            raise MemoryError
        return made


@functools.cache
def load() -> Library:
    """Raises ImportError, in one sentence, if the library is missing or cannot be loaded."""
    native.load()
    folder = native.library_folder()
    assert folder is not None
    path = next((folder / name for name in LIBRARY_NAMES if (folder / name).exists()), None)
    if path is None:
        raise ImportError(
            f"llama.cpp's chat library is not in {folder}: reinstall lminf_edge, or name a chat format of llama_cpp's."
        )
    try:
        return Library(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        raise ImportError(f"llama.cpp's chat library {path} cannot be used: {error}.") from error


@contextlib.contextmanager
def _cancellable(is_cancelled: Callable[[], bool]) -> Iterator[Any]:
    """A callback for the library; what it stopped is RequestCancelled."""
    try:
        yield _Cancelled(lambda _: is_cancelled())
    except ChatError:
        if is_cancelled():
            raise RequestCancelled from None
        raise


def _reason(error: str) -> str:
    """The reason in an error of the library, without the source of the template around it."""
    if "out_of_range.406" in error:  # of the library's JSON
        return "a number is too large: give it as a text"
    reason = " ".join(error.rpartition("\nError: ")[2].split())
    for prefix in ("Jinja Exception: ", "Failed to parse messages: ", "Failed to parse tools: "):
        reason = reason.removeprefix(prefix)
    return reason.partition("; tools = ")[0][:500].rstrip(".") or "it failed"


def _bytes(text: str) -> bytes:
    if "\0" in text:
        raise ChatError("a text has a zero character")
    return text.encode("utf-8", "replace")


def _without_contents(messages: Any) -> tuple[Any, list[bytes | None]]:
    """The messages without their long contents, and those; None for a content that stays where it is."""
    if not isinstance(messages, list):
        return messages, []
    short: list[Any] = list(messages)
    contents: list[bytes | None] = [None] * len(messages)
    for i, message in enumerate(messages):
        text = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(text, str) and len(text) > LONG and b"\0" not in (encoded := text.encode("utf-8", "replace")):
            short[i], contents[i] = {**message, "content": ""}, encoded
    return short, contents


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


# --- objects of the library -------------------------------------------------------------------------------------------


class Templates:
    """The chat templates of a model. Thread-safe. Raises ChatError for templates that cannot be used."""

    def __init__(self, model: Any, text: str = "", bos: str = "", eos: str = "") -> None:
        """`text` is used in place of the model's; without a model, with these special tokens."""
        self._library = load()
        self._chat = self._library.open(model, text, bos, eos)
        weakref.finalize(self, self._library.free, self._chat)
        self.info = self._library.info(self._chat)
        source = f"{self.info['source']} {self.info['tool_source']}"
        self._wants_functions = bool(re.search(r"\bfunctions\b", source)) and not re.search(r"\btools\b", source)

    def apply(self, request: Mapping[str, Any], is_cancelled: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """A conversation to a prompt, and what its answer needs. Raises ChatError, and RequestCancelled."""
        if self._wants_functions and request.get("tools"):  # Firefunction's template has tools as a text of this name
            functions = {"functions": json.dumps(request["tools"], indent=2, ensure_ascii=False)}
            request = {**request, "template_kwargs": functions | dict(request.get("template_kwargs") or {})}
        return self._library.apply(self._chat, request, is_cancelled)


class Parser:
    """Finds the message in the text of an answer. For one thread."""

    def __init__(self, parser: str) -> None:
        """`parser` is what Templates.apply returned."""
        self._library = load()
        self._parser = self._library.open_parser(parser)
        weakref.finalize(self, self._library.parser_free, self._parser)

    def parse(self, text: str, is_partial: bool) -> dict[str, Any]:
        """The message: content, reasoning_content, tool_calls. Raises ChatError for a text that is none."""
        return self._library.parse(self._parser, text.replace("\0", "\ufffd"), is_partial)


@dataclass(frozen=True)
class ChatGrammar:
    """What a template asks of sampling: its grammar, from a trigger on, and a budget for thoughts."""

    params: Mapping[str, Any]

    def sampler(self, vocab: Any) -> Any:
        """A llama_sampler, for a chain to own. Raises ChatError."""
        return load().sampler(vocab, self.params)

    def check(self, vocab: Any) -> None:
        """Raises ChatError for a grammar that llama.cpp cannot use."""
        if self.params["grammar"]:
            bindings.llama_sampler_free(self.sampler(vocab))
