"""OpenAI's Responses API, as its SDKs and Codex use it."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

from lminf_edge.server.bodies import BodyRoute
from lminf_edge.server.errors import ApiError, ErrorResponse
from lminf_edge.server.openai_routes import ANSWERS, PROBLEMS
from lminf_edge.server.replies import respond, respond_count
from lminf_edge.server.response_reply import PREFIX, ResponseReply, stored_name
from lminf_edge.server.response_requests import InputRequest, ResponsesRequest
from lminf_edge.server.state import ServerState
from lminf_edge.server.stored import Response as Stored
from lminf_edge.server.streaming import Wire, encoded, in_thread

NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": ErrorResponse}, **PROBLEMS}


def _failed(error: ApiError, last: int | None) -> dict[str, Any]:
    """An error that ends a stream, as the event after that with the sequence number `last`."""
    inner = error.body()["error"]
    flat = {name: inner[name] for name in ("code", "message", "param")}
    return {"type": "error", "sequence_number": 0 if last is None else last + 1, **flat, "error": inner}


WIRE = Wire(error=_failed, is_typed=True)

router = APIRouter(prefix="/v1/responses", tags=["OpenAI"], route_class=BodyRoute)


@router.post("", response_model=None, responses=ANSWERS)
async def create(request: Request, body: ResponsesRequest) -> Response:
    """A response in a conversation of any length; its cached prefix is not processed again."""
    reply = ResponseReply(ServerState.of(request), body, request.state.owner, request.state.share)
    return await respond(request, body, reply, reply.prepare, reply.events, lambda: reply.response, WIRE)


@router.post("/input_tokens", response_model=None, responses=PROBLEMS)
async def input_tokens(request: Request, body: InputRequest) -> Response:
    """Tokens of the prompt that an input is."""
    reply = ResponseReply(ServerState.of(request), body, request.state.owner, request.state.share)

    def told(n_tokens: int) -> dict[str, Any]:
        return {"object": "response.input_tokens", "input_tokens": n_tokens}

    return await respond_count(request, body, reply, reply.prepare, told)


@router.post("/compact", response_model=None, responses=PROBLEMS)
async def compact(request: Request, body: InputRequest) -> Response:
    """An item that stands for a whole conversation."""
    trigger = [{"type": "compaction_trigger"}]
    given = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else list(body.input or [])
    reply = ResponseReply(
        ServerState.of(request),
        body.model_copy(update={"input": [*given, *trigger]}),
        request.state.owner,
        request.state.share,
    )
    exchange = reply.open_exchange(request, body, None)

    def work() -> Response:
        item = reply.compact(exchange, reply.prepare(exchange))
        details = {"input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0}}
        usage = {"input_tokens": 0, **details, "output_tokens": 0, "total_tokens": 0}
        usage["output_tokens_details"] = {"reasoning_tokens": 0}
        return encoded(
            {
                "id": f"{PREFIX}{uuid.uuid4().hex}",
                "object": "response.compaction",
                "created_at": int(time.time()),
                "output": [item],
                "usage": usage,
            }
        )

    return await in_thread(request, work, exchange.cancel)


def _known(request: Request, response_id: str) -> Stored:
    """Raises ApiError if the client's key has no such response."""
    stored = ServerState.of(request).stored.get(stored_name(response_id), request.state.owner, request.state.share.take)
    if stored is None or stored.body is None:
        raise _unknown(response_id)
    return stored


def _unknown(response_id: str) -> ApiError:
    return ApiError(404, f"There is no response {response_id[:100]!r}.", "response_not_found", "response_id")


@router.get("/{response_id}", response_model=None, responses=NOT_FOUND)
async def retrieve(request: Request, response_id: str, stream: bool = False) -> Response:
    """A stored response."""
    if stream:
        raise ApiError(400, "stream: a response is streamed only while it is made.", param="stream")
    return await in_thread(request, lambda: encoded(_known(request, response_id).body))


@router.get("/{response_id}/input_items", response_model=None, responses=NOT_FOUND)
async def input_items(
    request: Request,
    response_id: str,
    after: str | None = None,
    limit: Annotated[int | None, Query(ge=1, description="all if not given")] = None,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """What the request of a stored response added to the conversation, the newest first unless `order` is asc."""

    def work() -> Response:
        stored = _known(request, response_id)
        items = [_listed(item, f"in_{stored.name}{i:02x}") for i, item in enumerate(stored.input)]
        if order == "desc":
            items.reverse()
        if after is not None:
            before = next((i for i, item in enumerate(items) if item["id"] == after), None)
            if before is None:
                raise ApiError(400, f"after: the response has no input item {after[:100]!r}.", param="after")
            items = items[before + 1 :]
        page = items[:limit]
        ids = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": "", "last_id": ""}
        return encoded({"object": "list", "data": page, "has_more": len(items) > len(page), **ids})

    return await in_thread(request, work)


def _listed(item: dict[str, Any], item_id: str) -> dict[str, Any]:
    """An input item as lists have it: with an id and a type, and the text of a message as a part."""
    listed = {"id": item_id, "type": "message", **item}
    content = listed.get("content")
    if listed["type"] == "message" and isinstance(content, str):
        kind = "output_text" if listed.get("role") == "assistant" else "input_text"
        listed["content"] = [{"type": kind, "text": content}]
    return listed


@router.delete("/{response_id}", response_model=None, responses=NOT_FOUND)
async def delete(request: Request, response_id: str) -> Response:
    """Deletes a stored response; later ones of the conversation keep what they need of it."""

    def work() -> Response:
        _known(request, response_id)
        if not ServerState.of(request).stored.delete(stored_name(response_id), request.state.owner):
            raise _unknown(response_id)
        return encoded({"id": response_id, "object": "response", "deleted": True})

    return await in_thread(request, work)


@router.post("/{response_id}/cancel", response_model=None, responses=NOT_FOUND)
async def cancel(request: Request, response_id: str) -> Response:
    """Only responses in the background could be cancelled, and there are none."""
    await in_thread(request, lambda: encoded(_known(request, response_id).name))
    raise ApiError(400, "Only background responses can be cancelled: hang up to cancel others.", param="response_id")


# llama-server has these at its root, too
unprefixed = APIRouter(include_in_schema=False, route_class=BodyRoute)
unprefixed.post("/responses", response_model=None)(create)
unprefixed.post("/responses/input_tokens", response_model=None)(input_tokens)
