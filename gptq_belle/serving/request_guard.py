"""ASGI middleware that checks every request: API key, host, body size and number of open requests."""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException

from gptq_belle.serving.api_errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
PUBLIC_PATHS = ("/", "/health")  # for load balancers; the page contains no secrets
PUBLIC_PREFIX = "/static/"
METRICS_PATH = "/metrics"
MAX_VALUES = 1 << 17  # in a body, by its commas: JSON is read in the event loop, 2 million values in 0.8 s
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})


@dataclass(frozen=True, slots=True)
class Access:
    """Who may use a server.

    Attributes:
        keys: clients must send one of these as ``Authorization: Bearer KEY``; none for no authentication.
        metrics_key: the only key for /metrics; None for `keys`.
        local_only: accept only requests whose Host header is loopback. Otherwise a web page whose domain resolves to
            127.0.0.1 (DNS rebinding) could use a server without a key.
        origins: origins of web pages of other hosts that may use the server (CORS); "*" for all.
    """

    keys: tuple[str, ...] = ()
    metrics_key: str | None = None
    local_only: bool = True
    origins: tuple[str, ...] = ()

    def keys_for(self, path: str) -> tuple[str, ...]:
        """The keys of a path."""
        return (self.metrics_key,) if path == METRICS_PATH and self.metrics_key is not None else self.keys


class RequestGuard:
    """Middleware that rejects requests with a wrong key, a foreign host or a too large body.

    Args:
        app: the application that handles accepted requests.
        max_bytes: maximum size of a body.
        max_requests: maximum number of open requests.
    """

    def __init__(self, app: Application, *, access: Access, max_bytes: int, max_requests: int) -> None:
        self.app, self.access, self.max_bytes, self.max_requests = app, access, max_bytes, max_requests
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        public = scope["path"] in PUBLIC_PATHS or scope["path"].startswith(PUBLIC_PREFIX)
        if (refusal := self._refusal(headers, scope["path"], public)) is not None:
            await refusal.response()(scope, receive, send)
            return
        self._running += not public
        try:
            await self.app(scope, self._counted(receive), send)
        finally:
            self._running -= not public

    def _refusal(self, headers: dict[bytes, bytes], path: str, public: bool) -> ApiError | None:
        if self.access.local_only and _host(headers) not in LOOPBACK:
            return ApiError(403, "this server accepts only the host localhost; start it with --api-key to allow others")
        if not public and not _is_authorized(headers.get(b"authorization", b""), self.access.keys_for(path)):
            return ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key",
                            headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_bytes:
            return self._too_large()
        if not public and self._running >= self.max_requests:
            return ApiError(429, f"{self._running} requests are already open (limit {self.max_requests})",
                            code="too_many_requests", headers={"Retry-After": "1"})
        return None

    def _counted(self, receive: Receive) -> Receive:
        """Wrap `receive` to limit the number of values, and the size of bodies without a Content-Length."""
        received = values = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal received, values
            message = await receive()
            received += len(message.get("body", b""))
            values += message.get("body", b"").count(b",")
            if received > self.max_bytes or values > MAX_VALUES:
                refusal = self._too_large()
                raise HTTPException(refusal.status, refusal.message)  # the only exception that body parsing passes on
            return message

        return counted

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.max_bytes} bytes or {MAX_VALUES} values",
                        code="body_too_large")


def _is_authorized(header: bytes, keys: tuple[str, ...]) -> bool:
    """Check the Authorization header, with all keys and in constant time: the time reveals nothing about them."""
    scheme, _, given = header.partition(b" ")
    found = [hmac.compare_digest(given.strip(), key.encode()) for key in keys]
    return not keys or (scheme.lower() == b"bearer" and any(found))


def _host(headers: dict[bytes, bytes]) -> str:
    """Host of a request without the port."""
    host = headers.get(b"host", b"").decode("latin-1").lower()
    return host.rsplit(":", 1)[0] if not host.endswith("]") and ":" in host else host
