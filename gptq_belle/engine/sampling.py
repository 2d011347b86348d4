"""From logits to the next token."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from gptq_belle.errors import UsageError

# Bounds of temperature and penalty: beyond them float32 has only 0 or infinity, and logits become NaN.
MIN_FACTOR, MAX_FACTOR = 1e-10, 1e10


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are sampled.

    Attributes:
        max_new_tokens: the most tokens to generate; None for as many as the context leaves room for, 512 at most.
        temperature: divides the logits; 0 means greedy decoding.
        top_k: sample from the k most likely tokens; 0 disables the limit.
        top_p: nucleus sampling from the most likely tokens with this total probability; 1 disables the limit.
        min_p: only tokens with at least this share of the likeliest one's probability (2407.01082); 0 for all.
        repetition_penalty: tokens that stood before have positive logits divided, negative ones multiplied by it
            (Keskar et al., 1909.05858); 1 for none.
        seed: random seed; None for a new one each time.
        stop: strings that end the answer and are not part of it.
        ignore_eos: continue after eos (for benchmarks).
        logprobs: tell each token's probability and those of so many of the likeliest ones, as they are before
            temperature and penalty; None to tell none.

    Raises:
        UsageError: a value out of range; the message names it and what is allowed.
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
        if isinstance(self.stop, str):
            raise UsageError(f"stop {self.stop!r} is one string", "Give a tuple of strings.")


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
    """`params`, or the defaults, with the given options changed.

    Raises:
        UsageError: an unknown option, or a value out of range.
    """
    known = [field.name for field in fields(SamplingParams)]
    for name in options:
        if name not in known:
            raise UsageError(f"sampling option {name!r} is unknown", f"The options are {', '.join(known)}.")
    return replace(params or SamplingParams(), **options)


class Sampler:
    """What one answer's tokens are drawn with: its parameters, its random numbers, and what stood before.

    Args:
        params: how to draw.
        prompt: (T,) token ids that count as having stood before.
        device: where the logits will be.
    """

    def __init__(self, params: SamplingParams, prompt: Iterable[int], device: torch.device) -> None:
        self.params = params
        self.before = torch.tensor(sorted(set(prompt)), dtype=torch.long, device=device)
        seed = random.SystemRandom().randrange(2**63) if params.seed is None else params.seed
        self.random = random.Random(seed)

    def __call__(self, logits: Tensor) -> int:
        """The next token for logits (V,); it counts as having stood before from now on."""
        return sample_tokens([self], logits[None])[0]

    def remember(self, token: int) -> None:
        """`token` stood before from now on."""
        if self.params.repetition_penalty != 1:
            self.before = torch.cat((self.before, self.before.new_tensor([token]))).unique()


def sample_tokens(samplers: Sequence[Sampler], logits: Tensor) -> list[int]:
    """The next token of each row of logits (n, V) with its sampler; each counts as having stood before from now on.

    A row's token depends on its logits and its sampler alone. On a GPU all rows are drawn at once.
    """
    logits = logits.float()
    if any(sampler.params.repetition_penalty != 1 for sampler in samplers):
        logits = logits.clone()
    for row, sampler in enumerate(samplers):
        if sampler.params.repetition_penalty != 1:
            logits[row] = apply_repetition_penalty(logits[row], sampler.before, sampler.params.repetition_penalty)
    tokens = logits.argmax(-1)
    warm = [row for row, sampler in enumerate(samplers) if sampler.params.temperature > 0]
    for rows in [warm] if logits.is_cuda and warm else [[row] for row in warm]:
        tokens[rows] = sample_inverse_cdf(logits[rows], [samplers[row].params for row in rows],
                             [samplers[row].random.random() for row in rows])
    found: list[int] = tokens.tolist()
    for sampler, token in zip(samplers, found, strict=True):
        sampler.remember(token)
    return found


def sample_inverse_cdf(logits: Tensor, params: Sequence[SamplingParams], numbers: Sequence[float]) -> Tensor:
    """Tokens (n,) of logits (n, V) by inverting the distribution function at a number in 0..1 for each row."""
    values, order = filter_logits(logits / _column(logits, [max(p.temperature, MIN_FACTOR) for p in params]), params)
    total = values.double().softmax(-1).cumsum(-1)
    places = torch.searchsorted(total, _column(total, numbers) * total[:, -1:], right=True)
    last = values.isfinite().sum(-1, keepdim=True) - 1
    return order.gather(-1, places.clamp_(max=last)).squeeze(-1)


def filter_logits(logits: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Logits (n, V) by falling value, those that top_k, top_p and min_p leave out at minus infinity, and their tokens.

    top_k counts first, then top_p among those that are left, then min_p against the likeliest; one is always kept.
    """
    values, order = logits.sort(stable=True, dim=-1, descending=True)
    width = logits.shape[-1]
    counts = _column(values, [min(p.top_k or width, width) for p in params])
    values = values.masked_fill(torch.arange(width, device=values.device) >= counts, -math.inf)
    probabilities = values.softmax(-1)
    enough = probabilities.cumsum(-1) - probabilities >= _column(values, [p.top_p for p in params])
    unlikely = probabilities < _column(values, [p.min_p for p in params]) * probabilities[:, :1]
    enough &= _column(values, [p.top_p for p in params]) < 1
    enough[:, 0] = False  # a top_p below what float32 holds is 0
    return values.masked_fill(enough | unlikely, -math.inf), order


def apply_repetition_penalty(logits: Tensor, before: Tensor, penalty: float) -> Tensor:
    """Logits (V,) with those of the token ids `before` (n,) made less likely."""
    values, penalty = logits[before], min(max(penalty, MIN_FACTOR), MAX_FACTOR)
    return logits.scatter(0, before, torch.where(values > 0, values / penalty, values * penalty))


def _column(like: Tensor, numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)[:, None]
