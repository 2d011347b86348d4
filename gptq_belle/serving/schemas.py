"""What clients send: OpenAI's request bodies, with the fields that vLLM and llama.cpp have added to them.

Fields that are not named here are accepted and ignored; a value that is not allowed is refused with the field's name.
Allowed ranges stand here only: the refusal quotes them, and so does /openapi.json.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from gptq_belle.engine.sampling import SamplingParams

MOST_CHOICES = 16
MOST_STOPS = 16
MOST_TOP_LOGPROBS = 20
MOST_TOKENS = 1 << 20  # beyond every context; what fits into a model's is checked when the prompt is known


def _whole(text: str) -> str:
    """JSON can write half of a surrogate pair, which no encoding has and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair at character {error.start}") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class StreamOptions(_Body):
    """What a stream carries beside the pieces."""

    include_usage: bool = False


class SamplingRequest(_Body):
    """How an answer is drawn and sent; see `engine.sampling.SamplingParams`."""

    model: str | None = None
    temperature: float | None = Field(1.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(0, ge=-1, le=1 << 31, description="0 and -1 take all")
    min_p: float | None = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(1.0, gt=0, le=100, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    n: int | None = Field(1, ge=1, le=MOST_CHOICES)
    ignore_eos: bool | None = False
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        """How many answers a prompt gets."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a piece that holds the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def params(self, choice: int, most_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Of one choice: each draws from a seed of its own, the first from the one that was given."""
        def or_default(value: float | None, otherwise: float) -> float:
            return otherwise if value is None else value

        return SamplingParams(
            max_new_tokens=most_tokens, temperature=or_default(self.temperature, 1.0),
            top_k=max(self.top_k or 0, 0), top_p=or_default(self.top_p, 1.0), min_p=or_default(self.min_p, 0.0),
            repetition_penalty=or_default(self.repetition_penalty, 1.0),
            seed=None if self.seed is None else (self.seed + choice) % (1 << 63), logprobs=logprobs,
            ignore_eos=bool(self.ignore_eos))


class TextPart(_Body):
    """A piece of a message; pictures and sounds are not for these models."""

    type: Literal["text"]
    text: Text


class Message(_Body):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text | list[TextPart]

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)

    @property
    def logprob_count(self) -> int | None:
        """How many likeliest tokens to tell beside each drawn one; None where no probabilities are wanted."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=256)] | TokenIds | Annotated[
        list[TokenIds], Field(min_length=1, max_length=256)]
    max_tokens: int | None = Field(16, ge=0, le=MOST_TOKENS)
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    echo: bool | None = False

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or more."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if several else [self.prompt]  # type: ignore[list-item, arg-type]


class TokenizeRequest(_Body):
    """POST /tokenize: a text as it is, or a conversation in the model's prompt."""

    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True


class TemplateRequest(_Body):
    """POST /apply-template."""

    messages: Annotated[list[Message], Field(min_length=1)]
