"""POST /v1/chat/completions."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gptq_belle.serving.app_state import loaded_service
from gptq_belle.serving.responses import collect, envelope, event_stream, usage
from gptq_belle.serving.schemas import ChatRequest
from gptq_belle.serving.token_text import CompletionChoice, TextDelta, chat_logprobs

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer the last message of a conversation."""
    service = loaded_service(request)
    ids = service.chat_ids(body.messages)
    limit = body.max_completion_tokens or body.max_tokens
    service.check(ids, limit, "messages")
    stops = (*service.chat_stops, *body.stops)
    choices = service.choices([ids], body, limit, body.logprob_count, stops)

    def logprobs(piece: TextDelta) -> dict[str, Any] | None:
        return None if body.logprob_count is None else chat_logprobs(service.tokenizer, piece.scored)

    def entry(choice: CompletionChoice, key: str, message: dict[str, Any], piece: TextDelta) -> dict[str, Any]:
        return {"index": choice.index, key: message, "logprobs": logprobs(piece), "finish_reason": choice.reason}

    if body.stream:
        def final() -> dict[str, Any] | None:
            return {"choices": [], "usage": usage(len(ids), choices)} if body.include_usage else None

        return event_stream(
            request, choices, envelope("chat.completion.chunk", service.name),
            show=lambda choice, piece: entry(choice, "delta", {"content": piece.text}, piece) | {"finish_reason": None},
            first=lambda choice: {"index": choice.index, "delta": {"role": "assistant", "content": ""},
                                  "logprobs": None, "finish_reason": None},
            last=lambda choice: {"index": choice.index, "delta": {}, "logprobs": None, "finish_reason": choice.reason},
            final=final)
    pieces = await collect(request, choices)
    entries = [entry(choice, "message", {"role": "assistant", "content": piece.text, "refusal": None}, piece)
               for choice, piece in zip(choices, pieces, strict=True)]
    return JSONResponse(envelope("chat.completion", service.name) | {"choices": entries,
                                                                     "usage": usage(len(ids), choices)})
