"""llama-server's API, as front ends for llama.cpp use it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from lminf_edge.engine.scheduler import Scheduler
from lminf_edge.server.arguments import (
    AskedLlamaCpp,
    asked_chat,
    asked_llama_cpp,
    generation_settings,
    llama_cpp_prompts,
    prompts_of,
)
from lminf_edge.server.bodies import BodyRoute
from lminf_edge.server.errors import ApiError, ErrorResponse, engine_stopped
from lminf_edge.server.infill import infill_tokens
from lminf_edge.server.llama_cpp_answers import llama_cpp_answer, llama_cpp_chunks, llama_cpp_progress
from lminf_edge.server.openai_routes import ANSWERS, PROBLEMS, conversation_name, respond
from lminf_edge.server.requests import (
    ChatRequest,
    DetokenizeRequest,
    InfillRequest,
    LlamaCompletionRequest,
    SlotRequest,
    TokenizeRequest,
)
from lminf_edge.server.responses import FINGERPRINT
from lminf_edge.server.settings import ENDLESS
from lminf_edge.server.slot_files import load_slot_file, save_slot_file, slot_file
from lminf_edge.server.state import ServerState
from lminf_edge.server.streaming import encoded, in_thread
from lminf_edge.text.chat import ChatPrompt
from lminf_edge.text.service import Exchange
from lminf_edge.text.tokenizer import N_AT_ONCE

router = APIRouter(tags=["llama.cpp"], route_class=BodyRoute)


@router.get("/health")
@router.get("/v1/health", include_in_schema=False)
async def health(request: Request) -> dict[str, str]:
    """Whether the server is up. Needs no key."""
    if not ServerState.of(request).is_alive:
        raise engine_stopped()
    return {"status": "ok"}


@router.get("/props", response_model=None)
async def props(request: Request) -> dict[str, Any] | Response:
    """The server's properties. The context size is huge so that front ends do not trim.

    With a header that names a conversation they also tell where that is: `lminf.conversation`.
    """
    state = ServerState.of(request)
    engine, llm, defaults = state.engine, state.llm, state.service.defaults
    properties: dict[str, Any] = {
        "default_generation_settings": {
            "n_ctx": ENDLESS,
            "params": {**generation_settings(defaults.sampling), "n_predict": defaults.max_tokens or -1},
        },
        "total_slots": len(engine.slots),
        "model_alias": state.settings.model_name,
        "model_path": state.settings.model_file,
        "build_info": FINGERPRINT,
        "endpoint_slots": state.settings.slots,
        "endpoint_metrics": state.settings.metrics,
        "endpoint_props": False,  # they cannot be changed
        "chat_template": state.service.template.source,
        "bos_token": token_text(state, llm.token_bos()),
        "eos_token": token_text(state, llm.token_eos()),
        "modalities": {"vision": False, "audio": False},
        "lminf": stream_settings(state),
    }
    name, owner = conversation_name(request), request.state.owner
    if not name:
        return properties

    def work() -> Response:
        told = engine.call(lambda: engine.scheduler.told_of(owner, name))
        properties["lminf"]["conversation"] = None if told is None else asdict(told)
        return encoded(properties)

    return await in_thread(request, work)


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
    window, parts, reading = scheduler.window, scheduler.model.parts, scheduler.reading
    return {
        "n_recall": window.n_recall,
        "distance": window.recall_distance,
        "from_layer": window.recall_from,
        "every": window.recall_every,
        "rule": window.recall_rule,
        "index": window.recall_index,
        "archive_tokens": parts.n_archive,
        "archive_type_k": window.archive_type_k,
        "archive_type_v": window.archive_type_v,
        "archive_bytes_per_token": parts.archive_token_bytes or None,
        "archive_bytes_at_most": parts.n_archive * parts.archive_token_bytes or None,
        "reading": None if reading is None else asdict(reading),
    }


@router.get("/slots", responses={501: {"model": ErrorResponse}})
async def slots(request: Request) -> list[dict[str, Any]]:
    """The slots: conversations in the context."""
    state = ServerState.of(request)
    if not state.settings.slots:
        raise ApiError(501, "This server tells nothing of its slots: it was started with --no-slots.")
    result = []
    for i, slot in enumerate(state.engine.slots):
        position = len(slot) + slot.n_dropped
        busy = slot.request is not None
        result.append({"id": i, "n_ctx": ENDLESS, "is_processing": busy, "n_tokens": position})
    return result


@router.post("/slots/{number}", response_model=None, responses=PROBLEMS)
async def slot_action(
    request: Request, number: int, action: Literal["save", "restore", "erase"], body: SlotRequest
) -> Response:
    """Saves what a slot holds to a file, restores it from there, or erases it. Needs --slot-save-path."""
    state = ServerState.of(request)
    folder, owner, engine = state.settings.slot_folder, request.state.owner, state.engine
    name = body.filename
    if folder is None:
        raise ApiError(501, "This server saves no slots: start it with --slot-save-path.")
    if name is None and action != "erase":
        raise ApiError(400, "filename: it is missing.", param="filename")
    started = time.perf_counter()

    def milliseconds() -> float:
        return 1e3 * (time.perf_counter() - started)

    def work() -> Response:
        told: dict[str, Any] = {"id_slot": number}
        if action == "erase":
            return encoded({**told, "n_erased": engine.call(lambda: engine.scheduler.erase_slot(number, owner))})
        assert name is not None
        path = slot_file(folder, owner, name)
        told["filename"] = name
        if action == "save":
            saved = engine.call(lambda: engine.scheduler.save_slot(number, owner))
            n_bytes = save_slot_file(path, saved)
            more = {"n_saved": len(saved.log), "n_written": n_bytes, "timings": {"save_ms": milliseconds()}}
        else:
            found = load_slot_file(path)
            engine.call(lambda: engine.scheduler.restore_slot(number, owner, found))
            more = {"n_restored": len(found.log), "n_read": found.nbytes, "timings": {"restore_ms": milliseconds()}}
        return encoded({**told, **more})

    return await in_thread(request, work)


@router.post("/tokenize", response_model=None, responses=PROBLEMS)
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """The tokens of a text."""
    state = ServerState.of(request)
    llm = state.llm

    cancelled = threading.Event()

    def work() -> Response:
        add_bos, special = bool(body.add_special), bool(body.parse_special)
        tokens = state.service.tokenizer.tokenize(body.content, add_bos, special, cancelled.is_set)
        parts: Iterator[list[Any]] = (
            part.tolist() for part in np.split(tokens, range(N_AT_ONCE, len(tokens), N_AT_ONCE))
        )
        if body.with_pieces:
            ids = np.unique(tokens).tolist()
            texts = {token: piece_of(llm.detokenize([token], special=True)) for token in ids}
            parts = ([{"id": token, "piece": texts[token]} for token in part] for part in parts)
        return encoded_list("tokens", parts)

    return await in_thread(request, work, cancelled.set)


def encoded_list(name: str, parts: Iterable[list[Any]]) -> Response:
    """{name: [the parts' values]} as JSON: in parts, as the encoder holds the GIL."""
    values = b",".join(to_json(part)[1:-1] for part in parts)
    return Response(b'{"%s":[%s]}' % (name.encode(), values), media_type="application/json")


def piece_of(piece: bytes) -> str | list[int]:
    """Text, or a list of bytes if they are not whole characters."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return list(piece)


@router.post("/apply-template", response_model=None, responses=PROBLEMS)
async def apply_template(request: Request, body: ChatRequest) -> Response:
    """The prompt that a chat request makes of its messages, as text."""

    def told(prompt: ChatPrompt) -> dict[str, Any]:
        return {"prompt": prompt.text}

    return await respond_prompt(request, body, told)


@router.post("/chat/completions/input_tokens", response_model=None, responses=PROBLEMS)
@router.post("/v1/chat/completions/input_tokens", response_model=None, include_in_schema=False)
async def input_tokens(request: Request, body: ChatRequest) -> Response:
    """How many tokens the prompt of a chat request has."""

    def told(prompt: ChatPrompt) -> dict[str, Any]:
        return {"object": "response.input_tokens", "input_tokens": len(prompt.tokens)}

    return await respond_prompt(request, body, told)


async def respond_prompt(request: Request, body: ChatRequest, told: Callable[[ChatPrompt], dict[str, Any]]) -> Response:
    """What is told of a chat request's prompt; nothing is generated."""
    service = ServerState.of(request).service
    exchange = Exchange(service, owner=request.state.owner)

    def work() -> Response:
        asked = asked_chat(service, body, exchange.is_cancelled)
        return encoded(told(exchange.chat_prompt(asked.messages, asked.options)))

    return await in_thread(request, work, exchange.cancel)


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
    return await respond_llama_cpp(request, body, lambda exchange: llama_cpp_prompts(exchange, body.prompt))


@router.post("/infill", response_model=None, responses=ANSWERS)
async def infill(request: Request, body: InfillRequest) -> Response:
    """What stands between two texts, by a model that has tokens for that."""
    return await respond_llama_cpp(request, body, lambda exchange: [infill_tokens(exchange, body)])


async def respond_llama_cpp(
    request: Request, body: LlamaCompletionRequest, prompts: Callable[[Exchange], Sequence[str | list[int]]]
) -> Response:
    """Completions of prompts, which are made in a worker thread."""
    state = ServerState.of(request)
    name = state.settings.model_name

    def prepare(exchange: Exchange) -> tuple[AskedLlamaCpp, list[ChatPrompt]]:
        asked = asked_llama_cpp(state.service, state.engine.model.eog_tokens, body)
        return asked, [exchange.text_prompt(each) for each in prompts(exchange)]

    return await respond(
        request,
        body,
        prepare,
        lambda exchange, asked: llama_cpp_answer(exchange, *asked, name),
        lambda exchange, asked: llama_cpp_chunks(exchange, *asked, name),
        None,
        lambda asking, seconds: llama_cpp_progress(asking, seconds, bool(body.timings_per_token)),
    )
