"""The application: routes, errors, guard, and a model that is loaded while the server answers 503 already."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from gptq_belle import __version__
from gptq_belle.serving import api_errors, routes_completions, routes_info
from gptq_belle.serving.request_guard import RequestGuard
from gptq_belle.serving.service import AppState, Limits, Service

REFUSALS = {"400": "A field has a value that is not allowed; the message names it.", "401": "No valid API key.",
            "413": "The body is too large.", "429": "Too many answers wait already.",
            "503": "The model is being loaded, or the server is stopping."}


def create_app(load: Callable[[AppState], Service], limits: Limits, *, api_key: str | None = None,
               local_only: bool = True, failed: Callable[[BaseException], None] | None = None,
               at_once: bool = False) -> FastAPI:
    """The server as an ASGI application.

    Args:
        load: makes the service; called in a thread once the server runs.
        limits: of bodies and requests.
        api_key: see `RequestGuard`.
        local_only: see `RequestGuard`.
        failed: told why `load` failed.
        at_once: load before anything is answered, and do not start where that fails.
    """
    state = AppState()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if at_once:
            state.service = await asyncio.to_thread(load, state)
            yield
        else:
            loading = asyncio.create_task(_load(state, load, failed))
            yield
            loading.cancel()
        if state.service is not None:
            await asyncio.to_thread(state.service.scheduler.close)

    app = FastAPI(title="gptq_belle", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = state
    api_errors.install(app)
    for routes in (routes_completions, routes_info):
        app.include_router(routes.router)
    app.add_middleware(RequestGuard, api_key=api_key, max_bytes=limits.body, max_requests=limits.requests,
                       local_only=local_only and api_key is None)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


async def _load(state: AppState, load: Callable[[AppState], Service],
                failed: Callable[[BaseException], None] | None) -> None:
    try:
        state.service = await asyncio.to_thread(load, state)
    except Exception as error:
        state.failure = error
        if failed is not None:
            failed(error)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The schema, with the statuses that are really answered in place of FastAPI's 422."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        body = {"application/json": {"schema": {"type": "object", "properties": {"error": {"type": "object"}},
                                                "required": ["error"]}}}
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
                operation["responses"] |= {status: {"description": text, "content": body}
                                           for status, text in REFUSALS.items()}
        app.openapi_schema = schema
    return app.openapi_schema
