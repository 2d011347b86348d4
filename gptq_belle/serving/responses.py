"""Response bodies of OpenAI's API, complete or as a stream of server-sent events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from gptq_belle.errors import GptqBelleError
from gptq_belle.serving.api_errors import ApiError, from_exception, logged
from gptq_belle.serving.completion_choice import CompletionChoice, TextDelta
from gptq_belle.serving.queued_request import Item, ItemQueue

KEEP_ALIVE = 10.0  # seconds without data after which a comment is sent: proxies close idle connections
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # proxies must not buffer events
# New text of several choices; None after the last text of a choice.
Deltas = list[tuple[CompletionChoice, TextDelta | None]]
_encode = json.JSONEncoder(ensure_ascii=False).encode


def envelope(kind: str, model: str) -> dict[str, Any]:
    """Common fields of all response bodies."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def usage(prompt_tokens: int, choices: Sequence[CompletionChoice], per_prompt: int = 1) -> dict[str, Any]:
    """Count prompt tokens, those of them that were taken from the cache, and generated tokens.

    Args:
        prompt_tokens: number of tokens of all prompts, each counted once.
        choices: all answers.
        per_prompt: number of answers to each prompt; the first one tells how much of it was in the cache.
    """
    generated = sum(choice.count for choice in choices)
    cached = sum(choice.answer.reused for choice in choices[::per_prompt])
    return {"prompt_tokens": prompt_tokens, "completion_tokens": generated, "total_tokens": prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": cached}}


async def collect(request: Request, choices: Sequence[CompletionChoice]) -> list[TextDelta]:
    """Wait for the complete text of all choices. Generation stops if the client disconnects.

    Raises:
        ApiError: the client has disconnected.
    """
    totals = [TextDelta() for _ in choices]
    async with aclosing(_deltas(request, choices)) as arriving:
        async for batch in arriving:
            for choice, piece in batch:
                if piece is not None:
                    totals[choice.index].add(piece)
    return totals


def event_stream(request: Request, choices: Sequence[CompletionChoice], head: dict[str, Any],
                 show: Callable[[CompletionChoice, TextDelta], dict[str, Any]],
                 first: Callable[[CompletionChoice], dict[str, Any] | None],
                 last: Callable[[CompletionChoice], dict[str, Any]],
                 final: Callable[[], dict[str, Any] | None], headers: Mapping[str, str]) -> StreamingResponse:
    """Stream text of all choices as it arrives, followed by ``[DONE]``.

    An event contains the text of one token; events that are available at the same time are sent together.

    Args:
        request: the request, to detect that the client disconnects.
        head: common fields of all events.
        show, first, last: build the ``choices`` entry for new text, before the first and after the last text.
        final: builds the fields of the last event (usage), or None for no such event.
        headers: additional HTTP headers.
    """
    def entry(fields: dict[str, Any]) -> bytes:
        return _event(head | {"choices": [fields]})

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            if opening := [entry(fields) for choice in choices if (fields := first(choice)) is not None]:
                yield b"".join(opening)
            async with aclosing(_deltas(request, choices)) as arriving:
                async for batch in arriving:
                    yield b"".join([entry(last(choice) if piece is None else show(choice, piece))
                                    for choice, piece in batch]) or b": still there\n\n"
            if (fields := final()) is not None:
                yield _event(head | fields)
        except Exception as error:  # headers have been sent, so the error is an event
            known = isinstance(error, (ApiError, GptqBelleError))
            yield _event((from_exception(error) if known else logged("A stream failed.", error)).body)
            return
        yield b"data: [DONE]\n\n"

    return _EventStream(events(), headers={**HEADERS, **headers})


class _EventStream(StreamingResponse):
    """Streaming response of server-sent events; `_deltas` detects that the client disconnects."""

    media_type = "text/event-stream"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await self.stream_response(send)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + _encode(body).encode() + b"\n\n"


async def _deltas(request: Request, choices: Sequence[CompletionChoice]) -> AsyncGenerator[Deltas, None]:
    """Yield new text of all choices, None after the last text of each; an empty list after KEEP_ALIVE seconds.

    Closing the generator frees the slots.

    Raises:
        ApiError: the client has disconnected, or see `QueuedRequest.seconds_left`.
    """
    arrived = choices[0].answer.arrived
    disconnected = asyncio.create_task(_wait_for_disconnect(request, arrived))
    try:
        while any(choice.reason is None for choice in choices):
            answers = [choice.answer for choice in choices]
            left = answers[0].seconds_left(answers)
            items = await _arrivals(arrived, KEEP_ALIVE if left is None else min(left, KEEP_ALIVE))
            batch: Deltas = []
            for index, item in items:
                if isinstance(item, BaseException):
                    raise item
                choice = choices[index]
                if choice.reason is not None:  # ended by a stop string while this token was generated
                    continue
                if piece := choice.feed(item):
                    batch.append((choice, piece))
                if choice.reason is not None:
                    batch.append((choice, None))
            if batch or not items:
                yield batch
    finally:
        disconnected.cancel()
        for choice in choices:
            choice.close()


async def _arrivals(arrived: ItemQueue, seconds: float) -> list[tuple[int, Item]]:
    """Wait for at least one item and return all that are available; empty after that many seconds."""
    try:
        async with asyncio.timeout(seconds):
            items = [await arrived.get()]
    except TimeoutError:
        return []
    while not arrived.empty():
        items.append(arrived.get_nowait())
    return items


async def _wait_for_disconnect(request: Request, arrived: ItemQueue) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    arrived.put_nowait((0, ApiError(499, "the client has disconnected")))  # only ends the loop
