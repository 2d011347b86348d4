"""Errors in the format of OpenAI's API: ``{"error": {"message", "type", "param", "code"}}``."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gptq_belle.errors import GptqBelleError, HardwareError, UsageError, as_user_error

LOGGER = logging.getLogger("gptq_belle")
TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         405: "invalid_request_error", 413: "invalid_request_error", 415: "invalid_request_error",
         429: "rate_limit_error"}
MESSAGES = dict.fromkeys(("model_attributes_type", "model_type"), "Input should be a JSON object")  # for pydantic's
PATH, ADDRESS = re.compile(r"(?<![\w.])/(?:[^\s/'\":,]+/)+([^\s/'\":,]+)"), re.compile(r" at 0x[0-9a-fA-F]+")
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
        return ApiError(400, public_text(str(error)))
    if isinstance(as_user_error(error), HardwareError):
        return ApiError(503, "There is not enough memory for this request.", code="out_of_memory",
                        headers={"Retry-After": "5"})
    return ApiError(500, public_text(error.cause) if isinstance(error, GptqBelleError) else "internal error")


def public_text(text: str) -> str:
    """A message on one line, without memory addresses, and with the last part of each path only."""
    return ADDRESS.sub("", PATH.sub(r"\1", " ".join(text.split())))


def logged(message: str, error: Exception) -> ApiError:
    """Log an error with its traceback, and convert it to the response for all clients that it concerns."""
    LOGGER.error(message, exc_info=error)
    response = from_exception(error)
    response.__cause__ = error
    return response


def engine_stopped() -> ApiError:
    """The error for every request after the engine's thread has ended."""
    return ApiError(503, "The engine has stopped because of an error.", code="engine_stopped",
                    headers={"Retry-After": "5"})


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


def require_json(request: Request) -> None:
    """Dependency of routes with a body: reject other content types, such as that of `curl -d`.

    Raises:
        ApiError: 415 if the body is not declared as JSON.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    kind, _, name = media_type.partition("/")
    if kind != "application" or not (name == "json" or name.endswith("+json")):
        raise ApiError(415, f"the body has the content type {media_type[:MAX_QUOTED] or '(none)'}. Send it with the "
                       "header Content-Type: application/json.", code="unsupported_media_type")


JSON_BODY = [Depends(require_json)]  # dependencies of routes with a body


def _from_validation(error: RequestValidationError) -> ApiError:
    """Convert the first validation error, with the path of the field and the constraint."""
    errors = [each | {"msg": MESSAGES.get(each["type"], each["msg"])} for each in error.errors()]
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    if not isinstance(error.body, dict):
        return ApiError(400, "the body must be a JSON object with the fields of this request", code="invalid_value")
    first, path = _most_specific(errors, error.body)
    name = ".".join(map(str, path))
    value = repr(first.get("input"))[:MAX_QUOTED]
    return ApiError(400, f"{name}: {first['msg'].removeprefix('Value error, ')} (got {value})", name, "invalid_value")


def _most_specific(errors: Sequence[Any], body: Any) -> tuple[Any, list[str | int]]:
    """Select the error to report, and the path of its field.

    A field that allows several types has an error for each of them, whose location also contains pydantic's name for
    the type. The one that was found at the deepest place belongs to the type that the client meant. Among those,
    a violated limit says more than a wrong type.
    """
    whole, branches = _path(errors[0], body)
    if not branches:
        return errors[0], whole
    field = whole[:branches[0]]
    same = [(each, path) for each in errors if (path := _path(each, body)[0])[:len(field)] == field]
    deepest = max(len(path) for _, path in same)
    found = [(each, path) for each, path in same if len(path) == deepest]
    for each, path in found:
        if not each["type"].endswith("_type"):
            return each, path
    types = dict.fromkeys(each["msg"].removeprefix("Input should be ") for each, path in found if path == found[0][1])
    return found[0][0] | {"msg": "Input should be " + " or ".join(types)}, found[0][1]


def _path(error: Any, body: Any) -> tuple[list[str | int], list[int]]:
    """Keys and indices of an error's location, and the positions in it where names of types were left out."""
    path: list[str | int] = []
    branches = []
    value = body
    steps = error["loc"][1:]
    for number, step in enumerate(steps):
        missing = error["type"] == "missing" and number == len(steps) - 1
        if not missing and not (isinstance(value, dict) and step in value
                                or isinstance(value, list) and isinstance(step, int)):
            branches.append(len(path))
            continue
        path.append(step)
        value = None if missing else value[step]
    return path, branches
