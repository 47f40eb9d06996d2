"""Errors in OpenAI's shape, {"error": {"message", "type", "param", "code"}}, and in Anthropic's for its paths."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from lminf_edge.engine.engine import EngineClosedError
from lminf_edge.engine.request import RequestCancelled
from lminf_edge.errors import ModelError, UserError, wants_debug

log = logging.getLogger("lminf_edge.server")


class ErrorBody(BaseModel):
    """What went wrong, in one sentence, and where."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorBody


class ApiError(Exception):
    """An error response."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def body(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, Any]:
        """In Anthropic's shape."""
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def response(self, path: str) -> JSONResponse:
        """In the shape of the API that the path belongs to."""
        body = self.anthropic_body() if is_anthropic(path) else self.body()
        return JSONResponse(body, status_code=self.status, headers=self.headers)


def is_anthropic(path: str) -> bool:
    return path == "/v1/messages" or path.startswith("/v1/messages/")


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    431: "request_too_large",
    429: "rate_limit_error",
    501: "not_supported_error",
    503: "unavailable_error",
}

_ANTHROPIC_TYPES = {**_TYPES, 501: "api_error", 503: "overloaded_error"}


def shutting_down() -> ApiError:
    return ApiError(503, "The server is shutting down.", "shutting_down")


def engine_stopped() -> ApiError:
    return ApiError(503, "The engine has stopped: the server's log says why.", "engine_stopped")


def as_api_error(error: BaseException) -> ApiError:
    """The error response for a failure. A failure that is our bug is logged with its traceback."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ModelError):
        log.error("%s", error)
        return ApiError(500, str(error), "model_error")
    if isinstance(error, UserError):
        return ApiError(400, str(error) or "The request cannot be answered.")
    if isinstance(error, RequestCancelled):
        return shutting_down()
    if isinstance(error, EngineClosedError):
        return engine_stopped()
    log.error("a request could not be answered", exc_info=error)
    return _fault_of_ours(error)


def _fault_of_ours(error: BaseException) -> ApiError:
    what = f" ({type(error).__name__}: {' '.join(str(error).split())})" if wants_debug() else ""
    return ApiError(500, f"The request could not be answered: the server's log says why{what}.")


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response(request.url.path)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"There is nothing at {request.url.path}."
        elif error.status_code == 405:
            message = f"{request.url.path} does not take {request.method} requests."
        headers = dict(error.headers) if error.headers else None
        return ApiError(error.status_code, message, headers=headers).response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return invalid(error.errors()[0]).response(request.url.path)

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> JSONResponse:
        return as_api_error(error).response(request.url.path)

    @app.exception_handler(Exception)
    async def other_error(request: Request, error: Exception) -> JSONResponse:
        return _fault_of_ours(error).response(request.url.path)  # uvicorn logs it


_NOT_FIELDS = ("body", "query", "path", "int", "str", "float", "bool")


def invalid(problem: Mapping[str, Any]) -> ApiError:
    """The error for a pydantic validation error of a request's body."""
    if problem["type"] == "json_invalid":
        if "recursion" in problem["msg"]:
            return ApiError(400, "The body of the request is nested too deeply.", "invalid_json")
        return ApiError(400, "The body of the request is not JSON.", "invalid_json")
    # without the union members that pydantic tried, such as "constrained-int" or "list[str]"
    names = [str(part) for part in problem["loc"] if re.fullmatch(r"\w+", str(part)) and part not in _NOT_FIELDS]
    param = ".".join(names)[:200] or None
    what = problem["msg"].removeprefix("Value error, ")
    what = what[:1].lower() + what[1:]
    return ApiError(400, f"{param or 'The body of the request'}: {what.rstrip('.')}.", "invalid_value", param)
