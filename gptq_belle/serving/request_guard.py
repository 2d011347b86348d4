"""What stands in front of every route: who may ask, how much, and how many at a time."""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import HTTPException

from gptq_belle.serving.api_errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
OPEN = ("/", "/health")  # a load balancer asks without a key; the page itself holds no secret
OPEN_BELOW = "/static/"
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})


class RequestGuard:
    """Refuses before a body is read: keys that are wrong, hosts that are foreign, bodies that are too large.

    Args:
        app: the application that gets the accepted requests.
        api_key: that clients must send as ``Authorization: Bearer KEY``; None where everybody may ask.
        max_bytes: of a body.
        max_requests: at a time.
        local_only: take only requests that name this machine as loopback: otherwise a page of the web that resolves
            its own name to 127.0.0.1 (DNS rebinding) could use a server that needs no key.
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
        public = scope["path"] in OPEN or scope["path"].startswith(OPEN_BELOW)
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
            return ApiError(403, "this server answers to localhost only; start it with --api-key to be named otherwise")
        if not public and not self._knows(headers.get(b"authorization", b"")):
            return ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key",
                            headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_bytes:
            return self._too_large()
        if not public and self._running >= self.max_requests:
            return ApiError(429, f"{self._running} requests are open already, {self.max_requests} may be",
                            code="too_many_requests", headers={"Retry-After": "1"})
        return None

    def _knows(self, given: bytes) -> bool:
        """Compared in constant time, so that answers' times tell nothing about the key."""
        return self._key is None or hmac.compare_digest(given, b"Bearer " + self._key)

    def _counted(self, receive: Receive) -> Receive:
        """Bodies without a length are counted as they come."""
        seen = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_bytes:
                refusal = self._too_large()
                raise HTTPException(refusal.status, refusal.message)  # the one kind that passes through body parsing
            return message

        return counted

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.max_bytes} bytes", code="body_too_large")


def _host(headers: dict[bytes, bytes]) -> str:
    """The host of a request, without its port."""
    host = headers.get(b"host", b"").decode("latin-1").lower()
    return host.rsplit(":", 1)[0] if not host.endswith("]") and ":" in host else host
