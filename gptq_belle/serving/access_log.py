"""The log: one line per request, without its text, as plain text or JSON."""

import json
import logging
import re
import sys
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gptq_belle.serving.request_guard import Application, Receive, Scope, Send

if TYPE_CHECKING:
    from gptq_belle.serving.completion_choice import CompletionChoice

ACCESS = logging.getLogger("gptq_belle.access")
LOGGERS = ("gptq_belle", "uvicorn.error")
FORMATS = ("text", "json")
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
CLIENT_CLOSED = 499  # status in the log if the client has left before the response, as nginx writes it


@dataclass(slots=True)
class RequestNotes:
    """Data of a request that its route passes to the access log.

    Attributes:
        prompt_tokens: number of tokens of all prompts.
        choices: the answers.
    """

    prompt_tokens: int = 0
    choices: "list[CompletionChoice]" = field(default_factory=list)

    @property
    def fields(self) -> dict[str, Any]:
        """Tokens and times in seconds of a request with answers; empty for others."""
        if not self.choices:
            return {}
        answers = [choice.answer for choice in self.choices]
        known = {"queue_seconds": answers[0].queued, "first_token_seconds": answers[0].first}
        return {"prompt_tokens": self.prompt_tokens, "cached_tokens": answers[0].reused,
                "completion_tokens": sum(choice.count for choice in self.choices),
                **{name: round(value, 4) for name, value in known.items() if value is not None}}


class AccessLog:
    """ASGI middleware that gives every request an id, returns it as ``x-request-id``, and logs the request."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        name = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        notes = scope.setdefault("state", {})["notes"] = RequestNotes()
        start, status = time.perf_counter(), CLIENT_CLOSED

        async def with_id(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name)]
            await send(message)

        try:
            await self.app(scope, receive, with_id)
        except BaseException:
            status = 500 if status == CLIENT_CLOSED else status
            raise
        finally:
            fields = {"id": name.decode(), "method": scope["method"], "path": scope["path"][:200], "status": status,
                      "seconds": round(time.perf_counter() - start, 4), **notes.fields}
            ACCESS.info("request", extra={"fields": fields})


class TextFormatter(logging.Formatter):
    """``time LEVEL message key=value ...``"""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        return super().format(record) + "".join(f" {name}={_printable(value)}" for name, value in fields.items())


class JsonFormatter(logging.Formatter):
    """One JSON object a line; a traceback is in ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name,
                "message": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


def configure(log_format: str) -> None:
    """Write the log of this process to stderr in one of FORMATS."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else
                         TextFormatter("%(asctime)s %(levelname)s %(message)s"))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
    logging.getLogger("gptq_belle").setLevel(logging.INFO)


def _printable(value: Any) -> str:
    """A value on one line: a path may hold any character."""
    text = str(value)
    return text if text.isascii() and text.isprintable() and " " not in text else ascii(text)
