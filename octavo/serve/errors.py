"""Every error in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from octavo.engine.async_request import Draining, EngineFailure, QueueFull, TimedOut
from octavo.errors import OctavoError, RequestError

RETRY_AFTER = 2  # seconds; what a short answer takes
_MAX_MESSAGE = 1000  # characters; a body may hold megabytes, and its error should not


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """OpenAI's envelope of an error."""

    error: ErrorBody


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: of HTTP.
        message: one line for the client's user.
        param: the field at fault.
        code: a word for programs.
        headers: such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        # A lone surrogate, which JSON can carry and UTF-8 cannot, would break the answer.
        line = " ".join(message.encode("utf-8", "replace").decode().split())
        if len(line) > _MAX_MESSAGE:
            line = line[:_MAX_MESSAGE] + "…"
        self.body = ErrorResponse(
            error=ErrorBody(message=line, type=_type(status), param=param, code=code)
        )

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


def _type(status: int) -> str:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error, whatever it is; unforeseen ones keep their reason."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=_leading_field(str(error)))
    if isinstance(error, QueueFull):
        return ApiError(
            429, str(error), code="queue_full", headers={"Retry-After": str(RETRY_AFTER)}
        )
    if isinstance(error, Draining):
        return unavailable(str(error))
    if isinstance(error, TimedOut):
        return ApiError(504, str(error), code="timeout")
    if isinstance(error, (EngineFailure, OctavoError)):
        return ApiError(500, str(error), code="engine_error")
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def unavailable(message: str) -> ApiError:
    """503: loading, or shutting down."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": str(RETRY_AFTER)})


def add_handlers(app: FastAPI) -> None:
    """Give every error of the app OpenAI's shape."""

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        content_type = request.headers.get("content-type")
        return _validation_error(error.errors(), content_type).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"{request.url.path}: no such address; /docs lists them"
        elif error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}"
        code = "body_too_large" if error.status_code == 413 else None
        return ApiError(error.status_code, message, code=code, headers=error.headers).response()

    @app.exception_handler(ApiError)
    @app.exception_handler(OctavoError)
    @app.exception_handler(Exception)
    async def _any(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()


def _validation_error(problems: Sequence[Any], content_type: str | None) -> ApiError:
    """A body that does not fit its model: the first field at fault, and what it may be."""
    # Of a union's branches, the one that came furthest is the one that was meant.
    first = max(problems, key=lambda problem: len(problem["loc"]))
    if first["type"] == "json_invalid":
        where = f"at byte {first['loc'][-1]}: {first.get('ctx', {}).get('error', '')}"
        return ApiError(400, f"the body is not JSON {where}", code="invalid_json")
    if first["type"] in ("missing", "model_attributes_type") and first["loc"] == ("body",):
        return ApiError(400, _no_object(first["input"], content_type), code="invalid_json")
    param = _param(first["loc"])
    # The branches of a union complain one by one, each of the same field.
    reasons = dict.fromkeys(p["msg"] for p in problems if _param(p["loc"]) == param)
    message = ", or ".join(reason.removeprefix("Value error, ") for reason in reasons)
    if param is None:  # of the body as a whole: fields that do not go together
        return ApiError(400, message, param=_leading_field(message))
    return ApiError(400, f"{param}: {message}", param=param)


def _no_object(body: object, content_type: str | None) -> str:
    """Why there are no fields to read: FastAPI leaves bytes that are not said to be JSON alone."""
    if isinstance(body, bytes):
        return f"the Content-Type is {content_type or 'missing'}; send application/json"
    found = "empty" if body is None else type(body).__name__
    return f"the body must be a JSON object, not {found}"


def _param(location: Sequence[str | int]) -> str | None:
    """`messages[0].content`: a field's place in the body, without pydantic's names of types."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif re.fullmatch(r"[a-z_]+", part) and part not in ("body", "str", "int", "float", "bool"):
            path += f".{part}" if path else part
    return path or None


def _leading_field(message: str) -> str | None:
    """`top_p` of "top_p must be above 0": octavo's errors begin with the field at fault."""
    match = re.match(r"([\w-]+(?:\.\w+|\[\d+\])*)(?::| must| \d)", message)
    return re.sub(r"\.(\d+)", r"[\1]", match[1]) if match else None


# For the routes' documentation; that there is one for 4XX keeps FastAPI from adding its own 422.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request's fault."},
    "5XX": {"model": ErrorResponse, "description": "The server's fault, or not now."},
}
