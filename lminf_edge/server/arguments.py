"""Request bodies to the engine's terms: sampling parameters, limits, tools."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import llama_cpp

from lminf_edge.engine.params import Grammar, SamplingParams
from lminf_edge.server.errors import ApiError
from lminf_edge.server.grammars import answer_schema, response_schema, schema_grammar, text_grammar
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
from lminf_edge.text.chat import ChatOptions
from lminf_edge.text.service import Exchange, TextService
from lminf_edge.text.sizes import MAX_ARGUMENTS, check_text, check_values
from lminf_edge.text.tools import ToolError, check_tools

RANDOM_SEED = 0xFFFFFFFF  # llama.cpp's word for a new one each time

_TEXTS = ("text", "input_text", "output_text", "refusal")  # kinds of parts of a content

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

    n_top           number of likeliest tokens to report log probabilities of; None: none are reported
    after_sampling  these are those after sampling
    """

    sampling: SamplingParams
    max_tokens: int | None
    stops: list[str]
    n: int = 1
    n_top: int | None = None
    after_sampling: bool = False


@dataclass(frozen=True)
class AskedChat(Asked):
    """An answer in a conversation."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    options: ChatOptions = field(default_factory=ChatOptions)


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


def asked_chat(service: TextService, request: ChatRequest, is_cancelled: Callable[[], bool]) -> AskedChat:
    """Raises ApiError for what the model cannot do, and RequestCancelled."""
    return AskedChat(
        sampling=sampling_of(service, request, logit_bias=token_bias(service.llm, (request.logit_bias or {}).items())),
        max_tokens=request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens,
        stops=stops_of(request),
        n=request.n or 1,
        n_top=(request.top_logprobs or 0) if request.logprobs else None,
        messages=checked_messages([dict(message) for message in request.messages]),
        options=chat_options(service, request, is_cancelled),
    )


def chat_options(service: TextService, request: ChatRequest, is_cancelled: Callable[[], bool]) -> ChatOptions:
    """What is asked of the chat template. Raises ApiError and RequestCancelled."""
    tools, choice = request.tools, request.tool_choice
    if request.functions is not None:  # the older name of tools
        tools = [{"type": "function", "function": function} for function in request.functions]
        named = isinstance(request.function_call, dict)
        choice = {"type": "function", "function": request.function_call} if named else request.function_call
    try:
        checked = check_tools(tools or [], choice, is_cancelled)
    except ToolError as error:
        raise ApiError(400, str(error), param=error.param) from None
    grammar, schema = _answer_grammar(service, request)
    if checked.functions and checked.choice != "none" and (grammar is not None or schema is not None):
        what = "grammar" if grammar is not None else "response_format"
        raise ApiError(400, f"{what}: an answer that may call tools cannot have one: give no tools.", param=what)
    continues = request.continue_final_message
    if continues is None:
        continues = bool(request.messages) and request.messages[-1]["role"] == "assistant"
    elif continues and request.add_generation_prompt and "add_generation_prompt" in request.model_fields_set:
        what = "continue_final_message"
        raise ApiError(400, f"{what}: not both this and add_generation_prompt.", param=what)
    if continues:
        check_continued([dict(message) for message in request.messages])
    template = dict(request.chat_template_kwargs or {})
    for name in template:
        if name in _NOT_FOR_TEMPLATES:
            raise ApiError(400, f"chat_template_kwargs: {name} is not for the template.", param="chat_template_kwargs")
    thinks = template.get("enable_thinking")
    if thinks is not None and not isinstance(thinks, bool):
        raise ApiError(400, "chat_template_kwargs: enable_thinking is true or false.", param="chat_template_kwargs")
    if request.reasoning_effort == "none":
        thinks = False
    elif request.reasoning_effort:
        template["reasoning_effort"] = request.reasoning_effort
    budget = request.reasoning_budget_tokens
    return ChatOptions(
        tools=checked.functions,
        strict=checked.strict,
        tool_choice=checked.choice,
        parallel_tool_calls=request.parallel_tool_calls,
        add_generation_prompt=request.add_generation_prompt is not False and not continues,
        continue_final_message=continues,
        reasoning_format=request.reasoning_format,
        enable_thinking=thinks,
        thinking_budget=request.thinking_budget_tokens if budget is None else budget,
        budget_message=request.reasoning_budget_message,
        json_schema=schema,
        grammar=grammar,
        template_kwargs=template,
    )


def _answer_grammar(service: TextService, request: ChatRequest) -> tuple[Grammar | None, dict[str, Any] | None]:
    """The grammar or the JSON schema that an answer is held to. Raises ApiError."""
    if request.grammar and request.json_schema is not None:
        raise ApiError(400, "Give a grammar or a json_schema, not both.", param="grammar")
    schema = None
    if request.response_format is not None:
        schema = response_schema(request.response_format)
    if request.json_schema is not None:
        schema = answer_schema(request.json_schema, "json_schema")
    if request.grammar:
        return text_grammar(service.llm, request.grammar, "grammar"), None
    return None, schema


def checked_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as the chat library takes them. Raises ApiError for pictures and the like."""
    called: set[str] = set()
    n_values = 0
    for i, message in enumerate(messages):
        _check_content(message, i)
        for name in ("reasoning_content", "tool_call_id", "name", "tool_calls"):
            if name in message and not message[name]:
                del message[name]
        for call in message.get("tool_calls", ()):
            if (n_values := n_values + _check_call(call, i)) > MAX_ARGUMENTS:
                raise ApiError(400, f"messages: arguments of calls may hold {MAX_ARGUMENTS:,} values in all.")
            called.add(call["id"])
        if message["role"] == "tool" and called and message.get("tool_call_id", "") not in called:
            call_id = str(message.get("tool_call_id"))[:100]
            raise ApiError(400, f"messages.{i}.tool_call_id: no call before has the id {call_id!r}.", param="messages")
    return messages


def _check_content(message: dict[str, Any], i: int) -> None:
    """Completes a message's content, which is text or parts of text."""
    content = message.get("content")
    if isinstance(content, list):
        parts = []
        for part in content:
            text = part_text(part, _TEXTS)
            if text is None:
                kind = part.get("type")
                raise ApiError(400, f"messages.{i}.content: only text can be read, not {kind!r}.", param="messages")
            parts.append({"type": "text", "text": text})
        message["content"] = parts
    elif content is None:  # beside tool calls; few templates expect that
        message["content"] = ""


def part_text(part: Any, kinds: tuple[str, ...]) -> str | None:
    """The text of one part of a content; None if it is of another kind."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in kinds:
        return None
    text = part.get("refusal" if kind == "refusal" else "text")
    return text if isinstance(text, str) else None


def _check_call(call: dict[str, Any], i: int) -> int:
    """Completes a call that a message has; returns how many values its arguments hold."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"messages.{i}.tool_calls: a call has a function with a name.", param="messages")
    arguments, what, n_values = function.get("arguments"), "arguments of calls", 0
    if isinstance(arguments, str):
        try:
            n_values = check_text(arguments or "{}", what, MAX_ARGUMENTS)
        except ValueError as error:
            reason = str(error).rstrip(".")
            raise ApiError(400, f"messages.{i}.tool_calls: arguments are JSON: {reason}.", param="messages") from None
        except RecursionError:
            raise ApiError(400, f"messages.{i}.tool_calls: arguments nest too deep.", param="messages") from None
    elif isinstance(arguments, dict):
        n_values = check_values([arguments], what, MAX_ARGUMENTS)
    else:
        raise ApiError(400, f"messages.{i}.tool_calls: a function has arguments.", param="messages")
    function["arguments"] = arguments or "{}"
    call["type"] = "function"
    if not isinstance(call.setdefault("id", ""), str):
        raise ApiError(400, f"messages.{i}.tool_calls: an id is text.", param="messages")
    return n_values


def check_continued(messages: list[dict[str, Any]]) -> None:
    """Raises ApiError if the last message is none that can be continued."""
    last, before = messages[-1] if messages else {"role": ""}, messages[-2:-1]
    if last["role"] != "assistant" or last.get("tool_calls"):
        raise ApiError(
            400, "messages: only an assistant's message can be continued, without tool calls.", param="messages"
        )
    if before and before[0]["role"] == "assistant":
        raise ApiError(400, "messages: two messages of the assistant at the end cannot be continued.", param="messages")


# --- completions ------------------------------------------------------------------------------------------------------


def asked_completion(service: TextService, request: CompletionRequest) -> Asked:
    llm = service.llm
    more: dict[str, Any] = {"logit_bias": token_bias(llm, (request.logit_bias or {}).items())}
    return Asked(
        sampling=sampling_of(service, request, **more, **_held(llm, request)),
        max_tokens=request.max_tokens,
        stops=stops_of(request),
        n=request.n or 1,
        n_top=request.logprobs,
    )


def _held(llm: llama_cpp.Llama, request: CompletionRequest | LlamaCompletionRequest) -> dict[str, Any]:
    """The grammar that a text is held to, if there is one. Raises ApiError."""
    if request.grammar and request.json_schema is not None:
        raise ApiError(400, "Give a grammar or a json_schema, not both.", param="grammar")
    if request.grammar:
        return {"grammar": text_grammar(llm, request.grammar, "grammar")}
    if request.json_schema is not None:
        return {"grammar": schema_grammar(llm, request.json_schema, "json_schema")}
    return {}


@dataclass(frozen=True)
class AskedLlamaCpp(Asked):
    """
    only_reads       the prompt is processed, and nothing generated
    return_tokens    the tokens of the text are wanted, too
    timings          they are wanted with each part of a stream
    response_fields  what the answer has, by llama-server's paths; empty: all
    settings         what was asked for and what was taken for the rest, by llama-server's names
    """

    only_reads: bool = False
    return_tokens: bool = False
    timings: bool = False
    response_fields: Sequence[str] = ()
    settings: dict[str, Any] = field(default_factory=dict)


def asked_llama_cpp(service: TextService, end_tokens: Iterable[int], request: LlamaCompletionRequest) -> AskedLlamaCpp:
    """In llama.cpp's dialect."""
    llm = service.llm
    pairs = text_bias(service, request.logit_bias or [])
    if request.ignore_eos:
        pairs += [(token, False) for token in end_tokens]
    sampling = sampling_of(service, request, logit_bias=token_bias(llm, pairs), **_held(llm, request))
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


def llama_cpp_prompts(exchange: Exchange, prompt: LlamaPrompt) -> list[str | list[int]]:
    """The prompts of a request in llama.cpp's dialect. Raises ApiError and RequestCancelled."""
    if not isinstance(prompt, list) or any(isinstance(part, int) for part in prompt):
        given: list[Any] = [prompt]
    else:
        given = list(prompt)
    if not 0 < len(given) <= MAX_PROMPTS:
        raise ApiError(400, f"prompt: there may be 1 to {MAX_PROMPTS} of them, not {len(given)}.", param="prompt")
    return [_one_prompt(exchange, each) for each in given]


def _one_prompt(exchange: Exchange, prompt: str | PromptText | list[int | str]) -> str | list[int]:
    """One prompt, which may mix text and tokens."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, PromptText):
        if prompt.multimodal_data:
            raise ApiError(400, "prompt.multimodal_data: only text can be read.", param="prompt")
        return prompt.prompt_string
    service = exchange.service
    tokens: list[int] = []
    for i, part in enumerate(prompt):
        if isinstance(part, str):
            tokens += service.tokenizer.tokenize(part, i == 0, is_cancelled=exchange.is_cancelled).tolist()
        elif isinstance(part, int):
            tokens.append(part)
        else:
            raise ApiError(400, "prompt: one prompt is text or a list of tokens and texts.", param="prompt")
    prompts_of(tokens, service.engine.model.n_vocab)
    return tokens
