"""Request bodies to the engine's terms: sampling parameters, limits, tools."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import llama_cpp

from lminf_edge.engine.params import SamplingParams
from lminf_edge.server.errors import ApiError
from lminf_edge.server.grammars import check_schema, response_grammar, schema_grammar, text_grammar
from lminf_edge.server.requests import (
    MAX_BIASES,
    MAX_PROMPTS,
    ChatRequest,
    CompletionRequest,
    LlamaCompletionRequest,
    LlamaPrompt,
    PromptText,
)
from lminf_edge.server.requests import Sampling as SamplingRequest
from lminf_edge.text.service import TextService

RANDOM_SEED = 0xFFFFFFFF  # llama.cpp's word for a new one each time

# names that chat formats and their templates use themselves
_NOT_FOR_TEMPLATES = {
    *("messages", "functions", "function_call", "tools", "tool_choice", "eos_token", "bos_token", "llama"),
    *("raise_exception", "add_generation_prompt", "strftime_now", "suffix", "self"),
}

# fields of requests that are parameters of the same name; the others are made of several, or by the model
_SAMPLING = tuple(name for name in SamplingParams.__dataclass_fields__ if name in SamplingRequest.model_fields)


@dataclass(frozen=True)
class Asked:
    """What all kinds of completions have in common.

    n_top  number of likeliest tokens to report log probabilities of; None: none are reported
    """

    sampling: SamplingParams
    max_tokens: int | None
    stops: list[str]
    n: int = 1
    n_top: int | None = None


@dataclass(frozen=True)
class AskedChat(Asked):
    """
    tool_choice  "none", "auto", "required" (of several), or the name of a function
    template     more arguments for the chat template
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: str | dict[str, Any] = "none"
    template: dict[str, Any] = field(default_factory=dict)


# --- sampling ---------------------------------------------------------------------------------------------------------


def sampling_of(service: TextService, request: SamplingRequest, **more: Any) -> SamplingParams:
    """The service's defaults, overridden by what a request gives."""
    given = {name: getattr(request, name) for name in _SAMPLING if getattr(request, name) is not None}
    return replace(service.defaults.sampling, **given, **more)


def token_bias(llm: llama_cpp.Llama, pairs: Iterable[tuple[Any, Any]]) -> dict[int, float]:
    """token -> what is added to its logit; False is minus infinity. Raises ApiError for ids outside the vocabulary."""
    bias = {}
    for token, value in pairs:
        text = str(token)
        if not text.isdecimal() or len(text) > 9 or int(text) >= llm.n_vocab():
            raise ApiError(400, f"logit_bias: this model's tokens are 0 to {llm.n_vocab() - 1}.", param="logit_bias")
        bias[int(text)] = -math.inf if value is False else float(value)
    return bias


def stops_of(request: SamplingRequest) -> list[str]:
    return [request.stop] if isinstance(request.stop, str) else list(request.stop or [])


def prompts_of(prompt: str | list[int] | list[str] | list[list[int]], n_vocab: int) -> list[str | list[int]]:
    """The prompts of a request that may have several. Raises ApiError for ids outside the vocabulary."""
    if isinstance(prompt, str):
        return [prompt]
    prompts: list[Any] = [prompt] if not prompt or isinstance(prompt[0], int) else list(prompt)
    for each in prompts:
        if not isinstance(each, str) and any(not 0 <= token < n_vocab for token in each):
            raise ApiError(400, f"prompt: this model's tokens are 0 to {n_vocab - 1}.", param="prompt")
    return prompts


# --- chat -------------------------------------------------------------------------------------------------------------


def asked_chat(service: TextService, request: ChatRequest) -> AskedChat:
    """Raises ApiError for what the model cannot do."""
    llm = service.llm
    more: dict[str, Any] = {"logit_bias": token_bias(llm, (request.logit_bias or {}).items())}
    if request.response_format is not None:
        more["grammar"] = response_grammar(llm, request.response_format)
    tools, choice = request.tools, request.tool_choice
    if request.functions is not None:  # the older name of tools
        tools = [{"type": "function", "function": function} for function in request.functions]
        named = isinstance(request.function_call, dict)
        choice = {"type": "function", "function": request.function_call} if named else request.function_call
    checked = checked_tools(tools or [])
    if choice is None and checked:
        choice = "auto"
    if choice is not None and (checked or choice not in ("auto", "none")):
        choice = checked_tool_choice(service, choice, checked)
    template = dict(request.chat_template_kwargs or {})
    for name in template:
        if name in _NOT_FOR_TEMPLATES:
            raise ApiError(400, f"chat_template_kwargs: {name} is not for the template.", param="chat_template_kwargs")
    return AskedChat(
        sampling=sampling_of(service, request, **more),
        max_tokens=request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens,
        stops=stops_of(request),
        n=request.n or 1,
        n_top=(request.top_logprobs or 0) if request.logprobs else None,
        messages=[plain_message(dict(message), i) for i, message in enumerate(request.messages)],
        tools=checked,
        tool_choice=choice or "none",
        template=template,
    )


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


def checked_tools(tools: list[Any]) -> list[dict[str, Any]]:
    """Tools, completed with what templates expect. Raises ApiError for what is not a tool."""
    checked = []
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ApiError(400, f"tools.{i}: a tool has a function with a name.", param="tools")
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        check_schema(parameters, f"tools.{i}.function.parameters")
        checked.append({**tool, "type": "function", "function": {**function, "parameters": parameters}})
    return checked


def tool_named(tools: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The function of this name."""
    function: dict[str, Any] = next(tool["function"] for tool in tools if tool["function"]["name"] == name)
    return function


def checked_tool_choice(service: TextService, choice: Any, tools: list[dict[str, Any]]) -> str | dict[str, Any]:
    """A choice that can be enforced: "auto", "none", "required" of several, or one function. Raises ApiError."""
    param = "tool_choice"
    names = [tool["function"]["name"] for tool in tools]
    if choice in ("auto", "none"):
        return str(choice)
    if choice == "required":
        if not tools:
            raise ApiError(400, f'{param}: "required" needs tools.', param=param)
        chosen = names
    elif isinstance(choice, dict) and isinstance(choice.get("function"), dict):
        name = choice["function"].get("name")
        if name not in names:
            raise ApiError(400, f"{param}: there is no tool {str(name)[:100]!r}.", param=param)
        chosen = [name]
    else:
        raise ApiError(400, f'{param}: it must be "auto", "none", "required" or a function.', param=param)
    for name in chosen:  # so that it fails before anything is generated
        schema_grammar(service.llm, tool_named(tools, name)["parameters"], "tools")
    return {"type": "function", "function": {"name": chosen[0]}} if len(chosen) == 1 else "required"


# --- completions ------------------------------------------------------------------------------------------------------


def asked_completion(service: TextService, request: CompletionRequest) -> Asked:
    llm = service.llm
    more: dict[str, Any] = {"logit_bias": token_bias(llm, (request.logit_bias or {}).items())}
    if request.grammar is not None:
        more["grammar"] = text_grammar(llm, request.grammar, "grammar")
    return Asked(
        sampling=sampling_of(service, request, **more),
        max_tokens=request.max_tokens,
        stops=stops_of(request),
        n=request.n or 1,
        n_top=request.logprobs,
    )


@dataclass(frozen=True)
class AskedLlamaCpp(Asked):
    """
    after_sampling   probabilities are those after sampling
    only_reads       the prompt is processed, and nothing generated
    return_tokens    the tokens of the text are wanted, too
    timings          they are wanted with each part of a stream
    response_fields  what the answer has, by llama-server's paths; empty: all
    settings         what was asked for and what was taken for the rest, by llama-server's names
    """

    after_sampling: bool = False
    only_reads: bool = False
    return_tokens: bool = False
    timings: bool = False
    response_fields: Sequence[str] = ()
    settings: dict[str, Any] = field(default_factory=dict)


def asked_llama_cpp(service: TextService, end_tokens: Iterable[int], request: LlamaCompletionRequest) -> AskedLlamaCpp:
    """In llama.cpp's dialect."""
    llm = service.llm
    more: dict[str, Any] = {}
    pairs = text_bias(service, request.logit_bias or [])
    if request.ignore_eos:
        pairs += [(token, False) for token in end_tokens]
    more["logit_bias"] = token_bias(llm, pairs)
    if request.grammar is not None and request.json_schema is not None:
        raise ApiError(400, "Give a grammar or a json_schema, not both.", param="grammar")
    if request.grammar:
        more["grammar"] = text_grammar(llm, request.grammar, "grammar")
    elif request.json_schema is not None:
        more["grammar"] = schema_grammar(llm, request.json_schema, "json_schema")
    sampling = sampling_of(service, request, **more)
    limit = service.defaults.max_tokens if request.n_predict in (None, -1) else request.n_predict
    asked = {
        "max_tokens": -1 if limit is None else limit,
        "n_predict": -1 if limit is None else limit,
        "stop": stops_of(request),
        "ignore_eos": bool(request.ignore_eos),
        "stream": bool(request.stream),
        "n_probs": request.n_probs or 0,
        "post_sampling_probs": bool(request.post_sampling_probs),
        "timings_per_token": bool(request.timings_per_token),
        "grammar": request.grammar or "",
    }
    return AskedLlamaCpp(
        sampling=sampling,
        max_tokens=1 if request.n_predict == 0 else request.n_predict,  # read once the first token is asked for
        stops=stops_of(request),
        n=request.n or 1,
        n_top=request.n_probs or None,
        after_sampling=bool(request.post_sampling_probs),
        only_reads=request.n_predict == 0,
        return_tokens=bool(request.return_tokens),
        timings=bool(request.timings_per_token),
        response_fields=request.response_fields or (),
        settings={**generation_settings(sampling), **asked},
    )


def generation_settings(sampling: SamplingParams) -> dict[str, Any]:
    """Sampling parameters by llama-server's names, with its values for what is not here."""
    biases = sampling.logit_bias.items()
    return {
        **sampling.public(),
        "seed": RANDOM_SEED if sampling.seed is None or sampling.seed == -1 else sampling.seed & RANDOM_SEED,
        "logit_bias": [{"token": token, "bias": bias if bias > -math.inf else None} for token, bias in biases],
        "adaptive_target": -1.0,
        "adaptive_decay": 0.9,
        "lora": [],
    }


def text_bias(
    service: TextService, given: Mapping[str, float | bool] | Sequence[tuple[int | str, float | bool]]
) -> list[tuple[int | str, float | bool]]:
    """Biases of tokens: those of a text, in llama.cpp's dialect, are those of each of its tokens."""
    pairs: list[tuple[int | str, float | bool]] = []
    for token, value in given.items() if isinstance(given, Mapping) else given:
        is_id = not isinstance(token, str) or (isinstance(given, Mapping) and token.isdecimal())
        if is_id:
            pairs.append((token, value))
        else:
            pairs += [(each, value) for each in service.tokenizer.tokenize(str(token), add_bos=False).tolist()]
        if len(pairs) > MAX_BIASES:
            raise ApiError(400, f"logit_bias: there may be {MAX_BIASES} biases at most.", param="logit_bias")
    return pairs


def llama_cpp_prompts(service: TextService, prompt: LlamaPrompt) -> list[str | list[int]]:
    """The prompts of a request in llama.cpp's dialect. Raises ApiError."""
    if not isinstance(prompt, list) or any(isinstance(part, int) for part in prompt):
        given: list[Any] = [prompt]
    else:
        given = list(prompt)
    if not 0 < len(given) <= MAX_PROMPTS:
        raise ApiError(400, f"prompt: there may be 1 to {MAX_PROMPTS} of them, not {len(given)}.", param="prompt")
    return [_one_prompt(service, each) for each in given]


def _one_prompt(service: TextService, prompt: str | PromptText | list[int | str]) -> str | list[int]:
    """One prompt, which may mix text and tokens."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, PromptText):
        if prompt.multimodal_data:
            raise ApiError(400, "prompt.multimodal_data: only text can be read.", param="prompt")
        return prompt.prompt_string
    tokens: list[int] = []
    for i, part in enumerate(prompt):
        if isinstance(part, str):
            tokens += service.tokenizer.tokenize(part, add_bos=i == 0).tolist()
        elif isinstance(part, int):
            tokens.append(part)
        else:
            raise ApiError(400, "prompt: one prompt is text or a list of tokens and texts.", param="prompt")
    prompts_of(tokens, service.engine.model.n_vocab)
    return tokens
