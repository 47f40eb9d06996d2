"""One request's way through llama_cpp: its arguments, its choices one after the other, and what they cost."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import llama_cpp
from jinja2 import TemplateError
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from lminf_edge.engine.meter import Meter
from lminf_edge.engine.voice import Voice
from lminf_edge.llama import Llama
from lminf_edge.server.errors import ApiError
from lminf_edge.server.grammars import response_format, text_grammar
from lminf_edge.server.requests import ChatRequest, CompletionRequest, LlamaCompletionRequest
from lminf_edge.server.tools import as_chunks, checked_tool_choice, checked_tools, streams_nothing, with_tool_named

# names that create_chat_completion, its formats and their templates use themselves
_NOT_FOR_TEMPLATES = {
    *inspect.signature(llama_cpp.Llama.create_chat_completion).parameters,
    *inspect.signature(Jinja2ChatFormatter.__call__).parameters,
    "llama",
    "eos_token",
    "bos_token",
    "raise_exception",
    "add_generation_prompt",
    "strftime_now",
}

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "frequency_penalty",
    "presence_penalty",
    "repeat_penalty",
    "seed",
    "stop",
)


# --- arguments --------------------------------------------------------------------------------------------------------


def sampling_arguments(request: ChatRequest | CompletionRequest | LlamaCompletionRequest) -> dict[str, Any]:
    """What a request gives of them; the voice fills in the rest."""
    return {name: getattr(request, name) for name in _SAMPLING if getattr(request, name) is not None}


def _common_arguments(llm: Llama, request: ChatRequest | CompletionRequest, model_name: str) -> dict[str, Any]:
    arguments = sampling_arguments(request)
    arguments["model"] = model_name
    if request.logit_bias:
        arguments["logit_bias"] = token_bias(llm, request.logit_bias.items())
    return arguments


def token_bias(llm: Llama, pairs: Iterable[tuple[Any, Any]]) -> dict[int, float]:
    """What to add to the logits of tokens, False: minus infinity. Raises ApiError for what is no token."""
    bias = {}
    for token, value in pairs:
        text = str(token)
        if not text.isdecimal() or len(text) > 9 or int(text) >= llm.n_vocab():
            raise ApiError(400, f"logit_bias: this model's tokens are 0 to {llm.n_vocab() - 1}.", param="logit_bias")
        bias[int(text)] = -math.inf if value is False else float(value)
    return bias


def chat_arguments(llm: Llama, request: ChatRequest, model_name: str) -> dict[str, Any]:
    """For create_chat_completion. Raises ApiError for what the model cannot do."""
    arguments = _common_arguments(llm, request, model_name)
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    arguments["max_tokens"] = max_tokens
    arguments["messages"] = [plain_message(dict(message), i) for i, message in enumerate(request.messages)]
    if request.logprobs:
        arguments["logprobs"] = True
        arguments["top_logprobs"] = request.top_logprobs or 0
    tools = request.tools
    choice = request.tool_choice
    if request.functions is not None:  # what tools were called before
        tools = [{"type": "function", "function": function} for function in request.functions]
        named = isinstance(request.function_call, dict)
        choice = {"type": "function", "function": request.function_call} if named else request.function_call
    if tools:
        arguments["tools"] = checked_tools(tools)
    if choice is None and tools:
        choice = "auto"
    if choice is not None and (tools or choice not in ("auto", "none")):
        arguments["tool_choice"] = checked_tool_choice(llm, choice, arguments.get("tools", []))
    if request.response_format is not None:
        arguments.update(response_format(llm, request.response_format))
    for name, value in (request.chat_template_kwargs or {}).items():
        if name in _NOT_FOR_TEMPLATES or name in arguments:
            raise ApiError(400, f"chat_template_kwargs: {name} is not for the template.", param="chat_template_kwargs")
        arguments[name] = value
    return arguments


def plain_message(message: dict[str, Any], i: int) -> dict[str, Any]:
    """A message whose content is text, as chat templates want it. Raises ApiError for pictures and the like."""
    content = message.get("content")
    if isinstance(content, list):
        texts = []
        for part in content:
            kind, text = part.get("type"), part.get("text")
            if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
                raise ApiError(400, f"messages.{i}.content: only text can be read, not {kind!r}.", param="messages")
            texts.append(text)
        content = "\n".join(texts)
    message["content"] = content or ""  # None beside tool calls; few templates expect that
    return message


def completion_arguments(llm: Llama, request: CompletionRequest, model_name: str) -> dict[str, Any]:
    """For create_completion, all but the prompt."""
    arguments = _common_arguments(llm, request, model_name)
    arguments.update(
        max_tokens=request.max_tokens, suffix=request.suffix, echo=bool(request.echo), logprobs=request.logprobs
    )
    if request.grammar is not None:
        arguments["grammar"] = text_grammar(llm, request.grammar, "grammar")
    return arguments


def prompts_of(prompt: str | list[int] | list[str] | list[list[int]], n_vocab: int) -> list[str | list[int]]:
    """The prompts of a request that may have several. Raises ApiError for tokens that are none."""
    if isinstance(prompt, str):
        return [prompt]
    prompts: list[Any] = [prompt] if not prompt or isinstance(prompt[0], int) else list(prompt)
    for each in prompts:
        if not isinstance(each, str) and any(not 0 <= token < n_vocab for token in each):
            raise ApiError(400, f"prompt: this model's tokens are 0 to {n_vocab - 1}.", param="prompt")
    return prompts


# --- answers ----------------------------------------------------------------------------------------------------------


def merged_choices(answers: Sequence[dict[str, Any]], meter: Meter) -> dict[str, Any]:
    """Several answers of one choice each as one answer, with what they cost."""
    choices = [{**answer["choices"][0], "index": i} for i, answer in enumerate(answers)]
    return {
        **answers[0],
        "choices": choices,
        "usage": meter.usage(),
        "timings": meter.timings(),
        "lminf": meter.stream(),
    }


def chat_answers(engine_voice: Voice, arguments: dict[str, Any], n: int, meter: Meter) -> dict[str, Any]:
    answers = []
    for i in range(n):
        answer = _chat(engine_voice, _choice(arguments, i))
        for choice in answer["choices"]:
            choice["message"].pop(
                "function_call", None
            )  # the old form of tool_calls, which clients prefer if it is there
        answers.append(answer)
        meter.add_turn(is_first=i == 0)
    return merged_choices(answers, meter)


def chat_chunks(
    engine_voice: Voice, arguments: dict[str, Any], n: int, meter: Meter, include_usage: bool
) -> Iterator[dict[str, Any]]:
    """The chunks of all choices, one choice after the other."""
    yield from _chunks(
        lambda i: _streamed_chat(engine_voice, _choice(arguments, i)),
        n,
        n,
        meter,
        include_usage,
    )


def _chat(voice: Voice, arguments: dict[str, Any], stream: bool = False) -> Any:
    """create_chat_completion, whose complaints about the messages are the client's."""
    try:
        return voice.create_chat_completion(**with_tool_named(voice, arguments), stream=stream)
    except (TemplateError, TypeError) as error:
        raise ApiError(400, f"The model's chat template refuses these messages: {error}.") from error


def _streamed_chat(voice: Voice, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if streams_nothing(voice.engine.llm, arguments):
        return as_chunks(_chat(voice, arguments))
    chunks: Iterator[dict[str, Any]] = _chat(voice, arguments, stream=True)
    return chunks


def completion_answers(
    engine_voice: Voice, prompts: Sequence[str | list[int]], arguments: dict[str, Any], n: int, meter: Meter
) -> dict[str, Any]:
    answers = []
    for prompt in prompts:
        for i in range(n):
            answers.append(engine_voice.create_completion(prompt, **_choice(arguments, i)))
            meter.add_turn(is_first=i == 0)
    return merged_choices(answers, meter)


def completion_chunks(
    engine_voice: Voice,
    prompts: Sequence[str | list[int]],
    arguments: dict[str, Any],
    n: int,
    meter: Meter,
    include_usage: bool,
) -> Iterator[dict[str, Any]]:
    yield from _chunks(
        lambda i: engine_voice.create_completion(prompts[i // n], stream=True, **_choice(arguments, i % n)),
        n * len(prompts),
        n,
        meter,
        include_usage,
    )


def _chunks(
    start: Callable[[int], Iterator[dict[str, Any]]],
    n_choices: int,
    n_per_prompt: int,
    meter: Meter,
    include_usage: bool,
) -> Iterator[dict[str, Any]]:
    head: dict[str, Any] = {}
    for i in range(n_choices):
        has_tool = False
        for chunk in start(i):
            # one id for the whole answer, though llama_cpp makes one for each choice
            head = head or {name: chunk[name] for name in ("id", "object", "created", "model")}
            choices = [{**choice, "index": i} for choice in chunk["choices"]]
            for choice in choices:
                if "delta" in choice:
                    choice["delta"] = plain_delta(choice["delta"], has_tool)
                    has_tool = has_tool or "tool_calls" in choice["delta"]
            yield {**head, "choices": choices, **({"usage": None} if include_usage else {})}
        meter.add_turn(is_first=i % n_per_prompt == 0)
    if include_usage:
        yield {
            **head,
            "choices": [],
            "usage": meter.usage(),
            "timings": meter.timings(),
            "lminf": meter.stream(),
        }


def plain_delta(delta: Mapping[str, Any], has_tool: bool) -> dict[str, Any]:
    """A delta as clients add them up: llama_cpp repeats a tool's id and name in each, and adds an older form of it."""
    plain = {name: value for name, value in delta.items() if value is not None and name != "function_call"}
    if has_tool and "tool_calls" in plain:
        plain["tool_calls"] = [
            {"index": call["index"], "function": {"arguments": call["function"]["arguments"]}}
            for call in plain["tool_calls"]
        ]
    return plain


def _choice(arguments: dict[str, Any], i: int) -> dict[str, Any]:
    """The arguments of one of several choices: each has a seed of its own."""
    seed = arguments.get("seed")
    return arguments if seed is None or i == 0 else {**arguments, "seed": seed + i}


def progress_chunk(progress: dict[str, Any]) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": [], "prompt_progress": progress}
