"""OpenAI's API, as its clients use it: models, chat, completions, embeddings."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np
from fastapi import APIRouter, Request, Response

from lminf_edge.engine.meter import Meter
from lminf_edge.engine.voice import Voice
from lminf_edge.server import answers
from lminf_edge.server.bodies import BodyRoute
from lminf_edge.server.errors import ApiError, ErrorResponse
from lminf_edge.server.requests import ChatRequest, CompletionRequest, EmbeddingRequest, Sampling
from lminf_edge.server.state import ServerState
from lminf_edge.server.streaming import EventStream, ProgressReporter, encoded, gone, in_thread

T = TypeVar("T")

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=BodyRoute)

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 403, 408, 413, 431, 500, 501, 503)
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "the answer, or its parts", "content": {"application/json": {}, "text/event-stream": {}}},
    **PROBLEMS,
}


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The model, its window, and how much context a client may send: there is no end to it."""
    return {"object": "list", "data": [ServerState.of(request).model_card()]}


@router.get("/models/{name:path}", responses={404: {"model": ErrorResponse}})
async def model(request: Request, name: str) -> dict[str, Any]:
    card = ServerState.of(request).model_card()
    if name != card["id"]:
        raise ApiError(404, f"There is no model {name[:200]!r} here, only {card['id']!r}.", "model_not_found", "model")
    return card


async def respond(
    request: Request,
    body: Sampling,
    prepare: Callable[[], T],
    whole: Callable[[Voice, T], dict[str, Any]],
    chunks: Callable[[Voice, T], Iterator[dict[str, Any]]],
    done: str | None,
) -> Response:
    """An answer in one piece or, with `stream`, in chunks and then `done`.

    Both are made in a thread, and so is what `prepare` makes of the request for them.
    """
    state = ServerState.of(request)
    pin_system = body.lminf.pin_system if body.lminf else None
    if not body.stream:
        voice = Voice(state.engine, pin_system=pin_system)
        return await in_thread(request, lambda: encoded(whole(voice, prepare())), voice.cancel) or gone()
    events = EventStream(request)
    on_progress = None
    if body.return_progress:
        on_progress = ProgressReporter(lambda progress: events.put(answers.progress_chunk(progress)))
    voice = Voice(state.engine, pin_system=pin_system, on_progress=on_progress)
    return await events.respond(voice, prepare, partial(chunks, voice), done)


@router.post("/chat/completions", response_model=None, responses=ANSWERS)
async def chat(request: Request, body: ChatRequest) -> Response:
    """An answer to a conversation of any length; what was sent before is recognised and not read again."""
    state = ServerState.of(request)
    n = body.n or 1
    usage = bool(body.stream_options and body.stream_options.include_usage)

    def prepare() -> dict[str, Any]:
        arguments = answers.chat_arguments(state.llm, body, state.settings.model_name)
        state.log_messages(arguments["messages"])
        return arguments

    return await respond(
        request,
        body,
        prepare,
        lambda voice, arguments: answers.chat_answers(voice, arguments, n, Meter(voice)),
        lambda voice, arguments: answers.chat_chunks(voice, arguments, n, Meter(voice), usage),
        "[DONE]",
    )


@router.post("/completions", response_model=None, responses=ANSWERS)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """The continuation of a text of any length."""
    state = ServerState.of(request)
    n = body.n or 1
    usage = bool(body.stream_options and body.stream_options.include_usage)

    def prepare() -> tuple[list[str | list[int]], dict[str, Any]]:
        arguments = answers.completion_arguments(state.llm, body, state.settings.model_name)
        return answers.prompts_of(body.prompt, state.llm.n_vocab()), arguments

    return await respond(
        request,
        body,
        prepare,
        lambda voice, prepared: answers.completion_answers(voice, *prepared, n, Meter(voice)),
        lambda voice, prepared: answers.completion_chunks(voice, *prepared, n, Meter(voice), usage),
        "[DONE]",
    )


@router.post("/embeddings", response_model=None, responses=PROBLEMS)
async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """A vector for each text, where the server was started with --embeddings."""
    state = ServerState.of(request)
    embedder = state.embedder
    if embedder is None:
        raise ApiError(501, "This server makes no embeddings: start it with --embeddings.", "embeddings_disabled")
    cancelled = threading.Event()

    def embed() -> Response:
        inputs = answers.prompts_of(body.input, state.llm.n_vocab())
        vectors, n_tokens = embedder.embed(inputs, cancelled.is_set)
        data: list[dict[str, Any]] = []
        for i, vector in enumerate(vectors):
            as_floats = body.encoding_format != "base64"
            packed = base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode("ascii")
            data.append({"object": "embedding", "index": i, "embedding": vector if as_floats else packed})
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return encoded({"object": "list", "data": data, "model": state.settings.model_name, "usage": usage})

    return await in_thread(request, embed, cancelled.set) or gone()


# llama-server has these at its root, too; /completions and /embeddings are other things there
unprefixed = APIRouter(include_in_schema=False, route_class=BodyRoute)
unprefixed.get("/models")(models)
unprefixed.post("/chat/completions", response_model=None)(chat)
