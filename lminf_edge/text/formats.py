"""The formats that models are talked to in: llama.cpp's chat library, or one of llama_cpp's formats."""

from __future__ import annotations

import ctypes
import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import llama_cpp
from llama_cpp import llama_chat_format
from llama_cpp import llama_cpp as bindings
from llama_cpp.llama_chat_format import ChatFormatter

from lminf_edge import native
from lminf_edge.engine.params import Grammar
from lminf_edge.errors import UserError
from lminf_edge.text import library
from lminf_edge.text.answer import ArgumentsReader, MessageReader, NamedCallReader, NewReader, PlainReader
from lminf_edge.text.chat import ChatFormat, ChatOptions, Messages, Rendered, text_of
from lminf_edge.text.library import ChatError, ChatGrammar, Templates
from lminf_edge.text.sizes import MAX_PARTS, MAX_VALUES, check_values
from lminf_edge.text.strict import Strictness

# of the library's grammars: small models are fond of white space

_TEXT_BEFORE_CALLS = re.compile(r"\buntil-[0-9]+\??(?: space)? (?=tool-call)")  # where a call must come
_SPACE_RULE = re.compile(r"^space ::= .*$", re.MULTILINE)

# --- llama.cpp's chat library -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatDefaults:
    """For what ChatOptions leave open, with llama-server's values.

    template  the text of a template, in place of the model's, or the name of one that llama.cpp has
    """

    template: str = ""
    reasoning_format: str = "auto"
    enable_thinking: bool = True
    thinking_budget: int = -1
    budget_message: str = ""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


class LibraryFormat:
    """The templates of a model."""

    def __init__(self, llm: llama_cpp.Llama, defaults: ChatDefaults) -> None:
        """Raises UserError for a template that cannot be used, or if the library is missing."""
        self._defaults = defaults
        try:
            self._templates = Templates(llm._model.model, defaults.template)
        except ChatError as error:
            raise UserError(
                f"The chat template cannot be used: {error}. Give another with --chat-template, or name one of "
                "llama_cpp's formats with --chat-format."
            ) from error
        except ImportError as error:
            raise UserError(str(error)) from error
        self._strictness = Strictness(self._templates)
        self.info = self._templates.info
        self.source = str(self.info["source"]) + str(self.info["tool_source"])

    def render(self, messages: Messages, options: ChatOptions, is_cancelled: Callable[[], bool]) -> Rendered:
        choice = options.tool_choice
        name = None if isinstance(choice, str) else str(choice["function"]["name"])
        must_call = bool(options.tools) and (name is not None or choice == "required")
        if choice != "none":
            self._check_strict(options, must_call)
        request = self._request(messages, options)
        if must_call:
            # the prompt has all tools whichever must be called: so it stays the same from turn to turn
            request |= {"tools": list(options.tools), "tool_choice": "required"}
        if name is not None and options.json_schema is None:
            # only its prompt is used: a grammar of all tools would be made for nothing
            made = self._apply(request | {"tool_choice": "none"}, is_cancelled)
        else:
            made = self._apply(request, is_cancelled)
        if options.json_schema is not None and options.grammar is None:
            if _is_plain(made):
                options = replace(options, grammar=library.load().schema_grammar(options.json_schema, is_cancelled))
            else:  # the template's grammar has what stands around the content
                made = self._apply(request | {"json_schema": options.json_schema}, is_cancelled)
        prompt = made["prompt"]
        if name is not None:
            one = [tool for tool in options.tools if tool["function"]["name"] == name]
            made = self._apply(request | {"tools": one}, is_cancelled)
        if must_call and not made["grammar"]:
            # the template has no calls of its own: the answer is one, as JSON
            tools = options.tools if name is None else one
            function = tools[0]["function"]
            schema = function["parameters"] if len(tools) == 1 else _calls_schema(tools)
            text = library.load().schema_grammar(schema, is_cancelled)
            options = replace(options, grammar=_SPACE_RULE.sub('space ::= " "?', text))
            reader: NewReader = NamedCallReader
            if len(tools) == 1:
                reader = functools.partial(ArgumentsReader, function["name"])
        elif must_call:
            made |= {"grammar": _TEXT_BEFORE_CALLS.sub("", made["grammar"])}
            reader = functools.partial(MessageReader, made["parser"], bool(options.continue_final_message))
        elif options.grammar is not None or _is_plain(made):
            reader = PlainReader
        else:
            reader = functools.partial(MessageReader, made["parser"], bool(options.continue_final_message))
        return Rendered(
            text=prompt,
            has_bos=False,
            stops=list(made["stops"]),
            grammar=self._grammar(made, options),
            preserved=made["preserved_tokens"],
            new_reader=reader,
        )

    def _check_strict(self, options: ChatOptions, must_call: bool) -> None:
        for tool in options.tools:
            if tool["function"]["name"] in options.strict:
                unheld = self._strictness.unheld(tool["function"], must_call)
                if unheld is not None:
                    raise UserError(
                        f"tools: with this model's template, {unheld} cannot be held to its schema: leave strict out."
                    )

    def _request(self, messages: Messages, options: ChatOptions) -> dict[str, Any]:
        defaults = self._defaults
        thinks = defaults.enable_thinking if options.enable_thinking is None else options.enable_thinking
        request: dict[str, Any] = {
            "messages": list(messages),
            "tools": list(options.tools),
            "tool_choice": options.tool_choice if options.tools else "auto",
            "add_generation_prompt": options.add_generation_prompt,
            "continue_final_message": options.continue_final_message,
            "reasoning_format": options.reasoning_format or defaults.reasoning_format,
            "enable_thinking": thinks,
            "template_kwargs": {**defaults.template_kwargs, **options.template_kwargs},
        }
        if options.parallel_tool_calls is not None:
            request["parallel_tool_calls"] = options.parallel_tool_calls
        check_values([request["messages"]], "messages", 2 * MAX_PARTS)
        check_values([request["template_kwargs"]], "chat_template_kwargs", MAX_VALUES)
        return request

    def _apply(self, request: dict[str, Any], is_cancelled: Callable[[], bool]) -> dict[str, Any]:
        try:
            return self._templates.apply(request, is_cancelled)
        except ChatError as error:
            raise UserError(f"The model's chat template refuses these messages: {error}.") from error

    def _grammar(self, made: dict[str, Any], options: ChatOptions) -> Grammar | None:
        budget = self._defaults.thinking_budget if options.thinking_budget is None else options.thinking_budget
        message = self._defaults.budget_message if options.budget_message is None else options.budget_message
        if not made["thinking_ends"]:
            budget = -1
        if options.grammar is None and not made["grammar"] and budget < 0:
            return None
        if options.grammar is not None and budget < 0:
            return options.grammar
        names = ("grammar", "grammar_lazy", "triggers", "generation_prompt", "thinking_start", "thinking_ends")
        params = {name: made[name] for name in names}
        params |= {"grammar_has_prompt": True, "budget": budget, "budget_message": message}
        if options.grammar is not None:
            text = options.grammar if isinstance(options.grammar, str) else str(options.grammar._grammar)  # type: ignore[union-attr]
            params |= {"grammar": text, "grammar_lazy": False, "triggers": [], "grammar_has_prompt": False}
        return ChatGrammar(params)


def _calls_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a call of one of several functions. References are kept apart by where they are."""
    calls = []
    for i, tool in enumerate(tools):
        function = tool["function"]
        arguments = _moved(function["parameters"], f"#/anyOf/{i}/properties/arguments")
        named = {"name": {"const": function["name"]}, "arguments": arguments}
        calls.append({"type": "object", "properties": named, "required": list(named)})
    return {"anyOf": calls}


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references stay right where it becomes a part of another, at `place`."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value[1:]
        if key == "$ref" and isinstance(value, str) and value[:1] == "#"
        else _moved(value, place)
        for key, value in schema.items()
    }


def _is_plain(made: Mapping[str, Any]) -> bool:
    """Whether the content of an answer is all of its text: there is nothing to parse."""
    if len(made["parser"]) > 4000:
        return False
    arena = json.loads(json.loads(made["parser"])["arena"] or "null")
    if arena is None:
        return True
    parsers = arena["parsers"]

    def parts(i: int) -> list[dict[str, Any]]:
        parser = parsers[i]
        if parser["type"] == "sequence":
            return [part for child in parser["children"] for part in parts(child)]
        if parser["type"] == "tag" and parser["tag"] == "content":
            return [{**parsers[parser["child"]], "tag": "content"}]
        return [parser]

    prompt, content = "", 0
    for part in parts(arena["root"]):
        kind = part["type"]
        if kind == "literal" and not content:
            prompt += part["literal"]
        elif kind == "until" and part.get("tag") == "content" and not part["delimiters"]:
            content += 1
        elif kind not in ("epsilon", "end"):
            return False
    return content == 1 and prompt == made["generation_prompt"]


# --- llama.cpp's templates by name ------------------------------------------------------------------------------------


@functools.cache
def builtin_templates() -> frozenset[str]:
    """The names of the templates that libllama has in C++; chatml is the chat library's, with tools."""
    native.load()
    names = (ctypes.c_char_p * bindings.llama_chat_builtin_templates(None, 0))()
    bindings.llama_chat_builtin_templates(names, len(names))
    return frozenset(name.decode() for name in names) - {"chatml"}


class BuiltinFormat:
    """One of `builtin_templates`. It calls no tools."""

    def __init__(self, name: str) -> None:
        self._name = name
        # there is no text of it: what it makes of a conversation has the same control tokens
        sides = ("system", "user", "assistant", "user")
        self.source = self._rendered([{"role": side, "content": "x"} for side in sides], True)

    def render(self, messages: Messages, options: ChatOptions, is_cancelled: Callable[[], bool]) -> Rendered:
        if options.tools and options.tool_choice not in ("auto", "none"):
            raise UserError(f"The chat template {self._name} calls no tools: leave it out to use the model's own.")
        continued = text_of(messages[-1]) if options.continue_final_message else None
        told = messages if continued is None else messages[:-1]
        text = self._rendered(told, options.add_generation_prompt or continued is not None) + (continued or "")
        grammar = options.grammar
        if grammar is None and options.json_schema is not None:
            grammar = library.load().schema_grammar(options.json_schema, is_cancelled)
        return Rendered(text, has_bos=False, stops=[], grammar=grammar)

    def _rendered(self, messages: Messages, begins: bool) -> str:
        made = (bindings.llama_chat_message * len(messages))()
        for each, message in zip(made, messages, strict=True):
            role, content = str(message["role"]), text_of(message).replace("\0", "\ufffd")
            each.role, each.content = role.encode("utf-8", "replace"), content.encode("utf-8", "replace")
        room = 1024
        while True:
            buffer = ctypes.create_string_buffer(room)
            n_bytes = bindings.llama_chat_apply_template(
                self._name.encode(),
                made,
                len(messages),
                begins,
                buffer,
                room,
            )
            if n_bytes < 0:
                raise UserError(f"The chat template {self._name} refuses these messages.")
            if n_bytes <= room:
                return buffer.raw[:n_bytes].decode("utf-8", "replace")
            room = n_bytes


# --- llama_cpp's formats ----------------------------------------------------------------------------------------------


class LlamaCppFormat:
    """One of llama_cpp's chat formats, by name: for who asks for one. It calls no tools."""

    source = ""

    def __init__(self, llm: llama_cpp.Llama) -> None:
        """Raises UserError for a format that is not a template."""
        self._formatter = find_formatter(llm)
        self.source = llm.metadata.get("tokenizer.chat_template", "")

    def render(self, messages: Messages, options: ChatOptions, is_cancelled: Callable[[], bool]) -> Rendered:
        if options.tools and options.tool_choice not in ("auto", "none"):
            raise UserError("A chat format of llama_cpp calls no tools: leave it out to use the model's own.")
        grammar = options.grammar
        if grammar is None and options.json_schema is not None:
            grammar = library.load().schema_grammar(options.json_schema, is_cancelled)
        more = {"tools": list(options.tools), "tool_choice": options.tool_choice} if options.tools else {}
        plain: Any = [_plain(each) for each in messages]
        try:
            made = self._formatter(messages=plain, **more, **options.template_kwargs)
        except MemoryError:
            raise
        except Exception as error:  # whatever a template does with what the client sent
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise UserError(f"The chat format refuses these messages: {reason}.") from error
        stop = made.stop or []
        stops = [stop] if isinstance(stop, str) else list(stop)
        return Rendered(made.prompt, made.added_special, stops, grammar)


def find_formatter(llm: llama_cpp.Llama) -> ChatFormatter:
    """The function that renders messages. Raises UserError for a format of llama_cpp that generates by itself."""
    name = str(llm.chat_format)
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


def find_format(llm: llama_cpp.Llama, defaults: ChatDefaults | None = None) -> ChatFormat:
    """The model's own format, or the one of llama_cpp's that it was loaded with. Raises UserError."""
    if asks_for_format(llm):
        return LlamaCppFormat(llm)
    defaults = defaults or ChatDefaults()
    if defaults.template in builtin_templates():
        return BuiltinFormat(defaults.template)
    return LibraryFormat(llm, defaults)


def asks_for_format(llm: llama_cpp.Llama) -> bool:
    """Whether a model was given a chat_format or a chat_handler."""
    return llm.chat_handler is not None or llm.chat_format != getattr(llm, "guessed_format", llm.chat_format)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is one text, as llama_cpp's formats want it."""
    return {**message, "content": text_of(message)}
