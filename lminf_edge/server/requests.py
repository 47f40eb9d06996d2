"""Request bodies: the fields we use. Others are ignored, as every server of these APIs does."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    field_validator,
    model_validator,
)
from typing_extensions import Required, TypedDict

from lminf_edge.engine.params import MAX_BREAKERS, MAX_SAMPLERS, sampler_name

MAX_STOPS, MAX_STOP_CHARACTERS = 64, 1024
MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_BIASES = 1 << 16
MAX_PROMPTS = 128
MAX_FIELDS = 64
MAX_INPUTS = 2048  # of a request for embeddings, as at OpenAI


def _few_biases(value: Any) -> Any:
    if isinstance(value, (dict, list)) and len(value) > MAX_BIASES:
        raise ValueError(f"there may be {MAX_BIASES} biases at most")
    return value


class _FailFast(FailFast):
    """pydantic's, hashable so that it works in unions."""

    __hash__ = object.__hash__


# pydantic collects every error, which for a long list takes gigabytes: these stop at the first
T = TypeVar("T")
Many = Annotated[list[T], _FailFast()]
LogitBias = Annotated[T, BeforeValidator(_few_biases)]


class Message(TypedDict, total=False):
    """One message. Its other fields are passed to the model's chat template."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    role: Required[str]
    content: str | Many[dict[str, Any]] | None
    reasoning_content: str | None
    tool_calls: Many[dict[str, Any]] | None
    tool_call_id: str | None
    name: str | None


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(_Lenient):
    include_usage: bool | None = False


class LambdaOptions(_Lenient):
    """Options of this server alone."""

    pin_system: bool | None = Field(None, description="keep the system block as the conversation's sinks")
    prefill: Literal["full", "tail"] | None = Field(
        None, description="tail: of what is not cached, only the first tokens and the last windows are processed"
    )
    recall: bool | Annotated[int, Field(ge=0)] | None = Field(
        None, description="how many tokens that have left the window each layer recalls; false: none"
    )


# how other servers are given pictures or embeddings beside a prompt
_NOT_TEXT = ("image_data", "multimodal_data", "multi_modal_data", "prompt_embeds")

# what llama-server has and we do not, unless it is given as off
_NOT_SERVED = ("lora", "n_indent", "t_max_predict_ms", "adaptive_target", "grammar_lazy", "grammar_triggers")
_OFF: tuple[Any, ...] = (None, False, 0, -1, "", [], {})

TokenLimit = Annotated[int, Field(ge=1, le=1 << 40)] | Literal[-1] | None


class Sampling(_Lenient):
    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=100, description="0: always the likeliest token; 0.8 if not given")
    top_p: float | None = Field(None, ge=0, le=1, description="0.95 if not given")
    top_k: int | None = Field(None, ge=-1, le=1 << 30, description="40 if not given; 0 or -1: all tokens")
    min_p: float | None = Field(None, ge=0, le=1, description="0.05 if not given")
    typical_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repeat_penalty: float | None = Field(None, gt=0, le=10)
    repeat_last_n: int | None = Field(None, ge=-1, le=1 << 30, description="64 if not given; -1: the attention window")
    dry_multiplier: float | None = Field(None, ge=0, le=100, description="0: no DRY")
    dry_base: float | None = Field(None, ge=0, le=100, description="1.75 if not given, or below 1")
    dry_allowed_length: int | None = Field(None, ge=0, le=1 << 30)
    dry_penalty_last_n: int | None = Field(None, ge=-1, le=1 << 30, description="-1: the attention window")
    dry_sequence_breakers: Many[str] | None = Field(None, description=f"{MAX_BREAKERS} strings at most")
    xtc_probability: float | None = Field(None, ge=0, le=1, description="0: no XTC")
    xtc_threshold: float | None = Field(None, ge=0, le=1)
    top_n_sigma: float | None = Field(None, ge=-1, le=1e6, description="0 or less: off")
    dynatemp_range: float | None = Field(None, ge=0, le=100, description="0: the temperature is fixed")
    dynatemp_exponent: float | None = Field(None, ge=0, le=100)
    mirostat: Literal[0, 1, 2] | None = None
    mirostat_tau: float | None = Field(None, ge=0, le=100)
    mirostat_eta: float | None = Field(None, ge=0, le=100)
    samplers: Many[str] | None = Field(None, max_length=MAX_SAMPLERS, description="which take part, in this order")
    min_keep: int | None = Field(None, ge=0, le=1 << 30, description="tokens that samplers leave at least")
    seed: int | None = Field(None, description="the same seed, prompt and parameters give the same text")
    stop: str | Many[str] | None = None
    stream: bool | None = False
    lminf: LambdaOptions | None = None
    prompt_cache_key: str | None = Field(
        None,
        max_length=1024,
        description="names the conversation: it may continue after its oldest messages were dropped",
    )
    return_progress: bool | None = Field(False, description="report prefill progress, in a stream")
    id_slot: int | None = Field(None, ge=-1, le=1 << 30, description="the slot to be answered in; -1: any")
    cache_prompt: bool | None = Field(True, description="false: all of the prompt is processed")
    sse_ping_interval: int | None = Field(
        None, ge=-1, le=3600, description="seconds between keep-alives of a stream; 0 or -1: the server's own"
    )

    @field_validator("samplers")
    @classmethod
    def _named_samplers(cls, names: list[str] | None) -> list[str] | None:
        return None if names is None else [sampler_name(name) for name in names]

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_here(cls, body: Any) -> Any:
        for name in _NOT_SERVED:
            if isinstance(body, dict) and body.get(name) not in _OFF:
                raise ValueError(f"{name}: this server does not have it")
        for name in _NOT_TEXT:
            if isinstance(body, dict) and body.get(name):
                raise ValueError(f"{name}: only text can be read")
        return body

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | Many[str] | None) -> str | Many[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MAX_STOPS or any(len(each) > MAX_STOP_CHARACTERS for each in stops):
            raise ValueError(f"there may be {MAX_STOPS} stop strings of {MAX_STOP_CHARACTERS} characters at most")
        return stop


class _OpenAISampling(Sampling):
    max_tokens: TokenLimit = Field(None, description="not given or -1: until the model stops")
    logit_bias: LogitBias[dict[str, float] | None] = None
    n: int | None = Field(1, ge=1, le=MAX_CHOICES)
    stream_options: StreamOptions | None = None
    user: str | None = None


class ChatRequest(_OpenAISampling):
    """POST /v1/chat/completions"""

    messages: Many[Message] = Field(description="may be none: the template then says how an answer begins")
    max_tokens: TokenLimit = Field(
        None,
        validation_alias=AliasChoices("max_tokens", "n_predict"),
        description="not given or -1: until the model stops",
    )
    max_completion_tokens: TokenLimit = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: dict[str, Any] | None = None
    tools: Many[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: Many[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = Field(None, description="true if not given and the template has several")
    chat_template_kwargs: dict[str, Any] | None = None
    verbose: bool | None = Field(False, description="the answer has the prompt, too, as __verbose.prompt")
    add_generation_prompt: bool | None = Field(True, description="false: the messages end where the answer begins")
    continue_final_message: bool | Literal["content", "reasoning_content"] | None = Field(
        None, description="the last message is continued; so is an assistant's if this is not given"
    )
    reasoning_format: Literal["auto", "none", "deepseek", "deepseek-legacy"] | None = Field(
        None, description="none: thoughts stay in the content"
    )
    reasoning_effort: str | None = Field(None, max_length=64, description="none: without thoughts")
    reasoning_budget_tokens: int | None = Field(None, ge=-1, le=1 << 30, description="of thoughts; -1: any number")
    thinking_budget_tokens: int | None = Field(None, ge=-1, le=1 << 30, description="the same")
    reasoning_budget_message: str | None = Field(None, max_length=4096, description="said where the budget ends them")
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    modalities: Many[str] | None = Field(None, description="text, which is all that can be written")

    @field_validator("modalities")
    @classmethod
    def _only_text(cls, modalities: list[str] | None) -> list[str] | None:
        if modalities and modalities != ["text"]:
            raise ValueError("only text can be written")
        return modalities


class CompletionRequest(_OpenAISampling):
    """POST /v1/completions"""

    max_tokens: TokenLimit = Field(
        None,
        validation_alias=AliasChoices("max_tokens", "n_predict"),
        description="not given or -1: until the model stops",
    )
    prompt: str | Many[int] | Many[str] | Many[Many[int]] = ""
    suffix: str | None = None
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    best_of: int | None = Field(None, description="as many as n: all that are made are answered")

    @model_validator(mode="after")
    def _all_are_answered(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of: all answers that are made are sent: ask for n of them, and choose")
        return self


class PromptText(_Lenient):
    """A prompt as an object, which llama-server has for pictures."""

    prompt_string: str
    multimodal_data: Any = Field(None, description="nothing: only text can be read")


TokensAndText = Many[int] | Many[int | str]
LlamaPrompt = str | PromptText | TokensAndText | Many[str | PromptText | TokensAndText]


class TextPart(_Lenient):
    type: Literal["text"]
    text: str


class TextContent(_Lenient):
    """A text in the parts of a message."""

    content: Many[TextPart]


EmbeddingInput = str | PromptText | TextContent | TokensAndText


class RerankRequest(_Lenient):
    """POST /rerank: documents in Jina's format, or texts in that of TEI."""

    model: str | None = None
    query: str
    documents: Many[str] | None = None
    texts: Many[str] | None = None
    top_n: int | None = Field(None, ge=0)
    return_text: bool | None = False

    @model_validator(mode="after")
    def _some(self) -> RerankRequest:
        n = len(self.given)
        if not 0 < n <= MAX_INPUTS:
            raise ValueError(f"documents: there may be 1 to {MAX_INPUTS} of them, not {n}")
        return self

    @property
    def given(self) -> list[str]:
        return self.documents or self.texts or []


class EmbeddingRequest(_Lenient):
    """POST /v1/embeddings"""

    model: str | None = None
    input: EmbeddingInput | Many[EmbeddingInput] = Field(
        validation_alias=AliasChoices("input", "content"), description=f"one text, or up to {MAX_INPUTS}"
    )
    encoding_format: Literal["float", "base64"] | None = "float"


# what llama-server brings into range where others refuse it
_CLAMPED: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_k": (0, 1 << 30),
    **dict.fromkeys(("top_p", "min_p", "typical_p", "xtc_probability", "xtc_threshold"), (0, 1)),
    "mirostat": (0, 2),
}
_WHOLE = ("top_k", "mirostat", "seed", "n_predict", "max_tokens", "n_probs", "repeat_last_n", "min_keep", "id_slot")


class LlamaCompletionRequest(Sampling):
    """POST /completion, in llama.cpp's dialect: numbers are taken as leniently as there."""

    frequency_penalty: float | None = Field(None, ge=-100, le=100)
    presence_penalty: float | None = Field(None, ge=-100, le=100)

    prompt: LlamaPrompt = Field("", description=f"text, tokens, or both mixed; or up to {MAX_PROMPTS} of these")
    n_predict: int | None = Field(
        -1, ge=-1, le=1 << 40, validation_alias=AliasChoices("n_predict", "max_completion_tokens", "max_tokens")
    )
    n: int | None = Field(1, ge=1, le=MAX_CHOICES, validation_alias=AliasChoices("n_cmpl", "n"))
    n_probs: int | None = Field(0, ge=0, le=MAX_LOGPROBS, validation_alias=AliasChoices("n_probs", "logprobs"))
    post_sampling_probs: bool | None = Field(False, description="n_probs: of what the samplers left")
    logit_bias: LogitBias[Many[tuple[int | str, float | bool]] | dict[str, float | bool] | None] = None
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    ignore_eos: bool | None = Field(False, description="go on to the limit")
    return_tokens: bool | None = Field(False, description="the tokens of the text, too; a stream always has them")
    timings_per_token: bool | None = Field(False, description="timings in every part of a stream")
    response_fields: Many[Annotated[str, Field(max_length=256)]] | None = Field(
        None, max_length=MAX_FIELDS, description='only these in the answer, such as "generation_settings/n_predict"'
    )

    @model_validator(mode="before")
    @classmethod
    def _in_range(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        changed = {}
        for name, value in body.items():
            is_finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
            if isinstance(value, bool) or not is_finite:
                continue
            if name in _CLAMPED:
                value = min(max(value, _CLAMPED[name][0]), _CLAMPED[name][1])
            changed[name] = int(value) if name in _WHOLE else value
        return {**body, **changed}


class InfillExtra(_Lenient):
    """More text for /infill, of another file."""

    text: str
    filename: str = "tmp"


class InfillRequest(LlamaCompletionRequest):
    """POST /infill: what stands between two texts; `prompt` is how it begins."""

    prompt: str = ""
    input_prefix: str
    input_suffix: str
    input_extra: Many[InfillExtra] | None = None


class SlotRequest(_Lenient):
    """POST /slots/N"""

    filename: str | None = Field(None, max_length=255, description="save, restore: a plain name")


class TokenizeRequest(_Lenient):
    """POST /tokenize"""

    content: str = ""
    add_special: bool | None = False
    parse_special: bool | None = True
    with_pieces: bool | None = False


class DetokenizeRequest(_Lenient):
    """POST /detokenize"""

    tokens: Many[int] = []
