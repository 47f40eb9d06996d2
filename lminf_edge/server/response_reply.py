"""One response of OpenAI's Responses API: its events, its items, and what is stored of it."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterator
from typing import Any

from lminf_edge.engine.request import Request as EngineRequest
from lminf_edge.server.arguments import AskedChat, asked_chat
from lminf_edge.server.budget import Share
from lminf_edge.server.errors import ApiError, as_api_error
from lminf_edge.server.events import chat_events
from lminf_edge.server.replies import Reply
from lminf_edge.server.response_requests import (
    COMPACTIONS,
    TRIGGER,
    InputRequest,
    chat_of,
    check,
    compaction_threshold,
    items_of,
    sealed,
    split_compacted,
)
from lminf_edge.server.responses import chat_logprobs
from lminf_edge.server.state import ServerState
from lminf_edge.server.stored import Response as Stored
from lminf_edge.server.turns import Block, Step, check_path, count_prompt, steps
from lminf_edge.text.service import Exchange

PATH = "/v1/responses"
PREFIX = "resp_"
_ITEM = re.compile(r"[a-z]+_([0-9a-f]{32})[0-9a-f]*")  # of ours: it names its response
_PREFIXES = {"thoughts": "rs", "text": "msg", "call": "fc"}


def stored_name(response_id: str) -> str:
    """The name under which a response is stored."""
    return response_id.removeprefix(PREFIX)


class ResponseReply(Reply):
    """One response."""

    def __init__(self, state: ServerState, body: InputRequest, owner: str, share: Share) -> None:
        super().__init__()
        self._state, self._body, self._owner, self._share = state, body, owner, share
        self._name = uuid.uuid4().hex
        self._before: Stored | None = None  # what the request goes on from
        self._said: list[dict[str, Any]] = []  # all items until then
        self._new: list[dict[str, Any]] = []  # items that it adds
        self._threshold: int | None = None
        self._referred_to: dict[str, dict[Any, dict[str, Any]]] = {}  # items by id, of responses by name
        self._n_events = 0
        self._n_thoughts = 0  # tokens of their text, which may be more than those that were generated
        self._n_compacted = 0  # tokens of the prompt of the last compaction
        self._stores = getattr(body, "store", None) is not False
        self._seals = "reasoning.encrypted_content" in (getattr(body, "include", None) or [])
        self._logprobs: list[dict[str, Any]] = []  # of the item that is being made
        self.response: dict[str, Any] = self._blank()

    def _blank(self) -> dict[str, Any]:
        body = self._body
        return {
            "id": f"{PREFIX}{self._name}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": getattr(body, "max_output_tokens", None),
            "max_tool_calls": None,
            "metadata": getattr(body, "metadata", None) or {},
            "model": self._state.settings.model_name,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": None, "summary": None, **(body.reasoning or {})},
            "service_tier": "default",
            "store": self._stores,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}, **(body.text or {})},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": getattr(body, "top_logprobs", None) or 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": getattr(body, "user", None),
        }

    # --- the request --------------------------------------------------------------------------------------------------

    def prepare(self, exchange: Exchange) -> AskedChat:
        """Raises ApiError."""
        body = self._body
        check(body)
        given = items_of(body)
        self._threshold = compaction_threshold(body, given)
        compacted, new = split_compacted(given)
        self._new = [self._referred(item, f"input.{i}") for i, item in enumerate(new) if item.get("type") != TRIGGER]
        if compacted is not None:
            self._said = self._history(compacted, "input", "conversation that a compaction item stands for")
        elif body.previous_response_id is not None:
            param = "previous_response_id"
            self._said = self._history(
                body.previous_response_id, param, f"response {body.previous_response_id[:100]!r}"
            )
        if self._before is not None:
            self._n_compacted = self._before.n_compacted
        asked = asked_chat(self._state.service, chat_of(body, [*self._said, *self._new]), exchange.is_cancelled)
        self._state.log_messages(asked.messages)
        return asked

    def _history(self, response_id: str, param: str, what: str) -> list[dict[str, Any]]:
        """The items up to a stored response. Raises ApiError if it is not known."""
        stored = self._state.stored
        self._before = stored.get(stored_name(response_id).removeprefix("cmp_"), self._owner, self._share.take)
        check_path(self._before, PATH, param)
        history = stored.history(self._before, self._share.take) if self._before is not None else None
        if history is None:
            message = f"{param}: the server does not keep the {what}."
            raise ApiError(400, message, "previous_response_not_found", param)
        return history

    def _referred(self, item: dict[str, Any], where: str) -> dict[str, Any]:
        """The item itself, in place of a reference to it. Raises ApiError if it is not known."""
        if item.get("type") != "item_reference":
            return item
        item_id = str(item.get("id"))
        match = _ITEM.fullmatch(item_id)
        if match and match[1] not in self._referred_to:
            stored = self._state.stored.get(match[1], self._owner, self._share.take)
            self._referred_to[match[1]] = {each.get("id"): each for each in (stored.output if stored else [])}
        found = self._referred_to[match[1]].get(item_id) if match else None
        if found is None:
            raise ApiError(400, f"{where}: the server does not keep the item {item_id[:100]!r}.", param=where)
        return found

    # --- events -------------------------------------------------------------------------------------------------------

    def opening(self, request: EngineRequest | None) -> list[dict[str, Any]]:
        blank = {**self.response, "output": []}
        return [self._event(f"response.{kind}", response=blank) for kind in ("created", "in_progress")]

    def events(self, exchange: Exchange, asked: AskedChat) -> Iterator[dict[str, Any]]:
        try:
            yield from self._compaction_events(exchange, asked)
            if self._threshold == 0:
                yield self._ending(exchange, None)
                return
            for step in steps(chat_events(exchange, asked)):
                self.begin()
                if step.kind == "finish":
                    yield self._ending(exchange, step.event.finish_reason)
                else:
                    yield from self._step_events(step)
        except Exception as error:
            if not self._has_begun or self._put is None:
                raise
            failure = as_api_error(error)
            self.response["status"] = "failed"
            self.response["error"] = {"code": failure.code or "server_error", "message": failure.message}
            yield self._event("response.failed", response=self.response)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        event = {"type": kind, "sequence_number": self._n_events, **fields}
        self._n_events += 1
        return event

    def _step_events(self, step: Step) -> Iterator[dict[str, Any]]:
        output = self.response["output"]
        if step.kind == "begin":
            self._logprobs = []
            output.append(self._begun(step.block))
        at = {"item_id": output[-1]["id"], "output_index": len(output) - 1}
        if step.block.kind == "call":
            yield from self._call_events(step, output[-1], at)
        else:
            yield from self._text_events(step, output[-1], at)

    def _begun(self, block: Block) -> dict[str, Any]:
        item_id = self._item_id(_PREFIXES[block.kind])
        if block.kind == "thoughts":
            return {"id": item_id, "type": "reasoning", "summary": [], "content": [], "status": "in_progress"}
        if block.call is not None:
            call = {"call_id": block.call.id, "name": block.call.name, "arguments": ""}
            return {"id": item_id, "type": "function_call", **call, "status": "in_progress"}
        return {"id": item_id, "type": "message", "role": "assistant", "content": [], "status": "in_progress"}

    def _call_events(self, step: Step, item: dict[str, Any], at: dict[str, Any]) -> Iterator[dict[str, Any]]:
        kind = "response.function_call_arguments"
        if step.kind == "begin":
            yield self._event("response.output_item.added", output_index=at["output_index"], item=dict(item))
        elif step.kind == "delta":
            yield self._event(f"{kind}.delta", **at, delta=_text(step))
        else:
            item["arguments"] = step.block.text
            yield self._event(f"{kind}.done", **at, name=item["name"], arguments=step.block.text)
            yield self._item_done(step, item, at)

    def _text_events(self, step: Step, item: dict[str, Any], at: dict[str, Any]) -> Iterator[dict[str, Any]]:
        is_text = step.block.kind == "text"
        kind = "response.output_text" if is_text else "response.reasoning_text"
        where = {**at, "content_index": 0}
        if step.kind == "begin":
            yield self._event("response.output_item.added", output_index=at["output_index"], item=dict(item))
            yield self._event("response.content_part.added", **where, part=self._part(step.block))
        elif step.kind == "delta":
            entries = step.event.part.logprobs if step.event.part is not None else []
            logprobs = chat_logprobs(entries)["content"] if entries else []
            self._logprobs += logprobs
            more = {"logprobs": logprobs} if is_text else {}
            yield self._event(f"{kind}.delta", **where, delta=_text(step), **more)
        else:
            part = self._part(step.block)
            item["content"] = [part]
            if not is_text:
                self._n_thoughts += len(self._state.llm.tokenize(step.block.text.encode("utf-8"), add_bos=False))
                if self._seals:
                    item["encrypted_content"] = sealed(step.block.text)
            more = {"logprobs": self._logprobs} if is_text else {}
            yield self._event(f"{kind}.done", **where, text=step.block.text, **more)
            yield self._event("response.content_part.done", **where, part=part)
            yield self._item_done(step, item, at)

    def _part(self, block: Block) -> dict[str, Any]:
        if block.kind == "thoughts":
            return {"type": "reasoning_text", "text": block.text}
        return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": list(self._logprobs)}

    def _item_done(self, step: Step, item: dict[str, Any], at: dict[str, Any]) -> dict[str, Any]:
        item["status"] = "incomplete" if step.event.finish_reason == "length" else "completed"
        return self._event("response.output_item.done", output_index=at["output_index"], item=dict(item))

    def _item_id(self, prefix: str) -> str:
        return f"{prefix}_{self._name}{len(self.response['output']):02x}"

    def _ending(self, exchange: Exchange, reason: str | None) -> dict[str, Any]:
        """The last event; the response is stored before it is sent."""
        response, usage = self.response, exchange.usage
        is_cut = reason == "length"
        response["status"] = "incomplete" if is_cut else "completed"
        response["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        response["completed_at"] = None if is_cut else int(time.time())
        response["usage"] = {
            "input_tokens": usage.n_prompt,
            "input_tokens_details": {
                "cached_tokens": usage.n_cached,
                "cache_write_tokens": 0,
                "skipped_tokens": usage.n_skipped,
            },
            "output_tokens": usage.n_completion,
            "output_tokens_details": {"reasoning_tokens": min(self._n_thoughts, usage.n_completion)},
            "total_tokens": usage.n_prompt + usage.n_completion,
        }
        response["timings"], response["lminf"] = usage.timings(), exchange.stream_info()
        if self._stores:
            self._store(self._name, usage.n_prompt, self._n_compacted, response["output"], response)
        return self._event(f"response.{response['status']}", response=response)

    # --- storing ------------------------------------------------------------------------------------------------------

    def _store(
        self, name: str, n_tokens: int, n_compacted: int, output: list[dict[str, Any]], body: dict[str, Any] | None
    ) -> None:
        stored = Stored(
            name=name,
            owner=self._owner,
            parent=self._before.name if self._before is not None else "",
            n_tokens=n_tokens,
            n_compacted=n_compacted,
            input=self._new,
            output=[item for item in output if item["type"] not in COMPACTIONS],
            body=body,
            path=PATH,
        )
        self._state.stored.add(stored, self._said)

    def compact(self, exchange: Exchange, asked: AskedChat) -> dict[str, Any] | None:
        """An item that stands for all that was said until now; None if the client does not want one yet.

        Nothing is summarized: the item names what is kept here, and the client may leave that out from now on.
        """
        if self._threshold is None:
            return None
        n_tokens = count_prompt(exchange, asked)
        if n_tokens - self._n_compacted < self._threshold:
            return None
        self._n_compacted = n_tokens
        name = uuid.uuid4().hex
        self._store(name, n_tokens, n_tokens, [], None)
        return {"id": f"cmp_{name}", "type": "compaction", "encrypted_content": f"cmp_{name}"}

    def _compaction_events(self, exchange: Exchange, asked: AskedChat) -> Iterator[dict[str, Any]]:
        item = self.compact(exchange, asked)
        if item is not None:
            self.begin()
            self.response["output"].append(item)
            yield self._event("response.output_item.added", output_index=0, item=item)
            yield self._event("response.output_item.done", output_index=0, item=item)


def _text(step: Step) -> str:
    return step.event.part.text if step.event.part is not None else ""
