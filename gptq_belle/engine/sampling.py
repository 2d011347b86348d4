"""Sampling of the next token from logits."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from gptq_belle.errors import UsageError

# Bounds of temperature and penalty: beyond these, float32 overflows and logits become NaN.
MIN_FACTOR, MAX_FACTOR = 1e-10, 1e10


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
        logprobs: return the log probability of each token and of this many most likely tokens, before temperature
            and penalty; None returns none.

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

    def __post_init__(self) -> None:
        _check_types(self)
        for name, allowed, good in (
            ("max_new_tokens", "1 or more", self.max_new_tokens is None or self.max_new_tokens >= 1),
            ("temperature", "0 or more", 0 <= self.temperature < math.inf),
            ("top_k", "0 or more", self.top_k >= 0),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("min_p", "from 0 to 1", 0 <= self.min_p <= 1),
            ("logprobs", "0 or more", self.logprobs is None or self.logprobs >= 0),
            ("repetition_penalty", "above 0", 0 < self.repetition_penalty < math.inf),
            ("seed", "from 0 to 2**63 - 1", self.seed is None or 0 <= self.seed < 2**63),
        ):
            if not good:
                raise UsageError(f"{name} {getattr(self, name)} is not allowed", f"It must be {allowed}.")


def _check_types(params: SamplingParams) -> None:
    """Raise UsageError for a value of another type; bool is not a number here."""
    for names, kind, noun in ((("max_new_tokens", "top_k", "seed", "logprobs"), Integral, "an integer"),
                              (("temperature", "top_p", "min_p", "repetition_penalty"), Real, "a number")):
        for name in names:
            value = getattr(params, name)
            optional = value is None and name in ("max_new_tokens", "seed", "logprobs")
            if not optional and (isinstance(value, bool) or not isinstance(value, kind)):
                raise UsageError(f"{name} {value!r} is of type {type(value).__name__}", f"It must be {noun}.")
    if isinstance(params.stop, str) or not isinstance(params.stop, Sequence) or not all(
            isinstance(text, str) for text in params.stop):
        raise UsageError(f"stop {params.stop!r} is not a tuple of strings", "Give a tuple of strings.")


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


def sampling_params(params: SamplingParams | None, **options: Unpack[SamplingOptions]) -> SamplingParams:
    """Return `params`, or the defaults, with the given options replaced.

    Raises:
        UsageError: an unknown option, or a value is out of range.
    """
    known = [field.name for field in fields(SamplingParams)]
    for name in options:
        if name not in known:
            raise UsageError(f"sampling option {name!r} is unknown", f"The options are {', '.join(known)}.")
    return replace(params or SamplingParams(), **options)


class Sampler:
    """Sampling state of one answer: parameters, random numbers, and the tokens that occurred before.

    Args:
        params: sampling parameters.
        prompt: (T,) token ids of the prompt; they count as tokens that occurred before.
        device: device of the logits.
    """

    def __init__(self, params: SamplingParams, prompt: Iterable[int], device: torch.device) -> None:
        self.params = params
        self.seen = torch.tensor(sorted(set(prompt)), dtype=torch.long, device=device)
        seed = random.SystemRandom().randrange(2**63) if params.seed is None else params.seed
        self.random = random.Random(seed)

    def __call__(self, logits: Tensor) -> int:
        """Sample the next token from logits (V,), and remember it."""
        return sample_tokens([self], logits[None])[0]

    def remember(self, token: int) -> None:
        """Count `token` as a token that occurred before."""
        if self.params.repetition_penalty != 1:
            self.seen = torch.cat((self.seen, self.seen.new_tensor([token]))).unique()


def sample_tokens(samplers: Sequence[Sampler], logits: Tensor) -> list[int]:
    """Sample the next token of each row of logits (n, V) with its sampler, which remembers it.

    The token of a row depends only on its logits and its sampler. On a GPU, all rows are sampled at once.
    """
    logits = logits.float()
    if any(sampler.params.repetition_penalty != 1 for sampler in samplers):
        logits = logits.clone()
    for row, sampler in enumerate(samplers):
        if sampler.params.repetition_penalty != 1:
            logits[row] = apply_repetition_penalty(logits[row], sampler.seen, sampler.params.repetition_penalty)
    tokens = logits.argmax(-1)
    random_rows = [row for row, sampler in enumerate(samplers) if sampler.params.temperature > 0]
    for rows in [random_rows] if logits.is_cuda and random_rows else [[row] for row in random_rows]:
        tokens[rows] = sample_inverse_cdf(logits[rows], [samplers[row].params for row in rows],
                                          [samplers[row].random.random() for row in rows])
    found: list[int] = tokens.tolist()
    for sampler, token in zip(samplers, found, strict=True):
        sampler.remember(token)
    return found


def sample_inverse_cdf(logits: Tensor, params: Sequence[SamplingParams], numbers: Sequence[float]) -> Tensor:
    """Sample tokens (n,) from logits (n, V): invert the cumulative distribution at one number in [0, 1) per row."""
    values, order = filter_logits(logits / _column(logits, [max(p.temperature, MIN_FACTOR) for p in params]), params)
    total = values.double().softmax(-1).cumsum(-1)
    places = torch.searchsorted(total, _column(total, numbers) * total[:, -1:], right=True)
    last = values.isfinite().sum(-1, keepdim=True) - 1
    return order.gather(-1, places.clamp_(max=last)).squeeze(-1)


def filter_logits(logits: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Apply top_k, top_p and min_p, in this order, to logits (n, V). At least one token per row is kept.

    Returns:
        logits (n, V) in descending order, minus infinity for excluded tokens; their token ids (n, V).
    """
    values, order = logits.sort(stable=True, dim=-1, descending=True)
    width = logits.shape[-1]
    counts = _column(values, [min(p.top_k or width, width) for p in params])
    values = values.masked_fill(torch.arange(width, device=values.device) >= counts, -math.inf)
    probabilities = values.softmax(-1)
    enough = probabilities.cumsum(-1) - probabilities >= _column(values, [p.top_p for p in params])
    unlikely = probabilities < _column(values, [p.min_p for p in params]) * probabilities[:, :1]
    enough &= _column(values, [p.top_p for p in params]) < 1
    enough[:, 0] = False  # a top_p that is 0 in float32 still keeps one token
    return values.masked_fill(enough | unlikely, -math.inf), order


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the token ids `seen` (n,) less likely in logits (V,)."""
    values, penalty = logits[seen], min(max(penalty, MIN_FACTOR), MAX_FACTOR)
    return logits.scatter(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def _column(like: Tensor, numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)[:, None]
