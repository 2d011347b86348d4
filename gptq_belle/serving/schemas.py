"""Request bodies of OpenAI's API, with additional fields of vLLM and llama.cpp.

Other fields are checked by the tables of `request_fields`; an invalid value is rejected with the name of the field.
Allowed ranges are defined only here: error messages and /openapi.json quote them. Validation runs in the event loop:
lists have a limit of length and end at the first invalid element, because a list of 2 million of them took 115 s.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from gptq_belle.engine.sampling_params import DEFAULT_SAMPLING, MAX_BIAS, MAX_PENALTY, SamplingParams
from gptq_belle.serving.answer_form import GUIDED
from gptq_belle.serving.conversation_schemas import Messages, TemplateOptions
from gptq_belle.serving.field_types import FAIL_FAST, Body, Integer, Text, check_count

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_PROMPTS = 256
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 1 << 20  # more than every context; the limit of the model is checked with the prompt


def _few_biases(biases: Any) -> Any:
    if isinstance(biases, dict):
        check_count(len(biases), MAX_BIASES)
    return biases


Stop = Annotated[Text, Field(max_length=256, description="an empty string stops nothing")]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], FAIL_FAST, Field(min_length=1)]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS, allow_inf_nan=False)]
Grammar = Annotated[Text, Field(max_length=1 << 16)]
Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY, allow_inf_nan=False)]


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = False


class SamplingRequest(Body):
    """Sampling and streaming options of a request, see `engine.sampling_params.SamplingParams`."""

    model: str | None = None
    temperature: float | None = Field(DEFAULT_SAMPLING.temperature, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(DEFAULT_SAMPLING.top_p, gt=0, le=1, allow_inf_nan=False)
    top_k: Integer | None = Field(DEFAULT_SAMPLING.top_k, ge=-1, le=1 << 31, description="0 and -1 disable the limit")
    min_p: float | None = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(DEFAULT_SAMPLING.repetition_penalty, gt=0, le=100, allow_inf_nan=False)
    repeat_penalty: float | None = Field(None, gt=0, le=100, allow_inf_nan=False, description="llama.cpp's name of it")
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    logit_bias: Annotated[dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Bias], BeforeValidator(_few_biases),
                          Field(max_length=MAX_BIASES)] | None = Field(None, description="by token id")
    min_tokens: Integer | None = Field(0, ge=0, le=MAX_TOKENS)
    stop_token_ids: Annotated[list[TokenId], FAIL_FAST] | None = None
    seed: Integer | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    n: Integer | None = Field(1, ge=1, le=MAX_CHOICES)
    ignore_eos: bool | None = False
    stop: Stop | Annotated[list[Stop], FAIL_FAST, Field(max_length=MAX_STOPS)] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: Grammar | None = None
    guided_choice: Annotated[list[Text], FAIL_FAST, Field(max_length=MAX_BIASES)] | None = None
    guided_grammar: Grammar | None = None
    grammar: Grammar | None = None
    json_schema: dict[str, Any] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings that are not empty."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in given if stop)

    @property
    def forms(self) -> dict[str, Any]:
        """The fields that `answer_form` takes."""
        return {name: getattr(self, name) for name in ("response_format", "structured_outputs", *GUIDED)}

    @property
    def choices(self) -> int:
        """Number of answers per prompt."""
        return self.n or 1

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response: a warning if OpenAI's penalties meet the default repetition penalty, which can hide
        their effect: it is not 1, as OpenAI's clients expect."""
        given = [name for name in ("presence_penalty", "frequency_penalty") if getattr(self, name)]
        default = DEFAULT_SAMPLING.repetition_penalty
        if not given or default == 1 or self.model_fields_set & {"repetition_penalty", "repeat_penalty"}:
            return {}
        return {"Warning": f'299 gptq-belle "{", ".join(given)}: the default repetition_penalty of {default:g} applies '
                           'too; send 1 to disable it"'}

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with an event that contains the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def params(self, choice: int, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Sampling parameters of one choice: its seed is the requested one plus the number of the choice."""
        def value(name: str) -> Any:
            given = getattr(self, name)
            return getattr(DEFAULT_SAMPLING, name) if given is None else given

        return SamplingParams(
            max_new_tokens=max_tokens, temperature=value("temperature"),
            top_k=max(value("top_k"), 0), top_p=value("top_p"), min_p=self.min_p or 0.0,
            repetition_penalty=self.repeat_penalty or value("repetition_penalty"),
            presence_penalty=self.presence_penalty or 0.0, frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()} or None,
            min_tokens=self.min_tokens or 0, stop_token_ids=tuple(self.stop_token_ids or ()),
            seed=None if self.seed is None else (self.seed + choice) % (1 << 63), logprobs=logprobs,
            ignore_eos=bool(self.ignore_eos))


class ChatRequest(SamplingRequest, TemplateOptions):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: Integer | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: Integer | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = False
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @property
    def logprob_count(self) -> int | None:
        """Number of most likely tokens to return per token; None if log probabilities are not requested."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    prompt: (Text | Annotated[list[Text], FAIL_FAST, Field(min_length=1, max_length=MAX_PROMPTS)] | TokenIds
             | Annotated[list[TokenIds], FAIL_FAST, Field(min_length=1, max_length=MAX_PROMPTS)])
    max_tokens: Integer | None = Field(16, ge=0, le=MAX_TOKENS)
    logprobs: Integer | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = False

    @property
    def prompts(self) -> list[str | list[int]]:
        """All prompts."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if several else [self.prompt]  # type: ignore[list-item, arg-type]


class TokenizeRequest(TemplateOptions):
    """POST /tokenize: a text, or a conversation that is rendered in the prompt style of the model."""

    model: str | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True


class TemplateRequest(TemplateOptions):
    """POST /apply-template."""

    model: str | None = None
    messages: Messages


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], FAIL_FAST]
