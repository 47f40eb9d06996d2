"""Request bodies, parsed quickly and in little memory; long ones off the event loop."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from lminf_edge.server.budget import OBJECT_BYTES, SMALL, Share
from lminf_edge.server.errors import ApiError, invalid
from lminf_edge.server.state import ServerState
from lminf_edge.text.sizes import MAX_PARTS, has_more_parts

M = TypeVar("M", bound=BaseModel)

# the beginning of an object; within a string the quote would have a backslash, unless it ends the string
_OBJECT = re.compile(rb'\{\s*"')
_BOM = b"\xef\xbb\xbf"
# escapes of JSON text, in groups: a pair of surrogates, half of one, or any other
_ESCAPE = re.compile(rb"\\(?:(u[dD][89abAB]..\\u[dD][c-fC-F]..)|(u[dD][89a-fA-F]..)|.)", re.S)
# pydantic takes NaN, and 1e999 as infinity, where a field may be anything; how such a number looks with zeros as digits
_ZEROS = bytes.maketrans(b"123456789E", b"000000000e")
_MAYBE_ENDLESS = (b"NaN", b"Infinity", b"e000", b"e+000", b"0" * 300)


def parse(model: type[M], data: bytes, share: Share) -> M:
    """Parses and validates a request body. Raises ApiError if it is invalid, or too much for its bytes."""
    if has_more_parts(data):
        raise ApiError(
            413,
            f"The body of the request has more than {MAX_PARTS:,} objects, lists and texts: send fewer or longer "
            "messages, and leave out what is not needed.",
        )
    share.take(OBJECT_BYTES * sum(1 for _ in _OBJECT.finditer(data)))
    data = data.removeprefix(_BOM)
    parsed = _validated(model, data)
    zeros = data.translate(_ZEROS)
    if any(each in zeros for each in _MAYBE_ENDLESS):
        try:
            json.loads(data.decode("utf-8", "replace"), parse_float=_finite, parse_constant=_finite)
        except ValueError:
            raise ApiError(
                400, "The body of the request has a number that JSON does not have.", "invalid_json"
            ) from None
    return parsed


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(number)
    return value


def _validated(model: type[M], data: bytes) -> M:
    try:
        try:
            return model.model_validate_json(data)
        except ValidationError as error:
            if "escape" not in error.errors(include_url=False, include_input=False)[0]["msg"]:
                raise
            return model.model_validate_json(_ESCAPE.sub(_whole, data))
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_input=False)[0]) from None


def _whole(escape: re.Match[bytes]) -> bytes:
    r"""An escape as it is, or \ufffd for a lone surrogate, which could not be encoded again."""
    return rb"\ufffd" if escape[2] else escape[0]


class BodyRoute(APIRoute):
    """A route whose body is parsed as its pydantic model; long ones in a thread, one at a time.

    FastAPI takes the parsed model as it is; the OpenAPI document does not change.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        model = self.body_field.field_info.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)

        async def handle_parsed(request: Request) -> Response:
            data = await request.body() or b"{}"
            parsing = partial(parse, model, data, request.state.share)
            if len(data) <= SMALL:
                parsed = parsing()
            else:
                state = ServerState.of(request)
                async with state.parsing:
                    parsed = await asyncio.wrap_future(state.submit(parsing))
            return await handle(_Parsed(request, parsed))

        return handle_parsed


class _Parsed(Request):
    """A request whose JSON has become a model; its bytes are dropped.

    Whatever its Content-Type says: curl calls everything a form, and llama-server never looks.
    """

    def __init__(self, request: Request, model: BaseModel) -> None:
        headers = [each for each in request.scope["headers"] if each[0].lower() != b"content-type"]
        scope = {**request.scope, "headers": [*headers, (b"content-type", b"application/json")]}
        super().__init__(scope, request.receive)
        self._model = model

    async def body(self) -> bytes:
        return b"parsed"  # FastAPI asks for json() only where there is something

    async def json(self) -> Any:
        return self._model
