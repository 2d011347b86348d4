"""What the routes share: the model, its engine, and the way from a request to choices."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import Request

from gptq_belle.engine.batching import Engine
from gptq_belle.engine.model import Model
from gptq_belle.engine.sampling import SamplingParams
from gptq_belle.prompts.styles import get_style, render_conversation, turns_from_messages
from gptq_belle.serving.api_errors import ApiError
from gptq_belle.serving.completion_choice import CompletionChoice
from gptq_belle.serving.metrics import Metrics
from gptq_belle.serving.scheduler import Scheduler
from gptq_belle.serving.schemas import Message, SamplingRequest


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server takes.

    Attributes:
        slots: answers that are generated at a time.
        waiting: answers that may wait for a slot; further ones get 429.
        context: tokens of prompt and answer together; None for the model's own.
        body: bytes of a request.
        requests: of HTTP at a time, /health and /metrics excepted.
    """

    slots: int = 8
    waiting: int = 256
    context: int | None = None
    body: int = 4 << 20
    requests: int = 512


class Service:
    """A loaded model and its scheduler.

    Args:
        model: what answers.
        name: what clients call it.
        limits: see there.
        metrics: of the server.
        prompt_style: "auto" for the model's own.
    """

    def __init__(self, model: Model, name: str, limits: Limits, metrics: Metrics, prompt_style: str = "auto") -> None:
        self.model, self.name = model, name
        self.tokenizer = model.tokenizer
        self.style = model.prompt_style if prompt_style == "auto" else prompt_style
        self.engine = Engine(model, limits.slots, limits.context)
        self.context = self.engine.capacity
        self.created = int(time.time())
        self.scheduler = Scheduler(self.engine, limits.waiting, metrics)

    def chat_text(self, messages: Sequence[Message]) -> str:
        """A conversation in the model's prompt, ready for its answer.

        Raises:
            UsageError: roles that do not follow each other as they should.
            ApiError: 400 where the last message is not the user's.
        """
        if messages[-1].role != "user":
            raise ApiError(400, f"messages: the last one must be the user's, not {messages[-1].role}'s", "messages",
                           "invalid_value")
        turns = turns_from_messages([{"role": message.role, "content": message.text} for message in messages])
        return render_conversation(turns, self.style, str(self.tokenizer.eos_token))

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """The same as token ids."""
        return self.encode(self.chat_text(messages), get_style(self.style).special_tokens)

    @property
    def chat_stops(self) -> tuple[str, ...]:
        """Strings that end every answer of a chat."""
        return get_style(self.style).stops

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return list(self.tokenizer(text, add_special_tokens=special_tokens)["input_ids"])

    def check(self, ids: Sequence[int], wanted: int | None, param: str) -> None:
        """Refuse what the model cannot read.

        Raises:
            ApiError: 400; an empty prompt, ids beyond the vocabulary, or more tokens than the context holds.
        """
        vocabulary = self.model.vocabulary_size
        if not ids:
            raise ApiError(400, f"{param}: the prompt has no tokens", param, "invalid_value")
        if max(ids) >= vocabulary:
            raise ApiError(400, f"{param}: token id {max(ids)} is not in the vocabulary of {vocabulary}", param,
                           "invalid_value")
        need = len(ids) + (1 if wanted is None else wanted)
        if self.context is not None and need > self.context:
            asked = "an answer" if wanted is None else f"{wanted} tokens to generate"
            raise ApiError(400, f"{param}: the prompt has {len(ids)} tokens and with {asked} exceeds the context of "
                           f"{self.context} tokens", param, "context_length_exceeded")

    def choices(self, prompts: Sequence[Sequence[int]], body: SamplingRequest, most_tokens: int | None,
                logprobs: int | None, stops: Sequence[str]) -> list[CompletionChoice]:
        """`body.choices` answers to each prompt, in their order.

        Raises:
            ApiError: see `Scheduler.submit`.
        """
        wanted: list[tuple[Sequence[int], SamplingParams]] = [
            (ids, body.params(number, most_tokens, logprobs)) for ids in prompts for number in range(body.choices)]
        return [CompletionChoice(answer, self.tokenizer, stops) for answer in self.scheduler.submit(wanted)]


@dataclass(slots=True)
class AppState:
    """State of one FastAPI application.

    Attributes:
        metrics: available from the start.
        service: None until the model is loaded.
        failure: why loading failed.
    """

    metrics: Metrics = field(default_factory=Metrics)
    service: Service | None = None
    failure: BaseException | None = None


def app_state(request: Request) -> AppState:
    """State of the application that received a request."""
    state: AppState = request.app.state.server
    return state


def loaded_service(request: Request) -> Service:
    """Service of the application that received a request.

    Raises:
        ApiError: 503 until the model is loaded.
    """
    service = app_state(request).service
    if service is None:
        raise ApiError(503, "the model is being loaded", code="loading", headers={"Retry-After": "5"})
    return service
