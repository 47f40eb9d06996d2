"""Request bodies: the fields we use. Others are ignored, as every server of these APIs does."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, field_validator, model_validator
from typing_extensions import Required, TypedDict

from lminf_edge.engine.params import MAX_BREAKERS

MAX_STOPS, MAX_STOP_CHARACTERS = 64, 1024
MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_BIASES = 1 << 16


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

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, body: Any) -> Any:
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

    messages: Many[Message] = Field(min_length=1)
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


class CompletionRequest(_OpenAISampling):
    """POST /v1/completions"""

    prompt: str | Many[int] | Many[str] | Many[Many[int]] = ""
    suffix: str | None = None
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    grammar: str | None = None


class EmbeddingRequest(_Lenient):
    """POST /v1/embeddings"""

    model: str | None = None
    input: str | Many[str] | Many[int] | Many[Many[int]]
    encoding_format: Literal["float", "base64"] | None = "float"


class LlamaCompletionRequest(Sampling):
    """POST /completion, in llama.cpp's dialect"""

    prompt: str | Many[int] | Many[int | str] = ""
    n_predict: int | None = Field(-1, ge=-1, le=1 << 40)
    n_probs: int | None = Field(0, ge=0, le=MAX_LOGPROBS)
    logit_bias: LogitBias[Many[tuple[int, float | bool]] | dict[str, float] | None] = None
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    ignore_eos: bool | None = Field(False, description="go on to the limit")


class TokenizeRequest(_Lenient):
    """POST /tokenize"""

    content: str = ""
    add_special: bool | None = False
    parse_special: bool | None = True
    with_pieces: bool | None = False


class DetokenizeRequest(_Lenient):
    """POST /detokenize"""

    tokens: Many[int] = []
