"""POST /v1/chat/completions."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gptq_belle.serving.app_state import ready
from gptq_belle.serving.responses import envelope, streamed, usage, whole
from gptq_belle.serving.schemas import ChatRequest
from gptq_belle.serving.token_text import Choice, Piece, chat_logprobs

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer the last message of a conversation."""
    service = ready(request)
    ids = service.chat_ids(body.messages)
    limit = body.max_completion_tokens or body.max_tokens
    service.check(ids, limit, "messages")
    stops = (*service.chat_stops, *body.stops)
    choices = service.choices([ids], body, limit, body.wanted_logprobs, stops)

    def logprobs(piece: Piece) -> dict[str, Any] | None:
        return None if body.wanted_logprobs is None else chat_logprobs(service.tokenizer, piece.scored)

    def entry(choice: Choice, key: str, message: dict[str, Any], piece: Piece) -> dict[str, Any]:
        return {"index": choice.index, key: message, "logprobs": logprobs(piece), "finish_reason": choice.reason}

    if body.stream:
        def final() -> dict[str, Any] | None:
            return {"choices": [], "usage": usage(len(ids), choices)} if body.include_usage else None

        return streamed(
            request, choices, envelope("chat.completion.chunk", service.name),
            show=lambda choice, piece: entry(choice, "delta", {"content": piece.text}, piece) | {"finish_reason": None},
            first=lambda choice: {"index": choice.index, "delta": {"role": "assistant", "content": ""},
                                  "logprobs": None, "finish_reason": None},
            last=lambda choice: {"index": choice.index, "delta": {}, "logprobs": None, "finish_reason": choice.reason},
            final=final)
    pieces = await whole(request, choices)
    entries = [entry(choice, "message", {"role": "assistant", "content": piece.text, "refusal": None}, piece)
               for choice, piece in zip(choices, pieces, strict=True)]
    return JSONResponse(envelope("chat.completion", service.name) | {"choices": entries,
                                                                     "usage": usage(len(ids), choices)})
