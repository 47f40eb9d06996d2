"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException


class ErrorBody(BaseModel):
    """What went wrong, in one sentence, and where."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorBody


class ApiError(Exception):
    """An answer to the client that is no answer to its question."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


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


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    code: str | None = None,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(status, message, code, param), status_code=status, headers=headers)


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error_response(error.status, error.message, error.code, error.param)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"There is nothing at {request.url.path}."
        elif error.status_code == 405:
            message = f"{request.url.path} does not take {request.method} requests."
        headers = dict(error.headers) if error.headers else None
        return error_response(error.status_code, message, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(400, *_first_problem(error))

    @app.exception_handler(Exception)
    async def other_error(request: Request, error: Exception) -> JSONResponse:
        return error_response(500, "Something went wrong in the server: its log says what.")


_NOT_FIELDS = ("body", "query", "path", "int", "str", "float", "bool")


def _first_problem(error: RequestValidationError) -> tuple[str, str | None, str | None]:
    """Message, code and parameter of the first thing that is wrong with a request's body."""
    problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        return "The body of the request is not JSON.", "invalid_json", None
    # without the types that pydantic tried where there may be several, "constrained-int" or "list[str]"
    names = [str(part) for part in problem["loc"] if re.fullmatch(r"\w+", str(part)) and part not in _NOT_FIELDS]
    param = ".".join(names) or None
    what = problem["msg"].removeprefix("Value error, ")
    what = what[:1].lower() + what[1:]
    return f"{param or 'The body of the request'}: {what.rstrip('.')}.", "invalid_value", param
