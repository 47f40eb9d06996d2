"""OpenAI's API, as its clients use it: models, chat, completions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from lminf_edge.completion import as_text, prompt_logprobs
from lminf_edge.engine.request import Request as EngineRequest
from lminf_edge.server.arguments import Asked, AskedChat, asked_chat, asked_completion, prompts_of
from lminf_edge.server.bodies import BodyRoute
from lminf_edge.server.errors import ApiError, ErrorResponse
from lminf_edge.server.events import Event, chat_events, text_events
from lminf_edge.server.requests import MAX_INPUTS, ChatRequest, CompletionRequest, Sampling
from lminf_edge.server.responses import (
    Echo,
    chat_answer,
    chat_chunks,
    completion_answer,
    completion_chunks,
    progress_chunk,
)
from lminf_edge.server.state import ServerState
from lminf_edge.server.streaming import EventStream, ProgressChunk, ProgressReporter, encoded, in_thread
from lminf_edge.text.chat import ChatPrompt
from lminf_edge.text.logprobs import LogprobReporter
from lminf_edge.text.service import Exchange

T = TypeVar("T")

MAX_ECHOED = 1 << 18  # log probabilities of a request's prompts: each takes some hundred bytes

# headers that name a conversation, besides prompt_cache_key in the body: ours, and Open WebUI's
CONVERSATION_HEADERS = ("X-Conversation-Id", "X-OpenWebUI-Chat-Id")

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=BodyRoute)

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 403, 408, 413, 431, 500, 501, 503)
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "the response, or its events", "content": {"application/json": {}, "text/event-stream": {}}},
    **PROBLEMS,
}


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The model, its window, and the context size, which is unlimited; in OpenAI's shape and in Anthropic's."""
    card = ServerState.of(request).model_card()
    pages = {"has_more": False, "first_id": card["id"], "last_id": card["id"]}
    return {"object": "list", "data": [card], **pages, "models": []}  # Codex: what it does not know from elsewhere


@router.get("/models/{name:path}", responses={404: {"model": ErrorResponse}})
async def model(request: Request, name: str) -> dict[str, Any]:
    card = ServerState.of(request).model_card()
    if name != card["id"]:
        raise ApiError(404, f"There is no model {name[:200]!r} here, only {card['id']!r}.", "model_not_found", "model")
    return card


async def respond(
    request: Request,
    body: Sampling,
    prepare: Callable[[Exchange], T],
    whole: Callable[[Exchange, T], Any],
    chunks: Callable[[Exchange, T], Iterator[dict[str, Any]]],
    done: str | None,
    progress: ProgressChunk = progress_chunk,
) -> Response:
    """One JSON response or, with `stream`, chunks and then `done`.

    `prepare` turns the request into what `whole` and `chunks` need; all three run in a worker thread.
    """
    events = EventStream(request, ping_seconds=body.sse_ping_interval) if body.stream else None
    on_progress = None
    if events is not None and body.return_progress:
        on_progress = ProgressReporter(events.put, progress)
    exchange = open_exchange(request, body, on_progress)
    if events is None:
        return await in_thread(request, lambda: encoded(whole(exchange, prepare(exchange))), exchange.cancel)
    return await events.respond(exchange, partial(prepare, exchange), partial(chunks, exchange), done)


def open_exchange(
    request: Request, body: Sampling, on_progress: Callable[[EngineRequest], None] | None = None
) -> Exchange:
    """The exchange that a request begins, with what all kinds of requests have in common."""
    ours = body.lminf
    return Exchange(
        ServerState.of(request).service,
        owner=request.state.owner,
        label=conversation_name(request, body.prompt_cache_key),
        pin_system=ours.pin_system if ours else None,
        prefill=ours.prefill if ours else None,
        recall=ours.recall if ours else None,
        slot=None if body.id_slot in (None, -1) else body.id_slot,
        reuses=body.cache_prompt is not False,
        on_progress=on_progress,
    )


def conversation_name(request: Request, prompt_cache_key: str | None = None) -> str:
    """The client's name for the conversation, "" if it gives none."""
    names = (prompt_cache_key, *(request.headers.get(header) for header in CONVERSATION_HEADERS))
    return next((name[:1024] for name in names if name), "")


@router.post("/chat/completions", response_model=None, responses=ANSWERS)
async def chat(request: Request, body: ChatRequest) -> Response:
    """A completion of a conversation of any length; its cached prefix is not processed again."""
    state = ServerState.of(request)
    name = state.settings.model_name
    usage = bool(body.stream_options and body.stream_options.include_usage)

    def prepare(exchange: Exchange) -> AskedChat:
        asked = asked_chat(state.service, body, exchange.is_cancelled)
        state.log_messages(asked.messages)
        return asked

    def whole(exchange: Exchange, asked: AskedChat) -> dict[str, Any]:
        answer = chat_answer(exchange, chat_events(exchange, asked), name)
        if body.verbose:
            tokens = exchange.chat_prompt(asked.messages, asked.options).tokens.tolist()
            text = state.llm.detokenize(tokens, special=True).decode("utf-8", errors="replace")
            answer["__verbose"] = {"prompt": text}
        return answer

    return await respond(
        request,
        body,
        prepare,
        whole,
        lambda exchange, asked: chat_chunks(exchange, chat_events(exchange, asked), name, usage),
        "[DONE]",
    )


@router.post("/completions", response_model=None, responses=ANSWERS)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """The continuation of a text of any length."""
    state = ServerState.of(request)
    service, name = state.service, state.settings.model_name
    usage = bool(body.stream_options and body.stream_options.include_usage)

    def prepare(exchange: Exchange) -> tuple[Asked, list[str | list[int]], list[ChatPrompt]]:
        asked = asked_completion(service, body)
        given = prompts_of(body.prompt, service.engine.model.n_vocab)
        if len(given) > MAX_INPUTS:
            raise ApiError(400, f"prompt: there may be {MAX_INPUTS} of them at most.", param="prompt")
        prompts = [exchange.text_prompt(each, body.suffix) for each in given]
        if body.echo and asked.n_top is not None:
            check_echo(sum(len(prompt.tokens) for prompt in prompts), asked.n_top)
        return asked, given, prompts

    def answered(
        exchange: Exchange, prepared: tuple[Asked, list[str | list[int]], list[ChatPrompt]]
    ) -> tuple[Iterator[Event], list[Echo]]:
        asked, given, prompts = prepared
        echoed: list[Echo] = []
        for each, prompt in zip(given, prompts, strict=True):
            echoed += [echo(exchange, each, prompt, asked.n_top) if body.echo else ("", [])] * asked.n
        offset = 0 if body.echo else len(given[0])
        return text_events(exchange, asked, prompts, offset), echoed

    return await respond(
        request,
        body,
        prepare,
        lambda exchange, prepared: completion_answer(exchange, *answered(exchange, prepared), name),
        lambda exchange, prepared: completion_chunks(exchange, *answered(exchange, prepared), name, usage),
        "[DONE]",
    )


def echo(exchange: Exchange, given: str | list[int], prompt: ChatPrompt, n_top: int | None) -> Echo:
    """A prompt as text, and the log probabilities of its tokens if requested."""
    llm = exchange.service.llm
    text = as_text(llm, given)
    if n_top is None:
        return text, []
    reporter = LogprobReporter(llm, n_top, 0)
    return text, prompt_logprobs(llm, exchange.prompt_logits(prompt.tokens), reporter, exchange.is_cancelled)


def check_echo(n_tokens: int, n_top: int) -> None:
    """Raises ApiError for more log probabilities of a prompt than should be held at a time."""
    if n_tokens * (1 + n_top) > MAX_ECHOED:
        most = MAX_ECHOED // (1 + n_top)
        what = f"logprobs: with echo and {n_top} of them, a prompt may have {most:,} tokens, not {n_tokens:,}"
        raise ApiError(400, f"{what}: send it in parts.", param="logprobs")


# llama-server has these at its root, too; /completions and /embeddings are other things there
unprefixed = APIRouter(include_in_schema=False, route_class=BodyRoute)
unprefixed.get("/models")(models)
unprefixed.post("/chat/completions", response_model=None)(chat)
