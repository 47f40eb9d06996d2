"""llama-server's API, as front ends for llama.cpp use it."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, replace
from typing import Any

from fastapi import APIRouter, Request, Response

from lminf_edge.engine.scheduler import Scheduler
from lminf_edge.server.arguments import Asked, asked_llama_cpp, prompts_of
from lminf_edge.server.bodies import BodyRoute
from lminf_edge.server.errors import engine_stopped
from lminf_edge.server.events import text_events
from lminf_edge.server.openai_routes import ANSWERS, PROBLEMS, respond
from lminf_edge.server.requests import DetokenizeRequest, LlamaCompletionRequest, TokenizeRequest
from lminf_edge.server.responses import llama_cpp_answer, llama_cpp_chunks
from lminf_edge.server.settings import ENDLESS
from lminf_edge.server.state import ServerState
from lminf_edge.server.streaming import encoded, in_thread
from lminf_edge.text.chat import ChatPrompt
from lminf_edge.text.service import Exchange

router = APIRouter(tags=["llama.cpp"], route_class=BodyRoute)


@router.get("/health")
@router.get("/v1/health", include_in_schema=False)
async def health(request: Request) -> dict[str, str]:
    """Whether the server is up. Needs no key."""
    if not ServerState.of(request).engine.is_alive:
        raise engine_stopped()
    return {"status": "ok"}


@router.get("/props")
async def props(request: Request) -> dict[str, Any]:
    """The server's properties. The context size is huge so that front ends do not trim."""
    state = ServerState.of(request)
    engine, llm, defaults = state.engine, state.llm, state.service.defaults
    return {
        "default_generation_settings": {
            "n_ctx": ENDLESS,
            "params": {**defaults.sampling.public(), "n_predict": defaults.max_tokens or -1},
        },
        "total_slots": len(engine.slots),
        "model_alias": state.settings.model_name,
        "chat_template": state.service.template.source,
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
        "window": engine.n_local,
        "max_distance": engine.max_distance,
        "kv_bytes": engine.parts.kv_bytes,
        "parts": asdict(engine.parts),
        "parallel": len(engine.slots),
        "memory_budget": engine.store.memory_budget,
        "disk_budget": engine.store.disk_budget,
        "prefill": engine.scheduler.prefill,
        "n_tail": engine.scheduler.n_tail,
        "recall": recall_settings(engine.scheduler) if engine.n_recall else None,
        "streamed": engine.counters.prefilled_tokens + engine.counters.generated_tokens,
        "skipped": engine.counters.skipped_tokens,
    }


def recall_settings(scheduler: Scheduler) -> dict[str, Any]:
    """What is recalled of the tokens that have left the window; an archive is that of one conversation."""
    window, token_bytes = scheduler.window, scheduler.model.parts.archive_token_bytes
    return {
        "n_recall": window.n_recall,
        "distance": window.recall_distance,
        "from_layer": window.recall_from,
        "every": window.recall_every,
        "rule": window.recall_rule,
        "index": window.recall_index,
        "archive_tokens": window.n_archive,
        "archive_type_k": window.archive_type_k,
        "archive_type_v": window.archive_type_v,
        "archive_bytes_per_token": token_bytes or None,
        "archive_bytes_at_most": window.n_archive * token_bytes or None,
    }


@router.get("/slots")
async def slots(request: Request) -> list[dict[str, Any]]:
    """The slots: conversations in the context."""
    result = []
    for i, slot in enumerate(ServerState.of(request).engine.slots):
        position = len(slot) + slot.n_dropped
        busy = slot.request is not None
        result.append({"id": i, "n_ctx": ENDLESS, "is_processing": busy, "n_tokens": position})
    return result


@router.post("/tokenize", response_model=None, responses=PROBLEMS)
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """The tokens of a text."""
    state = ServerState.of(request)
    llm = state.llm

    cancelled = threading.Event()

    def work() -> Response:
        add_bos, special = bool(body.add_special), bool(body.parse_special)
        tokens = state.service.tokenizer.tokenize(body.content, add_bos, special, cancelled.is_set).tolist()
        if body.with_pieces:
            pieces = [{"id": token, "piece": piece_of(llm.detokenize([token], special=True))} for token in tokens]
            return encoded_list("tokens", pieces)
        return encoded_list("tokens", tokens)

    return await in_thread(request, work, cancelled.set)


def encoded_list(name: str, values: list[Any]) -> Response:
    """{name: values} as JSON, encoded in parts: the encoder holds the GIL."""
    parts = [json.dumps(values[i : i + 10_000], ensure_ascii=False)[1:-1] for i in range(0, len(values), 10_000)]
    return Response(f'{{"{name}":[{",".join(parts)}]}}'.encode(), media_type="application/json")


def piece_of(piece: bytes) -> str | list[int]:
    """Text, or a list of bytes if they are not whole characters."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return list(piece)


@router.post("/detokenize", response_model=None, responses=PROBLEMS)
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """The text of tokens."""
    llm = ServerState.of(request).llm

    def work() -> Response:
        prompts_of(body.tokens, llm.n_vocab())
        return encoded({"content": llm.detokenize(body.tokens, special=True).decode("utf-8", errors="replace")})

    return await in_thread(request, work)


@router.post("/completion", response_model=None, responses=ANSWERS)
@router.post("/completions", response_model=None, include_in_schema=False)
async def completion(request: Request, body: LlamaCompletionRequest) -> Response:
    """The continuation of a text, in llama.cpp's dialect."""
    state = ServerState.of(request)
    name = state.settings.model_name
    only_reads = body.n_predict == 0

    def prepare(exchange: Exchange) -> tuple[Asked, list[ChatPrompt]]:
        asked = asked_llama_cpp(state.service, state.engine.model.eog_tokens, body)
        if only_reads:  # a prompt is processed when the first token is asked for
            asked = replace(asked, max_tokens=1)
        return asked, [exchange.text_prompt(prompt_of(state, body.prompt))]

    return await respond(
        request,
        body,
        prepare,
        lambda exchange, asked: llama_cpp_answer(exchange, text_events(exchange, *asked), name, only_reads),
        lambda exchange, asked: llama_cpp_chunks(exchange, text_events(exchange, *asked), name, only_reads),
        None,
    )


def prompt_of(state: ServerState, prompt: str | list[int] | list[int | str]) -> str | list[int]:
    """A prompt, which in this dialect may mix text and tokens."""
    if isinstance(prompt, str):
        return prompt
    tokens: list[int] = []
    for i, part in enumerate(prompt):
        if isinstance(part, str):
            tokens += state.service.tokenizer.tokenize(part, add_bos=i == 0).tolist()
        else:
            tokens.append(part)
    prompts_of(tokens, state.engine.model.n_vocab)
    return tokens
