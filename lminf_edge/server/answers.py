"""One request's way through llama_cpp: its arguments, its choices one after the other, and what they cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import llama_cpp
from jinja2 import TemplateError
from llama_cpp import LlamaGrammar
from llama_cpp.llama_grammar import json_schema_to_gbnf

from lminf_edge.engine.meter import DEFAULTS, Meter
from lminf_edge.engine.voice import Voice
from lminf_edge.llama import Llama
from lminf_edge.native import captured_errors
from lminf_edge.server.errors import ApiError
from lminf_edge.server.requests import ChatRequest, CompletionRequest, LlamaCompletionRequest

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
    given = {name: getattr(request, name) for name in _SAMPLING if getattr(request, name) is not None}
    return {**DEFAULTS, **given}


def _common_arguments(request: ChatRequest | CompletionRequest, model_name: str) -> dict[str, Any]:
    arguments = sampling_arguments(request)
    arguments["model"] = model_name
    if request.logit_bias:
        try:
            arguments["logit_bias"] = {int(token): bias for token, bias in request.logit_bias.items()}
        except ValueError:
            raise ApiError(400, "logit_bias: its keys must be token numbers.", param="logit_bias") from None
    return arguments


def chat_arguments(llm: Llama, request: ChatRequest, model_name: str) -> dict[str, Any]:
    """For create_chat_completion. Raises ApiError for what the model cannot do."""
    arguments = _common_arguments(request, model_name)
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    arguments["max_tokens"] = max_tokens
    arguments["messages"] = [plain_message(dict(message), i) for i, message in enumerate(request.messages)]
    if request.logprobs:
        arguments["logprobs"] = True
        arguments["top_logprobs"] = request.top_logprobs or 0
    for name in ("tools", "functions", "function_call"):
        if getattr(request, name) is not None:
            arguments[name] = getattr(request, name)
    if request.tool_choice is not None:
        arguments["tool_choice"] = _tool_choice(request.tool_choice, request.tools or [])
    if request.response_format is not None:
        arguments.update(_response_format(llm, request.response_format))
    arguments.update(request.chat_template_kwargs or {})
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
        message["content"] = "\n".join(texts)
    return message


def _tool_choice(choice: str | dict[str, Any], tools: Sequence[dict[str, Any]]) -> str | dict[str, Any]:
    if isinstance(choice, dict):
        if not isinstance(choice.get("function"), dict) or "name" not in choice["function"]:
            raise ApiError(400, "tool_choice: it must name a function.", param="tool_choice")
        return choice
    if choice == "required":
        if len(tools) != 1:
            raise ApiError(
                400, 'tool_choice: "required" is possible with one tool; name the function to call.', param="tool_choice"
            )
        return {"type": "function", "function": {"name": tools[0].get("function", {}).get("name")}}
    if choice not in ("auto", "none"):
        raise ApiError(400, 'tool_choice: it must be "auto", "none", "required" or a function.', param="tool_choice")
    return choice


def _response_format(llm: Llama, value: Mapping[str, Any]) -> dict[str, Any]:
    kind = value.get("type")
    if kind == "text":
        return {}
    if kind == "json_object":
        schema = value.get("schema")
    elif kind == "json_schema":
        schema = (value.get("json_schema") or {}).get("schema")
        if schema is None:
            raise ApiError(400, "response_format: a json_schema needs a schema.", param="response_format")
    else:
        raise ApiError(
            400, 'response_format: its type must be "text", "json_object" or "json_schema".', param="response_format"
        )
    if schema is None:
        return {"response_format": {"type": "json_object"}}
    return {"grammar": schema_grammar(llm, schema, "response_format")}


def schema_grammar(llm: Llama, schema: Any, param: str) -> LlamaGrammar:
    """Raises ApiError for a schema that no grammar can be made of: it is never replaced by another silently."""
    try:
        text = json_schema_to_gbnf(json.dumps(schema))
    except Exception as error:
        raise ApiError(400, f"{param}: no grammar can be made of this JSON schema: {error}.", param=param) from None
    return text_grammar(llm, text, param)


def text_grammar(llm: Llama, text: str, param: str) -> LlamaGrammar:
    """Raises ApiError for what is no grammar; llama.cpp would end the process at its first use."""
    with captured_errors():
        sampler = llama_cpp.llama_sampler_init_grammar(llm._model.vocab, text.encode("utf-8"), b"root")
    if not sampler:
        raise ApiError(400, f"{param}: this is no grammar in llama.cpp's GBNF with a rule named root.", param=param)
    llama_cpp.llama_sampler_free(sampler)
    return LlamaGrammar(_grammar=text)


def completion_arguments(llm: Llama, request: CompletionRequest, model_name: str) -> dict[str, Any]:
    """For create_completion, all but the prompt."""
    arguments = _common_arguments(request, model_name)
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
        answers.append(_run_template(lambda: engine_voice.create_chat_completion(**_choice(arguments, i))))
        meter.seen()
        meter.add_turn()
    return merged_choices(answers, meter)


def chat_chunks(
    engine_voice: Voice, arguments: dict[str, Any], n: int, meter: Meter, include_usage: bool
) -> Iterator[dict[str, Any]]:
    """The chunks of all choices, one choice after the other."""
    yield from _chunks(
        lambda i: _run_template(lambda: engine_voice.create_chat_completion(stream=True, **_choice(arguments, i))),
        n,
        meter,
        include_usage,
    )


def completion_answers(
    engine_voice: Voice, prompts: Sequence[str | list[int]], arguments: dict[str, Any], n: int, meter: Meter
) -> dict[str, Any]:
    answers = []
    for prompt in prompts:
        for i in range(n):
            answers.append(engine_voice.create_completion(prompt, **_choice(arguments, i)))
            meter.seen()
            meter.add_turn()
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
        meter,
        include_usage,
    )


def _chunks(
    start: Callable[[int], Iterator[dict[str, Any]]], n: int, meter: Meter, include_usage: bool
) -> Iterator[dict[str, Any]]:
    head: dict[str, Any] = {}
    for i in range(n):
        for chunk in start(i):
            meter.seen()
            # one id for the whole answer, though llama_cpp makes one for each choice
            head = head or {name: chunk[name] for name in ("id", "object", "created", "model")}
            choices = [{**choice, "index": i} for choice in chunk["choices"]]
            yield {**head, "choices": choices, **({"usage": None} if include_usage else {})}
        meter.add_turn()
    if include_usage:
        yield {
            **head,
            "choices": [],
            "usage": meter.usage(),
            "timings": meter.timings(),
            "lminf": meter.stream(),
        }


def _choice(arguments: dict[str, Any], i: int) -> dict[str, Any]:
    """The arguments of one of several choices: each has a seed of its own."""
    seed = arguments.get("seed")
    return arguments if seed is None or i == 0 else {**arguments, "seed": seed + i}


def _run_template(run: Callable[[], Any]) -> Any:
    """Turns the complaints of a chat template into one for the client."""
    try:
        return run()
    except TemplateError as error:
        raise ApiError(400, f"The model's chat template refuses these messages: {error}.") from error


def progress_chunk(progress: dict[str, Any]) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": [], "prompt_progress": progress}
