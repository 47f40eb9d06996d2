"""Anthropic's Messages API, as its SDKs and Claude Code use it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from lminf_edge.engine.request import Request as EngineRequest
from lminf_edge.server.arguments import AskedChat, asked_chat
from lminf_edge.server.bodies import BodyRoute
from lminf_edge.server.budget import Share
from lminf_edge.server.errors import ApiError
from lminf_edge.server.events import chat_events
from lminf_edge.server.messages_requests import (
    CountRequest,
    MessagesRequest,
    chat_of,
    compaction_of,
    split_compacted,
)
from lminf_edge.server.replies import Reply, respond, respond_count
from lminf_edge.server.state import ServerState
from lminf_edge.server.stored import Response as Stored
from lminf_edge.server.stored import names_in
from lminf_edge.server.streaming import Wire
from lminf_edge.server.turns import Block, Step, check_path, count_prompt, found_stop, steps
from lminf_edge.text.service import Exchange

WIRE = Wire(
    error=lambda error, _: error.anthropic_body(), is_typed=True, keep_alive=b'event: ping\ndata: {"type":"ping"}\n\n'
)

_COMPACTED = "The server keeps the conversation so far, under this name: "
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class AnthropicError(BaseModel):
    type: str
    message: str


class AnthropicErrorResponse(BaseModel):
    """An error in Anthropic's shape."""

    type: str
    error: AnthropicError


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": AnthropicErrorResponse} for status in (400, 401, 403, 408, 413, 431, 500, 503)
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "the message, or its events", "content": {"application/json": {}, "text/event-stream": {}}},
    **PROBLEMS,
}

PATH = "/v1/messages"

router = APIRouter(prefix=PATH, tags=["Anthropic"], route_class=BodyRoute)


@router.post("", response_model=None, responses=ANSWERS)
async def messages(request: Request, body: MessagesRequest) -> Response:
    """A message of a conversation of any length; its cached prefix is not processed again."""
    reply = MessageReply(ServerState.of(request), body, request.state.owner, request.state.share)
    return await respond(request, body, reply, reply.prepare, reply.events, lambda: reply.message, WIRE)


@router.post("/count_tokens", response_model=None, responses=PROBLEMS)
async def count_tokens(request: Request, body: CountRequest) -> Response:
    """Tokens of the prompt that these messages are."""
    reply = MessageReply(ServerState.of(request), body, request.state.owner, request.state.share)

    def told(n_tokens: int) -> dict[str, Any]:
        managed = {"context_management": {"original_input_tokens": n_tokens}} if body.context_management else {}
        return {"input_tokens": n_tokens, **managed}

    return await respond_count(request, body, reply, reply.prepare, told)


class MessageReply(Reply):
    """One message."""

    def __init__(self, state: ServerState, body: CountRequest, owner: str, share: Share) -> None:
        super().__init__()
        self._state, self._body, self._owner, self._share = state, body, owner, share
        self._stops = list(getattr(body, "stop_sequences", None) or [])
        self._compacted: dict[str, Any] | None = None  # the block that stands for all messages so far
        self._before: Stored | None = None  # of the last compaction
        self._new: list[dict[str, Any]] = []  # messages after it
        self.message: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": state.settings.model_name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(0, 0, 0),
        }
        if body.context_management is not None:
            self.message["context_management"] = {"applied_edits": []}

    def prepare(self, exchange: Exchange) -> AskedChat:
        """Raises ApiError."""
        name, self._new = split_compacted(self._body.messages)
        history = self._history(name) if name is not None else []
        asked = asked_chat(self._state.service, chat_of(self._body, [*history, *self._new]), exchange.is_cancelled)
        self._state.log_messages(asked.messages)
        return asked

    def _history(self, text: str) -> list[dict[str, Any]]:
        """The messages that a compaction block stands for. Raises ApiError if they are not known."""
        stored = self._state.stored
        self._before = next(
            filter(None, (stored.get(name, self._owner, self._share.take) for name in names_in(text))), None
        )
        check_path(self._before, PATH, "messages")
        history = stored.history(self._before, self._share.take) if self._before is not None else None
        if history is None:
            message = "messages: the server does not keep the conversation that a compaction block stands for."
            raise ApiError(400, message, param="messages")
        return history

    def opening(self, request: EngineRequest | None) -> list[dict[str, Any]]:
        if request is not None:
            self.message["usage"] = _usage(len(request.prompt), request.stats.n_cached, 0)
        return [{"type": "message_start", "message": {**self.message, "content": []}}]

    def events(self, exchange: Exchange, asked: AskedChat) -> Iterator[dict[str, Any]]:
        if self._compact(exchange, asked):
            yield from self._compaction_events()
            if self.message["stop_reason"] is not None:
                yield from self._ending(exchange)
                return
        for step in steps(chat_events(exchange, asked)):
            self.begin()
            yield from self._step_events(exchange, step)

    def _step_events(self, exchange: Exchange, step: Step) -> Iterator[dict[str, Any]]:
        content = self.message["content"]
        if step.kind == "begin":
            content.append(_begun(step.block))
            yield {"type": "content_block_start", "index": len(content) - 1, "content_block": dict(content[-1])}
        elif step.kind == "delta":
            text = step.event.part.text if step.event.part is not None else ""
            yield {"type": "content_block_delta", "index": len(content) - 1, "delta": _delta(step.block, text)}
        elif step.kind == "end":
            _finish(content[-1], step.block)
            if step.block.kind == "thoughts":  # clients send it back; there is nothing to be signed
                delta = {"type": "signature_delta", "signature": content[-1]["signature"]}
                yield {"type": "content_block_delta", "index": len(content) - 1, "delta": delta}
            yield {"type": "content_block_stop", "index": len(content) - 1}
        else:
            reason = _REASONS.get(step.event.finish_reason or "", "end_turn")
            stop = found_stop(exchange, step.event.answer, self._stops) if reason == "end_turn" else None
            self.message["stop_reason"] = "stop_sequence" if stop is not None else reason
            self.message["stop_sequence"] = stop
            yield from self._ending(exchange)

    def _ending(self, exchange: Exchange) -> Iterator[dict[str, Any]]:
        usage, message = exchange.usage, self.message
        if usage.n_prompt:
            message["usage"] = _usage(usage.n_prompt, usage.n_cached, usage.n_completion)
        message["lminf"] = exchange.stream_info()
        delta = {name: message[name] for name in ("stop_reason", "stop_sequence")}
        managed = {name: message[name] for name in ("context_management",) if name in message}
        yield {"type": "message_delta", "delta": delta, "usage": message["usage"], **managed, "lminf": message["lminf"]}
        yield {"type": "message_stop"}

    # --- compaction ---------------------------------------------------------------------------------------------------

    def _compact(self, exchange: Exchange, asked: AskedChat) -> bool:
        """Whether the conversation is long enough to be compacted as the client wants it.

        Then it gets a block that names all that was said, and may leave that out from now on. Nothing else changes.
        """
        wanted = compaction_of(self._body)
        if wanted is None:
            return False
        n_tokens = count_prompt(exchange, asked)
        before = self._before
        if n_tokens - (before.n_tokens if before is not None else 0) < wanted.threshold:
            return False
        stored = Stored(
            owner=self._owner,
            parent=before.name if before is not None else "",
            n_tokens=n_tokens,
            n_compacted=n_tokens,
            input=self._new,
            output=[],
            body=None,
            path=PATH,
        )
        self._state.stored.add(stored)
        self._compacted = {
            "type": "compaction",
            "content": f"{_COMPACTED}{stored.name}",
            "encrypted_content": stored.name,
        }
        self.message["usage"] = _usage(n_tokens, 0, 0)
        if wanted.pauses:
            self.message["stop_reason"] = "compaction"
        return True

    def _compaction_events(self) -> Iterator[dict[str, Any]]:
        assert self._compacted is not None
        self.begin()
        self.message["content"].append(self._compacted)
        begun = {**self._compacted, "content": None, "encrypted_content": None}
        fields = {name: self._compacted[name] for name in ("content", "encrypted_content")}
        yield {"type": "content_block_start", "index": 0, "content_block": begun}
        yield {"type": "content_block_delta", "index": 0, "delta": {"type": "compaction_delta", **fields}}
        yield {"type": "content_block_stop", "index": 0}


def _usage(n_prompt: int, n_cached: int, n_completion: int) -> dict[str, int]:
    """Anthropic's input_tokens are those that were not in the cache."""
    return {
        "input_tokens": n_prompt - n_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": n_cached,
        "output_tokens": n_completion,
    }


def _begun(block: Block) -> dict[str, Any]:
    if block.kind == "thoughts":
        return {"type": "thinking", "thinking": "", "signature": ""}
    if block.call is not None:
        return {"type": "tool_use", "id": _call_id(block.call.id), "name": block.call.name, "input": {}}
    return {"type": "text", "text": ""}


def _delta(block: Block, text: str) -> dict[str, str]:
    if block.kind == "thoughts":
        return {"type": "thinking_delta", "thinking": text}
    if block.kind == "call":
        return {"type": "input_json_delta", "partial_json": text}
    return {"type": "text_delta", "text": text}


def _finish(content: dict[str, Any], block: Block) -> None:
    if block.kind == "thoughts":
        content["thinking"], content["signature"] = block.text, "none"
    elif block.kind == "call":
        try:
            value = json.loads(block.text or "{}")
        except ValueError:  # cut short by the token limit
            value = {}
        content["input"] = value if isinstance(value, dict) else {}
    else:
        content["text"] = block.text


def _call_id(call_id: str) -> str:
    return f"toolu_{call_id.removeprefix('call_')}"
