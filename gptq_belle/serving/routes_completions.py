"""Routes /v1/chat/completions and /v1/completions; with ``echo`` and ``logprobs`` the latter scores the prompt."""

import asyncio
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gptq_belle.serving.answer_form import answer_form
from gptq_belle.serving.api_errors import JSON_BODY, ApiError
from gptq_belle.serving.completion_choice import (
    CompletionChoice,
    ScoredToken,
    TextDelta,
    TokenLogprob,
    chat_logprobs,
    decode,
    offsets,
    text_logprobs,
)
from gptq_belle.serving.request_fields import CHAT, COMPLETION, check_fields, check_nested_fields
from gptq_belle.serving.responses import collect, envelope, event_stream, usage
from gptq_belle.serving.schemas import ChatRequest, CompletionRequest
from gptq_belle.serving.service import Service, loaded_service

router = APIRouter()


@router.post("/v1/chat/completions", dependencies=JSON_BODY)
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer the last message of a conversation."""
    check_fields(body.model_extra, CHAT)
    check_nested_fields(body)
    service = loaded_service(request)
    service.check_model(body.model)
    service.check_count(body.choices)
    ids, prompt_stops = (await service.prompt(body.messages, body))[1:]
    limit = body.max_completion_tokens or body.max_tokens
    service.check(ids, limit, "messages")
    stops = body.stops if answer_form(body.forms)[1] else (*prompt_stops, *body.stops)  # a grammar ends by itself
    choices = await service.choices([ids], body, limit, body.logprob_count, stops, body)
    request.state.notes.prompt_tokens, request.state.notes.choices = len(ids), choices

    def logprobs(piece: TextDelta) -> dict[str, Any] | None:
        return None if body.logprob_count is None else chat_logprobs(service.tokenizer, piece.scored)

    def entry(choice: CompletionChoice, key: str, message: dict[str, Any], piece: TextDelta) -> dict[str, Any]:
        return {"index": choice.index, key: message, "logprobs": logprobs(piece), "finish_reason": choice.reason}

    if body.stream:
        def final() -> dict[str, Any] | None:
            return {"choices": [], "usage": usage(len(ids), choices, body.choices)} if body.include_usage else None

        return event_stream(
            request, choices, envelope("chat.completion.chunk", service.name),
            show=lambda choice, piece: entry(choice, "delta", _delta(piece), piece) | {"finish_reason": None},
            first=lambda choice: {"index": choice.index, "delta": {"role": "assistant", "content": ""},
                                  "logprobs": None, "finish_reason": None},
            last=lambda choice: {"index": choice.index, "delta": {}, "logprobs": None, "finish_reason": choice.reason},
            final=final, headers=body.headers)
    pieces = await collect(request, choices)
    entries = [entry(choice, "message", _message(piece), piece)
               for choice, piece in zip(choices, pieces, strict=True)]
    return JSONResponse(envelope("chat.completion", service.name) | {
        "choices": entries, "usage": usage(len(ids), choices, body.choices)}, headers=body.headers)


def _message(piece: TextDelta) -> dict[str, Any]:
    """The message of a whole answer; one that only calls a tool has no content."""
    if piece.call is None:
        return {"role": "assistant", "content": piece.text, "refusal": None}
    return {"role": "assistant", "content": piece.text or None, "refusal": None, "tool_calls": [piece.call.body]}


def _delta(piece: TextDelta) -> dict[str, Any]:
    """The message of a part of an answer."""
    content = {"content": piece.text} if piece.text or piece.call is None else {}
    return content if piece.call is None else {**content, "tool_calls": [{"index": 0, **piece.call.body}]}


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt, with its text and log probabilities for ``echo``."""

    ids: list[int]
    text: str = ""
    scored: tuple[ScoredToken | int, ...] = ()


@router.post("/v1/completions", dependencies=JSON_BODY)
async def complete(body: CompletionRequest, request: Request) -> Response:
    """Continue one prompt or several."""
    check_fields(body.model_extra, COMPLETION)
    check_nested_fields(body)
    service = loaded_service(request)
    service.check_model(body.model)
    wanted = 16 if body.max_tokens is None else body.max_tokens
    if wanted == 0 and (not body.echo or body.stream):
        raise ApiError(400, "max_tokens: 0 is allowed only with echo, and without stream", "max_tokens",
                       "invalid_value")
    if wanted:
        service.check_count(len(body.prompts) * body.choices)
    ids = [await service.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]
    for each in ids:
        service.check(each, wanted, "prompt")
    prompts = [await _echo(service, each, body) if body.echo else _Prompt(each) for each in ids]
    read = sum(map(len, ids))
    if wanted == 0:
        scored = [prompt for prompt in prompts for _ in range(body.choices)]
        entries = await asyncio.to_thread(lambda: [
            _entry(service, body, prompt, index, TextDelta(), "length") for index, prompt in enumerate(scored)])
        return JSONResponse(envelope("text_completion", service.name) | {"choices": entries, "usage": usage(read, [])})
    choices = await service.choices(ids, body, wanted, body.logprobs, body.stops)
    request.state.notes.prompt_tokens, request.state.notes.choices = read, choices

    def prompt_of(choice: CompletionChoice) -> _Prompt:
        return prompts[choice.index // body.choices]

    if body.stream:
        def final() -> dict[str, Any] | None:
            return {"choices": [], "usage": usage(read, choices, body.choices)} if body.include_usage else None

        def entry(choice: CompletionChoice, prompt: _Prompt, piece: TextDelta,
                  reason: str | None = None) -> dict[str, Any]:
            return _entry(service, body, prompt, choice.index, piece, reason)

        none = _Prompt([])
        return event_stream(
            request, choices, envelope("text_completion", service.name),
            show=lambda choice, piece: entry(choice, none, piece),
            first=lambda choice: entry(choice, prompt_of(choice), TextDelta()) if body.echo else None,
            last=lambda choice: entry(choice, none, TextDelta(), choice.reason),
            final=final, headers=body.headers)
    pieces = await collect(request, choices)
    entries = await asyncio.to_thread(lambda: [  # thousands of tokens with echo and logprobs
        _entry(service, body, prompt_of(choice), choice.index, piece, choice.reason)
        for choice, piece in zip(choices, pieces, strict=True)])
    return JSONResponse(envelope("text_completion", service.name) | {
        "choices": entries, "usage": usage(read, choices, body.choices)}, headers=body.headers)


def _entry(service: Service, body: CompletionRequest, prompt: _Prompt, index: int, piece: TextDelta,
           reason: str | None) -> dict[str, Any]:
    """Build one element of ``choices``."""
    found = None
    if body.logprobs is not None:
        moved = [one._replace(offset=one.offset + len(prompt.text)) for one in piece.scored]
        found = text_logprobs(service.tokenizer, [*prompt.scored, *moved])
    return {"index": index, "text": prompt.text + piece.text, "logprobs": found, "finish_reason": reason}


async def _echo(service: Service, ids: list[int], body: CompletionRequest) -> _Prompt:
    """Build the echo of a prompt, with the log probabilities of its tokens if they are requested."""
    text = decode(service.tokenizer, ids)
    if body.logprobs is None:
        return _Prompt(ids, text)
    found = await service.score(ids, body.logprobs)
    places = await asyncio.to_thread(offsets, service.tokenizer, ids)
    scored = [ScoredToken(TokenLogprob(token, logprob), place, [TokenLogprob(*pair) for pair in likely])
              for token, place, (logprob, likely) in zip(ids[1:], places[1:], found, strict=True)]
    return _Prompt(ids, text, (ids[0], *scored))
