"""The loaded model and its scheduler, shared by all routes; state of the application."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from fastapi import Request

from gptq_belle.engine.batching import Engine
from gptq_belle.engine.logits_model import ScoredPosition
from gptq_belle.engine.model import Model
from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.engine.token_constraint import TokenConstraint
from gptq_belle.errors import HardwareError, UsageError
from gptq_belle.prompts.conversation import Prompt
from gptq_belle.serving.answer_form import answer_form, tool_form
from gptq_belle.serving.api_errors import MAX_QUOTED, ApiError, public_text
from gptq_belle.serving.completion_choice import CompletionChoice
from gptq_belle.serving.conversation_schemas import Message, TemplateOptions
from gptq_belle.serving.metrics import Metrics
from gptq_belle.serving.queued_request import DEFAULT_TIMEOUTS, Timeouts
from gptq_belle.serving.scheduler import Scheduler
from gptq_belle.serving.schemas import SamplingRequest

# Names that clients send if the user gave none; "dummy" is that of huggingface_hub
PLACEHOLDER_MODELS = ("", "default", "dummy")


SCORED_PROMPTS = 2  # at a time


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one server."""

    slots: int = 8  # answers that are generated at a time
    waiting: int = 256  # answers that can wait for a slot; more are rejected with status 429
    context: int | None = None  # tokens of prompt and answer together; None for the context of the model
    body: int = 4 << 20  # bytes of a request body
    requests: int = 512  # open HTTP requests, except /, /health and /static/
    timeouts: Timeouts = DEFAULT_TIMEOUTS  # limits of time


class Service:
    """A loaded model and its scheduler.

    Args:
        names: model names for clients; responses contain the first.
        prompt_style: prompt style of chats; "auto" for that of the model.
    """

    def __init__(self, model: Model, names: Sequence[str], limits: Limits, metrics: Metrics,
                 prompt_style: str = "auto") -> None:
        self.model, self.names, self.name = model, names, names[0]
        self.tokenizer = model.tokenizer
        self.chat = model.chat_format(prompt_style)
        self.engine = Engine(model, limits.slots, limits.context)
        self.context = self.engine.capacity
        self._longest_token = max(map(len, self.tokenizer.get_vocab()))  # at least its number of characters
        self._scoring = asyncio.Semaphore(SCORED_PROMPTS)
        if model.prefix_cache is not None:
            metrics.prefix_cache.set_function(partial(getattr, model.prefix_cache, "used_bytes"))
        self.created = int(time.time())
        self.scheduler = Scheduler(self.engine, limits.waiting, metrics, limits.timeouts)

    def check_model(self, name: str | None) -> None:
        """Validate the model name of a request; none and the placeholders of clients mean the model that is served.

        Raises:
            ApiError: 404 if another model is requested.
        """
        if name is not None and name not in (*self.names, *PLACEHOLDER_MODELS):
            raise self.unknown_model(name)

    def unknown_model(self, name: str) -> ApiError:
        """The error for the name of a model that is not served."""
        return ApiError(404, f"model: {name[:MAX_QUOTED]!r} is not served here. This server has "
                        f"{', '.join(map(repr, self.names))}.", "model", "model_not_found")

    async def score(self, ids: Sequence[int], top: int) -> list[ScoredPosition]:
        """Log probabilities of the tokens of a prompt, see `LogitsModel.token_logprobs`.

        The engine reads a chunk between two steps, so that the streams of others go on. Of several prompts, a few have
        keys and values in memory at a time.
        """
        async with self._scoring:
            chunks, found = self.model.logprob_chunks(ids, top), []
            while (chunk := await self.scheduler.call(lambda: next(chunks, None))) is not None:
                found += chunk
            return found

    def check_count(self, count: int) -> None:
        """Validate the number of answers of one request.

        Raises:
            ApiError: 400 if there are more than the slots and the queue can ever hold.
        """
        most = self.scheduler.capacity
        if count > most:
            raise ApiError(400, f"n: the request is for {count} answers, and slots and queue of this server hold "
                           f"{most}. Send fewer prompts at a time, or reduce n.", "n", "too_many_answers")

    async def prompt(self, messages: Sequence[Message], options: TemplateOptions) -> Prompt:
        """The prompt for the next answer of a conversation, or for the rest of one.

        Raises:
            ApiError: 400 if the prompt format cannot express the messages or the options, the last message is not
                from the user (with ``continue_final_message`` the assistant), or see `check_text`.
        """
        continue_final, add_prompt = bool(options.continue_final_message), options.add_generation_prompt
        if continue_final and add_prompt:
            raise ApiError(400, "continue_final_message: add_generation_prompt must be false with this field",
                           "continue_final_message", "invalid_value")
        if not continue_final and add_prompt is False:
            raise ApiError(400, "add_generation_prompt: false is allowed only with continue_final_message",
                           "add_generation_prompt", "unsupported_parameter")
        fields, tools = [message.fields for message in messages], options.offered_tools
        self.check_text(sum(len(each["content"] or "") for each in fields) + len(str(tools)), "messages")
        try:
            return await asyncio.to_thread(self.chat.prompt, fields, continue_final, tools)
        except UsageError as error:
            raise ApiError(400, f"messages: {public_text(str(error))}", "messages", "invalid_value") from error

    async def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Tokenize a text in a thread: the tokenizer releases Python's lock.

        Raises:
            ApiError: see `check_text`.
        """
        self.check_text(len(text), "prompt")
        found = await asyncio.to_thread(self.tokenizer, text, add_special_tokens=special_tokens)
        return list(found["input_ids"])

    def check_text(self, length: int, param: str) -> None:
        """Refuse a text before it is tokenized if it has more characters than the longest tokens of a context have.

        Args:
            length: number of characters.
            param: name of the field for error messages.
        Raises:
            ApiError: 400 with the limit.
        """
        if self.context is not None and length > (most := self.context * self._longest_token):
            raise ApiError(400, f"{param}: a text of {length} characters is longer than {most}, the most that "
                           f"{self.context} tokens can have", param, "context_length_exceeded")

    def check(self, ids: Sequence[int], wanted: int | None, param: str) -> None:
        """Validate a prompt.

        Args:
            wanted: number of requested tokens, or None.
            param: name of the field for error messages.
        Raises:
            ApiError: 400 if the prompt is empty, has ids outside the vocabulary, or exceeds the context.
        """
        if not ids:
            raise ApiError(400, f"{param}: the prompt has no tokens", param, "invalid_value")
        self.check_ids(ids, param)
        need = len(ids) + (1 if wanted is None else wanted)
        if self.context is not None and need > self.context:
            asked = "an answer" if wanted is None else f"{wanted} tokens to generate"
            raise ApiError(400, f"{param}: the prompt has {len(ids)} tokens and with {asked} exceeds the context of "
                           f"{self.context} tokens", param, "context_length_exceeded")

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Check that token ids are in the vocabulary; raises ApiError 400 with the name of the field."""
        vocabulary = self.model.vocabulary_size
        if (largest := max(ids, default=0)) >= vocabulary:
            raise ApiError(400, f"{param}: token id {largest} is not in the vocabulary of {vocabulary}", param,
                           "invalid_value")

    async def choices(self, prompts: Sequence[Sequence[int]], body: SamplingRequest, max_tokens: int | None,
                      logprobs: int | None, stops: Sequence[str],
                      options: TemplateOptions | None = None) -> list[CompletionChoice]:
        """Submit `body.choices` answers for each prompt, in order.

        Args:
            options: of a chat, whose answers can call tools.
        Raises:
            ApiError: 400 if `min_tokens` exceeds the maximum, a token id is not in the vocabulary, or a grammar cannot
                be followed; see `Scheduler.submit`.
        """
        if max_tokens is not None and (body.min_tokens or 0) > max_tokens:
            raise ApiError(400, f"min_tokens: {body.min_tokens} is more than the maximum of {max_tokens} tokens",
                           "min_tokens", "invalid_value")
        self.check_ids([int(token) for token in body.logit_bias or ()], "logit_bias")
        self.check_ids(body.stop_token_ids or (), "stop_token_ids")
        name, form = answer_form(body.forms)
        calls = None
        if options is not None and (tools := tool_form(options, self.chat.call_form, name)):
            calls, constraint = self.chat.call_form, await self._call_constraint(options, SamplingParams(**tools))
        else:
            constraint = await self._constraint(name, SamplingParams(**form)) if form else None
        wanted: list[tuple[Sequence[int], SamplingParams]] = [
            (ids, body.params(number, max_tokens, logprobs)) for ids in prompts for number in range(body.choices)]
        return [CompletionChoice(answer, self.tokenizer, stops, body.min_tokens or 0, calls)
                for answer in self.scheduler.submit(wanted, constraint)]

    async def _constraint(self, name: str, params: SamplingParams) -> TokenConstraint | None:
        """Compile a grammar in a thread, which can take a second; `name` is the field of the request."""
        try:
            return await asyncio.to_thread(self.model.constraint, params)
        except (UsageError, HardwareError) as error:
            text = public_text(str(error))
            raise ApiError(400, f"{name}: {text}", name, "invalid_value") from error

    async def _call_constraint(self, options: TemplateOptions, params: SamplingParams) -> TokenConstraint | None:
        """Compile the grammar of calls; the error for a schema that is not supported names its tool."""
        try:
            return await self._constraint("tools", params)
        except ApiError as error:
            for place, tool in enumerate(options.tools or ()):
                if isinstance(error.__cause__, UsageError) and tool.function.parameters:
                    await self._constraint(f"tools.{place}.function.parameters",
                                           SamplingParams(json_schema=tool.function.parameters))
            raise


@dataclass(slots=True)
class AppState:
    """State of one FastAPI application."""

    metrics: Metrics = field(default_factory=Metrics)  # available from the start
    service: Service | None = None  # None until the model is loaded
    failure: BaseException | None = None  # why loading failed


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
