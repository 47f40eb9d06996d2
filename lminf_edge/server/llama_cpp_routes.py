"""llama-server's own API, as front ends for llama.cpp use it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import llama_cpp
from fastapi import APIRouter, Request

from lminf_edge.engine.meter import Meter
from lminf_edge.engine.segments import chat_template
from lminf_edge.engine.turn import Phase
from lminf_edge.engine.voice import Voice
from lminf_edge.server import answers
from lminf_edge.server.errors import ApiError
from lminf_edge.server.grammars import schema_grammar, text_grammar
from lminf_edge.server.openai_routes import ANSWERS, PROBLEMS, respond
from lminf_edge.server.requests import DetokenizeRequest, LlamaCompletionRequest, TokenizeRequest
from lminf_edge.server.settings import ENDLESS
from lminf_edge.server.state import ServerState

router = APIRouter(tags=["llama.cpp"])


@router.get("/health")
@router.get("/v1/health", include_in_schema=False)
async def health(request: Request) -> dict[str, str]:
    """Whether the server is up; needs no key."""
    if not ServerState.of(request).engine.is_alive:
        raise ApiError(503, "The engine has stopped: the server's log says why.", "engine_stopped")
    return {"status": "ok"}


@router.get("/props")
async def props(request: Request) -> dict[str, Any]:
    """What front ends ask before they send anything: the context size is large, so that they do not trim."""
    state = ServerState.of(request)
    engine, llm = state.engine, state.llm
    sampling = engine.defaults.sampling.public()
    return {
        "default_generation_settings": {
            "n_ctx": ENDLESS,
            "params": {**sampling, "n_predict": engine.defaults.max_tokens or -1},
        },
        "total_slots": len(engine.slots),
        "model_alias": state.settings.model_name,
        "chat_template": chat_template(llm),
        "bos_token": token_text(state, llm.token_bos()),
        "eos_token": token_text(state, llm.token_eos()),
        "modalities": {"vision": False, "audio": False},
        "lminf": stream_settings(state),
    }


def token_text(state: ServerState, token: int) -> str:
    return str(state.llm._model.token_get_text(token)) if token >= 0 else ""


def stream_settings(state: ServerState) -> dict[str, Any]:
    """The Λ cache's part of /props."""
    engine = state.engine
    return {
        "sink": engine.n_sinks,
        "max_sink": engine.max_sinks,
        "window": engine.window.n_local,
        "max_distance": engine.window.max_distance,
        "kv_bytes": engine.kv_bytes,
        "parallel": len(engine.slots),
        "memory_budget": engine.store.memory_budget,
        "disk_budget": engine.store.disk_budget,
        "streamed": engine.counters.read_tokens + engine.counters.answer_tokens,
    }


@router.get("/slots")
async def slots(request: Request) -> list[dict[str, Any]]:
    """The sequences of the context."""
    result = []
    for i, slot in enumerate(ServerState.of(request).engine.slots):
        turn = slot.turn
        busy = turn is not None and turn.phase is not Phase.DONE
        result.append({"id": i, "n_ctx": ENDLESS, "is_processing": busy, "n_tokens": len(slot) + slot.n_dropped})
    return result


@router.post("/tokenize", responses=PROBLEMS)
def tokenize(request: Request, body: TokenizeRequest) -> dict[str, Any]:
    """The tokens of a text."""
    llm = ServerState.of(request).llm
    tokens = llm.tokenize(
        body.content.encode("utf-8"), add_bos=bool(body.add_special), special=bool(body.parse_special)
    )
    if body.with_pieces:
        return {"tokens": [{"id": token, "piece": piece_of(llm.detokenize([token], special=True))} for token in tokens]}
    return {"tokens": tokens}


def piece_of(piece: bytes) -> str | list[int]:
    """Text, or its bytes where they are only a part of a character."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return list(piece)


@router.post("/detokenize", responses=PROBLEMS)
def detokenize(request: Request, body: DetokenizeRequest) -> dict[str, str]:
    """The text of tokens."""
    llm = ServerState.of(request).llm
    answers.prompts_of(body.tokens, llm.n_vocab())
    return {"content": llm.detokenize(body.tokens, special=True).decode("utf-8", errors="replace")}


@router.post("/completion", response_model=None, responses=ANSWERS)
@router.post("/completions", response_model=None, include_in_schema=False)
async def completion(request: Request, body: LlamaCompletionRequest) -> Any:
    """The continuation of a text, in llama.cpp's dialect."""
    state = ServerState.of(request)
    arguments = native_arguments(state, body)
    return await respond(
        request,
        body,
        lambda voice: native_answer(state, voice, body, arguments),
        lambda voice: native_chunks(state, voice, body, arguments),
        None,
    )


def prompt_of(state: ServerState, prompt: str | list[int] | list[int | str]) -> str | list[int]:
    """A prompt, which in this dialect may be text and tokens in turn."""
    if isinstance(prompt, str):
        return prompt
    tokens: list[int] = []
    for i, part in enumerate(prompt):
        if isinstance(part, str):
            tokens += state.llm.tokenize(part.encode("utf-8"), add_bos=i == 0, special=True)
        else:
            tokens.append(part)
    answers.prompts_of(tokens, state.llm.n_vocab())
    return tokens


def native_arguments(state: ServerState, body: LlamaCompletionRequest) -> dict[str, Any]:
    arguments = answers.sampling_arguments(body)
    arguments["max_tokens"] = body.n_predict
    arguments["logprobs"] = body.n_probs or None
    if body.mirostat:
        tau, eta = body.mirostat_tau, body.mirostat_eta
        arguments.update(
            mirostat_mode=body.mirostat,
            mirostat_tau=5.0 if tau is None else tau,
            mirostat_eta=0.1 if eta is None else eta,
        )
    if body.repeat_last_n == 0:
        arguments.update(repeat_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0)
    pairs = list(body.logit_bias.items() if isinstance(body.logit_bias, dict) else body.logit_bias or [])
    if body.ignore_eos:
        pairs += [(token, False) for token in state.end_tokens]
    if pairs:
        arguments["logit_bias"] = answers.token_bias(state.llm, pairs)
    if body.grammar is not None and body.json_schema is not None:
        raise ApiError(400, "Give a grammar or a json_schema, not both.", param="grammar")
    if body.grammar:
        arguments["grammar"] = text_grammar(state.llm, body.grammar, "grammar")
    elif body.json_schema is not None:
        arguments["grammar"] = schema_grammar(state.llm, body.json_schema, "json_schema")
    return arguments


def native_answer(
    state: ServerState, voice: Voice, body: LlamaCompletionRequest, arguments: dict[str, Any]
) -> dict[str, Any]:
    last: dict[str, Any] = {}
    texts, probabilities = [], []
    for chunk in native_chunks(state, voice, body, arguments):
        texts.append(chunk["content"])
        probabilities += chunk.get("completion_probabilities", [])
        last = chunk
    extra = {"completion_probabilities": probabilities} if body.n_probs else {}
    return {**last, "content": "".join(texts), **extra}


def native_chunks(
    state: ServerState, voice: Voice, body: LlamaCompletionRequest, arguments: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Chunks of text, the last of which says why it is the last."""
    meter = Meter(voice)
    only_read = arguments["max_tokens"] == 0
    if only_read:  # a prompt is read when the first token is asked for
        arguments = {**arguments, "max_tokens": 1}
    reason = "stop"
    for chunk in voice.create_completion(prompt_of(state, body.prompt), stream=True, **arguments):
        choice = chunk["choices"][0]
        reason = choice["finish_reason"] or reason
        if choice["finish_reason"] is None and not only_read:
            probabilities = (
                {"completion_probabilities": token_probabilities(choice["logprobs"])} if body.n_probs else {}
            )
            yield {"index": 0, "content": choice["text"], "stop": False, **probabilities}
    meter.add_turn()
    turn = voice.turn
    is_eog = turn is not None and bool(llama_cpp.llama_vocab_is_eog(state.llm._model.vocab, turn.token))
    yield {
        "index": 0,
        "content": "",
        "stop": True,
        "stop_type": "limit" if reason == "length" else "eos" if is_eog else "word",
        "model": state.settings.model_name,
        "tokens_predicted": 0 if only_read else meter.n_completion,
        "tokens_evaluated": meter.n_prompt,
        "tokens_cached": meter.n_cached,
        "truncated": False,
        "timings": meter.timings(),
        "lminf": meter.stream(),
    }


def token_probabilities(logprobs: dict[str, Any] | None) -> list[dict[str, Any]]:
    """OpenAI's lists of log probabilities in llama.cpp's form."""
    if logprobs is None:
        return []
    rows = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    return [
        {
            "token": token,
            "logprob": logprob,
            "top_logprobs": [{"token": other, "logprob": value} for other, value in (top or {}).items()],
        }
        for token, logprob, top in rows
    ]
