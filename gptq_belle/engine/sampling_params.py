"""Parameters of sampling, and their validation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, TypedDict, Unpack

from gptq_belle.errors import UsageError

MAX_BIAS = 100.0  # of `logit_bias`, as in OpenAI's API
STRUCTURES = ("json_schema", "regex", "choice", "grammar")  # options that constrain the form of an answer
DEFAULT_MAX_NEW_TOKENS = 512
MAX_PENALTY = 2.0  # of `presence_penalty` and `frequency_penalty`, as in OpenAI's API


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are sampled.

    Attributes:
        max_new_tokens: limit of generated tokens; None for 512, or fewer if the context ends earlier.
        temperature: divides the logits; 0 means greedy decoding.
        top_k: sample from the k most likely tokens; 0 disables the limit.
        top_p: nucleus sampling from the most likely tokens with this total probability; 1 disables the limit.
        min_p: only tokens with at least this fraction of the highest probability (arXiv 2407.01082); 0 disables the
            limit.
        repetition_penalty: divides positive logits and multiplies negative logits of tokens that occurred before
            (arXiv 1909.05858); 1 disables it.
        seed: random seed; None for a new one each time.
        stop: strings that end the answer and are not part of it.
        ignore_eos: continue after eos (for benchmarks).
        logprobs: return the log probability of each token and of this many most likely tokens, before temperature,
            penalties and bias; None returns none.
        presence_penalty: subtracted from the logits of tokens that the answer already contains, from -2 to 2, as in
            OpenAI's API; tokens of the prompt do not count.
        frequency_penalty: the same, multiplied by how often the answer contains the token.
        logit_bias: added to the logits of these token ids, from -100 to 100, as in OpenAI's API.
        min_tokens: the answer cannot end by eos, `stop_token_ids` or `stop` within this number of tokens, as in vLLM.
        stop_token_ids: tokens that end the answer as eos does, also with `ignore_eos`, as in vLLM; they are not part
            of it.
        json_schema, regex, choice, grammar: the answer is JSON of this schema, matches this regular expression, is one
            of these texts, or follows this grammar (Lark, or GBNF as in llama.cpp); at most one of them. An answer that
            ends by "length" can be incomplete.

    Raises:
        UsageError: a value is out of range; the message states the allowed values.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    json_schema: Mapping[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        limit, penalties = self.max_new_tokens, f"from {-MAX_PENALTY:g} to {MAX_PENALTY:g}"
        for name, allowed, good in (
            ("max_new_tokens", "1 or more", limit is None or limit >= 1),
            ("min_tokens", "from 0 to max_new_tokens", 0 <= self.min_tokens <= (math.inf if limit is None else limit)),
            ("temperature", "0 or more", 0 <= self.temperature < math.inf),
            ("top_k", "0 or more", self.top_k >= 0),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("min_p", "from 0 to 1", 0 <= self.min_p <= 1),
            ("logprobs", "0 or more", self.logprobs is None or self.logprobs >= 0),
            ("repetition_penalty", "above 0", 0 < self.repetition_penalty < math.inf),
            ("presence_penalty", penalties, abs(self.presence_penalty) <= MAX_PENALTY),
            ("frequency_penalty", penalties, abs(self.frequency_penalty) <= MAX_PENALTY),
            ("logit_bias", f"from {-MAX_BIAS:g} to {MAX_BIAS:g}",
             all(abs(bias) <= MAX_BIAS for bias in (self.logit_bias or {}).values())),
            ("seed", "from 0 to 2**63 - 1", self.seed is None or 0 <= self.seed < 2**63),
        ):
            if not good:
                raise UsageError(f"{name} {getattr(self, name)} is not allowed", f"It must be {allowed}.")

    @property
    def structure(self) -> tuple[str, Any]:
        """Name and value of the option that constrains the answer; ("", None) without one."""
        given = [(name, getattr(self, name)) for name in STRUCTURES]
        return next(((name, value) for name, value in given if value not in (None, ())), ("", None))

    def check_vocabulary(self, size: int) -> None:
        """Check that the token ids of `logit_bias` and `stop_token_ids` are in a vocabulary of `size` tokens.

        Raises:
            UsageError: the option and the first token id that is not.
        """
        for name, ids in (("logit_bias", self.logit_bias or ()), ("stop_token_ids", self.stop_token_ids)):
            if (wrong := next((token for token in ids if not 0 <= token < size), None)) is not None:
                raise UsageError(f"{name}: token id {wrong} is not in the vocabulary of {size}",
                                 "Use the tokenizer of this model.")


def _check_types(params: SamplingParams) -> None:
    """Raise UsageError for a value of another type; bool is not a number here."""
    for names, kind, noun in ((("max_new_tokens", "top_k", "seed", "logprobs", "min_tokens"), Integral, "an integer"),
                              (("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
                                "frequency_penalty"), Real, "a number")):
        for name in names:
            value = getattr(params, name)
            optional = value is None and name in ("max_new_tokens", "seed", "logprobs")
            if not optional and not _is_number(value, kind):
                raise UsageError(f"{name} {value!r} is of type {type(value).__name__}", f"It must be {noun}.")
    bias, ends = params.logit_bias, params.stop_token_ids
    if bias is not None and not (isinstance(bias, Mapping) and all(_is_number(token, Integral) for token in bias)
                                 and all(_is_number(value, Real) for value in bias.values())):
        raise UsageError(f"logit_bias {bias!r} is not a mapping of token ids to numbers", "Give a dictionary or None.")
    given = [name for name in STRUCTURES if getattr(params, name) not in (None, ())]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other", "Give one of them.")
    for name, kinds in (("json_schema", Mapping), ("regex", str), ("choice", tuple), ("grammar", str)):
        value = getattr(params, name)
        if value is not None and not isinstance(value, kinds):
            raise UsageError(f"{name} {value!r} is of type {type(value).__name__}", f"Give a {kinds.__name__.lower()}.")
    if isinstance(ends, str) or not isinstance(ends, Sequence) or not all(_is_number(t, Integral) for t in ends):
        raise UsageError(f"stop_token_ids {ends!r} is not a tuple of token ids", "Give a tuple of integers.")
    if isinstance(params.stop, str) or not isinstance(params.stop, Sequence) or not all(
            isinstance(text, str) for text in params.stop):
        raise UsageError(f"stop {params.stop!r} is not a tuple of strings", "Give a tuple of strings.")


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


# What `generate`, `chat`, the server and the chat page use if nothing else is given: the settings of the model cards
# of BELLE (huggingface.co/BelleGroup/BELLE-7B-2M). The default of the class is greedy decoding.
DEFAULT_SAMPLING = SamplingParams(temperature=0.35, top_k=30, top_p=0.85, repetition_penalty=1.2)


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams` as keyword arguments."""

    max_new_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    min_p: float
    logprobs: int | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    min_tokens: int
    stop_token_ids: tuple[int, ...]
    json_schema: Mapping[str, Any] | None
    regex: str | None
    choice: tuple[str, ...]
    grammar: str | None


def sampling_params(params: SamplingParams | None, **options: Unpack[SamplingOptions]) -> SamplingParams:
    """Return `params`, or the defaults, with the given options replaced.

    Raises:
        UsageError: an unknown option, or a value is out of range.
    """
    if not isinstance(params, SamplingParams | None):
        raise UsageError(f"params are of type {type(params).__name__}, not SamplingParams",
                         "Give gptq_belle.SamplingParams(...), or the options by name.")
    known = [field.name for field in fields(SamplingParams)]
    for name in options:
        if name not in known:
            raise UsageError(f"sampling option {name!r} is unknown", f"The options are {', '.join(known)}.")
    return replace(params or SamplingParams(), **options)
