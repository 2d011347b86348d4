"""The FastAPI application. It answers 503 until the model is loaded."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi

from gptq_belle import __version__
from gptq_belle.serving import api_errors, chat_page, routes_completions, routes_info
from gptq_belle.serving.access_log import AccessLog
from gptq_belle.serving.request_guard import Access, RequestGuard
from gptq_belle.serving.service import AppState, Limits, Service

ERROR_RESPONSES = {"400": "A field has an invalid value; the message names it.", "401": "No valid API key.",
                   "404": "The model is not served.", "413": "The body is too large.",
                   "415": "The body is not declared as JSON.",
                   "429": "The queue is full, or too many requests are open.",
                   "503": "The model is being loaded, the server is stopping, or the engine has stopped."}


def create_app(load: Callable[[AppState], Service], limits: Limits, access: Access, *,
               on_failure: Callable[[BaseException], None] | None = None,
               load_first: bool = False) -> FastAPI:
    """Create the ASGI application.

    Args:
        load: function that loads the model; called in a thread when the server starts.
        on_failure: called with the exception if `load` fails.
        load_first: load the model before the first request is answered; the server does not start if that fails.
    """
    state = AppState()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if load_first:
            state.service = await asyncio.to_thread(load, state)
            yield
        else:
            loading = asyncio.create_task(_load(state, load, on_failure))
            yield
            loading.cancel()
        if state.service is not None:
            await asyncio.to_thread(state.service.scheduler.close)

    app = FastAPI(title="gptq_belle", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = state
    api_errors.install(app)
    for routes in (routes_completions, routes_info, chat_page):
        app.include_router(routes.router)
    app.mount("/static", chat_page.StaticFiles(directory=chat_page.FOLDER))
    app.add_middleware(RequestGuard, access=access, max_bytes=limits.body, max_requests=limits.requests)
    if access.origins:
        app.add_middleware(CORSMiddleware, allow_origins=access.origins, allow_methods=["GET", "POST"],
                           allow_headers=["*"], expose_headers=["x-request-id"])
    app.add_middleware(AccessLog)  # the outermost one
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


async def _load(state: AppState, load: Callable[[AppState], Service],
                on_failure: Callable[[BaseException], None] | None) -> None:
    try:
        state.service = await asyncio.to_thread(load, state)
    except Exception as error:
        state.failure = error
        if on_failure is not None:
            on_failure(error)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """OpenAPI schema with the actual error responses instead of FastAPI's 422."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        body = {"application/json": {"schema": {"type": "object", "properties": {"error": {"type": "object"}},
                                                "required": ["error"]}}}
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
                operation["responses"] |= {status: {"description": text, "content": body}
                                           for status, text in ERROR_RESPONSES.items()}
        app.openapi_schema = schema
    return app.openapi_schema
