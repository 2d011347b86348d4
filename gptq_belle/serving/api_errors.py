"""Errors in the format of OpenAI's API: ``{"error": {"message", "type", "param", "code"}}``."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gptq_belle.errors import GptqBelleError, HardwareError, UsageError, as_user_error

LOGGER = logging.getLogger("gptq_belle")
TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         405: "invalid_request_error", 413: "invalid_request_error", 429: "rate_limit_error"}
MAX_QUOTED = 200  # characters of an invalid value that are quoted in the message


class ApiError(Exception):
    """An error response.

    Args:
        status: HTTP status.
        message: the cause and the allowed values.
        param: name of the invalid field.
        code: machine-readable error code.
        headers: additional HTTP headers, such as Retry-After.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """Body of the response."""
        return {"error": {"message": self.message, "type": TYPES.get(self.status, "server_error"),
                          "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Build the HTTP response."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def from_exception(error: BaseException) -> ApiError:
    """Convert any exception to a response: usage errors keep their message, others are described in general terms."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UsageError):
        return ApiError(400, " ".join(str(error).split()))
    known = as_user_error(error)
    if isinstance(known, HardwareError):
        return ApiError(503, known.cause, code="out_of_memory", headers={"Retry-After": "5"})
    return ApiError(500, known.cause if isinstance(error, GptqBelleError) else "internal error")


def logged(message: str, error: Exception) -> ApiError:
    """Log an error with its traceback, and convert it to the response for all clients that it concerns."""
    LOGGER.error(message, exc_info=error)
    response = from_exception(error)
    response.__cause__ = error
    return response


def install(app: FastAPI) -> None:
    """Register handlers that convert every error of the application to this format."""
    @app.exception_handler(ApiError)
    async def handle_api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(GptqBelleError)
    async def handle_library_error(_: Request, error: GptqBelleError) -> JSONResponse:
        return from_exception(error).response()

    @app.exception_handler(RequestValidationError)
    async def handle_validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        return _from_validation(error).response()

    @app.exception_handler(HTTPException)
    async def handle_http_error(_: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    @app.exception_handler(Exception)
    async def handle_unexpected_error(_: Request, error: Exception) -> JSONResponse:
        return from_exception(error).response()


def _from_validation(error: RequestValidationError) -> ApiError:
    """Convert the first validation error, with the path of the field and the constraint."""
    first = error.errors()[0]
    path = ".".join(str(step) for step in first["loc"] if step != "body") or None
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    value = repr(first.get("input"))[:MAX_QUOTED]
    prefix = f"{path}: " if path else ""
    return ApiError(400, f"{prefix}{first['msg']} (got {value})", path, "invalid_value")
