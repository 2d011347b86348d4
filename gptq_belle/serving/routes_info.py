"""Routes for models, health, metrics, tokenization and prompt templates."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from gptq_belle.common.memory import anonymous_bytes
from gptq_belle.serving.api_errors import JSON_BODY, ApiError, engine_stopped
from gptq_belle.serving.request_fields import CHAT, DETOKENIZE, TOKENIZE, check_fields, check_nested_fields
from gptq_belle.serving.schemas import ChatRequest, DetokenizeRequest, TemplateRequest, TokenizeRequest
from gptq_belle.serving.service import Service, app_state, loaded_service

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model that is served, by each of its names."""
    service = loaded_service(request)
    return {"object": "list", "data": [_model(service, name) for name in service.names]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """The model of this name."""
    service = loaded_service(request)
    if name not in service.names:
        raise service.unknown_model(name)
    return _model(service, name)


def _model(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.created, "owned_by": "gptq_belle",
            "root": service.name, "max_model_len": service.context}


@router.get("/health")
@router.head("/health", include_in_schema=False)
async def health(request: Request) -> Response:
    """Status 200 if requests can be answered, else 503; with the number of requests and the memory in use."""
    state = app_state(request)
    if state.service is None:
        return ApiError(503, "the model is being loaded", code="loading", headers={"Retry-After": "5"}).response()
    scheduler = state.service.scheduler
    if scheduler.failure is not None:
        return engine_stopped().response()
    return JSONResponse({"status": "ok", "model": state.service.name, "running": scheduler.running,
                         "waiting": scheduler.waiting, "slots": scheduler.engine.slots,
                         "memory_bytes": anonymous_bytes()})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(generate_latest(app_state(request).metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.post("/tokenize", dependencies=JSON_BODY)
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """Token ids of a text or of a conversation."""
    check_fields(body.model_extra, TOKENIZE)
    check_nested_fields(body)
    service = loaded_service(request)
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt: give either prompt or messages", "prompt", "invalid_value")
    ids = ((await service.prompt(body.messages, body)).ids if body.messages is not None
           else await service.encode(str(body.prompt), body.add_special_tokens))
    return {"tokens": ids, "count": len(ids), "max_model_len": service.context}


@router.post("/detokenize", dependencies=JSON_BODY)
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
    """The text of token ids, with special tokens, as in vLLM."""
    check_fields(body.model_extra, DETOKENIZE)
    service = loaded_service(request)
    service.check_model(body.model)
    service.check_ids(body.tokens, "tokens")
    return {"prompt": str(service.tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False))}


@router.post("/apply-template", dependencies=JSON_BODY)
async def apply_template(body: TemplateRequest, request: Request) -> dict[str, str]:
    """The prompt text of a conversation; sampling fields of a chat are accepted, since they do not change it."""
    extra = {name: value for name, value in (body.model_extra or {}).items() if name not in ChatRequest.model_fields}
    check_fields(extra, CHAT)
    check_nested_fields(body)
    service = loaded_service(request)
    service.check_model(body.model)
    return {"prompt": (await service.prompt(body.messages, body)).text}


@router.post("/v1/responses", status_code=501, include_in_schema=False)
@router.post("/v1/messages", status_code=501, include_in_schema=False)
async def not_implemented(request: Request) -> Response:
    """OpenAI's Responses API and Anthropic's Messages API. Their clients do not repeat such a request."""
    return ApiError(501, f"{request.url.path} is not implemented. Use /v1/chat/completions.", code="not_implemented",
                    headers={"x-should-retry": "false"}).response()
