"""ASGI middleware that checks every request: API key, host, body size and number of open requests."""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import HTTPException

from gptq_belle.serving.api_errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
PUBLIC_PATHS = ("/", "/health")  # for load balancers; the page contains no secrets
PUBLIC_PREFIX = "/static/"
MAX_VALUES = 1 << 17  # in a body, by its commas: JSON is read in the event loop, 2 million values in 0.8 s
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})


class RequestGuard:
    """Middleware that rejects requests with a wrong key, a foreign host or a too large body.

    Args:
        app: the application that handles accepted requests.
        api_key: key that clients must send as ``Authorization: Bearer KEY``; None for no authentication.
        max_bytes: maximum size of a body.
        max_requests: maximum number of open requests.
        local_only: accept only requests whose Host header is loopback. Otherwise a web page whose domain resolves to
            127.0.0.1 (DNS rebinding) could use a server without a key.
    """

    def __init__(self, app: Application, *, api_key: str | None, max_bytes: int, max_requests: int,
                 local_only: bool) -> None:
        self.app, self.max_bytes, self.max_requests, self.local_only = app, max_bytes, max_requests, local_only
        self._key = None if api_key is None else api_key.encode()
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        public = scope["path"] in PUBLIC_PATHS or scope["path"].startswith(PUBLIC_PREFIX)
        if (refusal := self._refusal(headers, public)) is not None:
            await refusal.response()(scope, receive, send)
            return
        self._running += not public
        try:
            await self.app(scope, self._counted(receive), send)
        finally:
            self._running -= not public

    def _refusal(self, headers: dict[bytes, bytes], public: bool) -> ApiError | None:
        if self.local_only and _host(headers) not in LOOPBACK:
            return ApiError(403, "this server accepts only the host localhost; start it with --api-key to allow others")
        if not public and not self._is_authorized(headers.get(b"authorization", b"")):
            return ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key",
                            headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_bytes:
            return self._too_large()
        if not public and self._running >= self.max_requests:
            return ApiError(429, f"{self._running} requests are already open (limit {self.max_requests})",
                            code="too_many_requests", headers={"Retry-After": "1"})
        return None

    def _is_authorized(self, given: bytes) -> bool:
        """Check the Authorization header, in constant time so that the response time reveals nothing about the key."""
        return self._key is None or hmac.compare_digest(given, b"Bearer " + self._key)

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


def _host(headers: dict[bytes, bytes]) -> str:
    """Host of a request without the port."""
    host = headers.get(b"host", b"").decode("latin-1").lower()
    return host.rsplit(":", 1)[0] if not host.endswith("]") and ":" in host else host
