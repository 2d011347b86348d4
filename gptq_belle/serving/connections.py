"""Connections: limits of size and time for requests that arrive, of responses that nobody reads, and of their number.

uvicorn limits only the time between two requests. Without more limits, clients that send half a request, or none, use
up the file descriptors, and nobody else can connect.
"""

import json
import os
import resource
from asyncio import TimerHandle
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gptq_belle.serving.api_errors import ApiError

SPARE_FILES = 16  # descriptors that are left for the program itself
MIN_CONNECTIONS = 8


@dataclass(slots=True)
class Connections:
    """The open connections of one server, and their limits.

    Attributes:
        limit: number of connections; one more closes that without a request that waits the longest.
        head_bytes: size of the request line and headers.
        head_seconds, body_seconds: time for these to arrive.
        stall_seconds: time without reading for a client whose response does not fit into the buffers.
        keep_alive: seconds between two requests; longer than the 60 s of nginx's upstream connections, so that it is
            not this server that closes them.
        waiting: connections without a complete request, in the order in which they began to wait.
    """

    limit: int
    head_bytes: int = 64 << 10
    head_seconds: float = 10.0
    body_seconds: float = 60.0
    stall_seconds: float = 60.0
    keep_alive: int = 65
    waiting: dict["GuardedProtocol", None] = field(default_factory=dict)


def available_connections() -> int:
    """Number of connections that the limit of file descriptors of this process allows."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(most - len(os.listdir("/dev/fd")) - SPARE_FILES, MIN_CONNECTIONS)


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with the limits of `Connections`."""

    def __init__(self, limits: Connections, **options: Any) -> None:
        super().__init__(**options)
        self.limits = limits
        self._deadline: TimerHandle | None = None  # for the request that is arriving
        self._stalled: TimerHandle | None = None
        self._head_bytes = self._unparsed = 0
        self._in_head, self._refused = True, False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > self.limits.limit:
            next(iter(self.limits.waiting)).transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio: forget the connection and its deadlines."""
        self.limits.waiting.pop(self, None)
        self._set_deadline(None)
        if self._stalled is not None:
            self._stalled.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio: parse the bytes, and refuse a head that grows beyond its limit."""
        self._unparsed += len(data)
        super().data_received(data)
        if self._in_head and self._unparsed > self.limits.head_bytes:
            self._refuse_head()
        elif self._deadline is None and not self._is_busy:  # such as empty lines between two requests
            self._set_deadline(self.limits.head_seconds)

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "this is not a valid HTTP request", code="invalid_http"))

    def on_message_begin(self) -> None:
        """Called by the parser: the head of a request begins, and has a deadline."""
        super().on_message_begin()
        self._head_bytes, self._in_head = 0, True
        self.limits.waiting.setdefault(self)
        if self._deadline is None:
            self._set_deadline(self.limits.head_seconds)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._head_bytes += len(name) + len(value)

    def on_headers_complete(self) -> None:
        """Called by the parser: refuse a head that is too long, else begin the request."""
        self._in_head, self._unparsed = False, 0
        if self._head_bytes > self.limits.head_bytes:
            self._refuse_head()
            return
        self.limits.waiting.pop(self, None)
        self._set_deadline(self.limits.body_seconds)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._set_deadline(None)
        self._unparsed = 0
        if not self._refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_busy and not self.transport.is_closing():
            self.limits.waiting.setdefault(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self.limits.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    @property
    def _is_busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self.limits.waiting.setdefault(self)
        self._set_deadline(self.limits.head_seconds)

    def _set_deadline(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        """Close a connection whose request did not arrive in time."""
        self._deadline = None
        if self._is_busy and self.cycle.response_started or not self._unparsed and self._in_head:
            self.transport.close()
        else:
            self._refuse(ApiError(408, "the request did not arrive in time", code="request_timeout"))

    def _refuse_head(self) -> None:
        self._refuse(ApiError(431, f"the request line and headers are larger than {self.limits.head_bytes} bytes",
                              code="headers_too_large"))

    def _refuse(self, error: ApiError) -> None:
        """Answer without the application, and close the connection."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        body = json.dumps(error.body).encode()
        head = (f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n")
        self.transport.write(head.encode() + body)
        self.transport.close()
