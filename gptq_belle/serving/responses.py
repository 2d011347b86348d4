"""What clients get: OpenAI's response bodies, whole or as a stream of server-sent events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus

from gptq_belle.serving.answers import Choice, Piece
from gptq_belle.serving.errors import ApiError, from_exception

KEEP_ALIVE = 10  # seconds of silence after which a comment is sent: proxies drop silent connections
LINE_END = "\n"  # some clients split at it alone
AppStatus.disable_automatic_graceful_drain()  # it would cut streams off at SIGTERM; ours are finished
DONE = ServerSentEvent(data="[DONE]", sep=LINE_END)


def envelope(kind: str, model: str) -> dict[str, Any]:
    """The head that every body of a request has."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def usage(prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, int]:
    """Tokens that were read and generated."""
    generated = sum(choice.count for choice in choices)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": generated, "total_tokens": prompt_tokens + generated}


async def whole(request: Request, choices: Sequence[Choice]) -> list[Piece]:
    """All of every choice. Where the client goes away meanwhile, nothing more is generated.

    Raises:
        ApiError: the client went away.
    """
    async def one(choice: Choice) -> Piece:
        total = Piece()
        async with aclosing(choice.pieces()) as pieces:
            async for piece in pieces:
                total.text += piece.text
                total.scored += piece.scored
        return total

    tasks = [asyncio.create_task(one(choice)) for choice in choices]
    gone = asyncio.create_task(_disconnected(request))
    try:
        everything = asyncio.gather(*tasks)
        either: list[asyncio.Future[Any]] = [everything, gone]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not everything.done():
            raise ApiError(499, "the client went away")  # nobody reads it
        return list(await everything)
    finally:
        gone.cancel()
        for task in tasks:
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def streamed(choices: Sequence[Choice], head: dict[str, Any], show: Callable[[Choice, Piece], dict[str, Any]],
             first: Callable[[Choice], dict[str, Any] | None], last: Callable[[Choice], dict[str, Any]],
             final: Callable[[], dict[str, Any] | None]) -> EventSourceResponse:
    """A stream of events, the choices' pieces mixed as they come, closed by ``[DONE]``.

    Args:
        choices: of the request.
        head: what every event begins with.
        show, first, last: the ``choices`` entry of a piece, in front of all pieces, and behind them.
        final: what the last event holds (the usage), if anything.
    """
    def event(**fields: Any) -> ServerSentEvent:
        return ServerSentEvent(data=json.dumps(head | fields, ensure_ascii=False), sep=LINE_END)

    async def events() -> AsyncIterator[ServerSentEvent]:
        try:
            for choice in choices:
                if (entry := first(choice)) is not None:
                    yield event(choices=[entry])
            async with aclosing(_mixed(choices)) as pieces:
                async for choice, piece in pieces:
                    yield event(choices=[last(choice) if piece is None else show(choice, piece)])
            if (fields := final()) is not None:
                yield event(**fields)
        except Exception as error:  # headers are out: the error is an event
            yield ServerSentEvent(data=json.dumps(from_exception(error).body, ensure_ascii=False), sep=LINE_END)
            return
        yield DONE

    return EventSourceResponse(events(), ping=KEEP_ALIVE, sep=LINE_END)


async def _mixed(choices: Sequence[Choice]) -> AsyncGenerator[tuple[Choice, Piece | None], None]:
    """Pieces of all choices as they come, None behind the last one of each."""
    arrived: asyncio.Queue[tuple[Choice, Piece | None] | BaseException] = asyncio.Queue()

    async def forward(choice: Choice) -> None:
        try:
            async with aclosing(choice.pieces()) as pieces:
                async for piece in pieces:
                    await arrived.put((choice, piece))
            await arrived.put((choice, None))
        except Exception as error:
            await arrived.put(error)

    tasks = [asyncio.create_task(forward(choice)) for choice in choices]
    try:
        left = len(choices)
        while left:
            item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            left -= item[1] is None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
