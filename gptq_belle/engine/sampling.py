"""Sampling of the next token from logits."""

import math
import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gptq_belle.engine.logit_rules import MIN_FACTOR, LogitRules
from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.engine.token_constraint import TokenConstraint


class Sampler:
    """Sampling state of one answer: parameters, random numbers, and the tokens that occurred before.

    Args:
        params: sampling parameters.
        prompt: (T,) token ids of the prompt; the repetition penalty counts them as tokens that occurred before.
        device: device of the logits.
        ends: tokens that end the answer; they are excluded from its first `params.min_tokens` tokens.
    """

    def __init__(self, params: SamplingParams, prompt: Iterable[int], device: torch.device,
                 ends: Iterable[int] = (), constraint: TokenConstraint | None = None) -> None:
        self.params = params
        self.rules = LogitRules(params, prompt, ends, device, constraint)
        seed = random.SystemRandom().randrange(2**63) if params.seed is None else params.seed
        self.random = random.Random(seed)

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is the most likely one, and nothing else of the logits is asked for."""
        return self.params.temperature == 0 and self.params.logprobs is None and not self.rules.active

    @property
    def needs_host(self) -> bool:
        """Whether fused decode steps on a GPU cannot sample as the parameters ask."""
        return self.params.logprobs is not None or self.rules.need_host

    def next_numbers(self, count: int) -> list[float]:
        """The random numbers of the next `count` tokens, which remain the next ones."""
        if self.params.temperature == 0:
            return [0.0] * count
        state = self.random.getstate()
        numbers = [self.random.random() for _ in range(count)]
        self.random.setstate(state)
        return numbers

    def accept(self, token: int) -> None:
        """Take over a token that the GPU has sampled with the next random number."""
        if self.params.temperature > 0:
            self.random.random()
        self.rules.remember(token)

    def __call__(self, logits: Tensor) -> int:
        """Sample the next token from logits (V,), and remember it."""
        return sample_tokens([self], logits[None])[0]


def sample_tokens(samplers: Sequence[Sampler], logits: Tensor) -> list[int]:
    """Sample the next token of each row of logits (n, V) with its sampler, which remembers it.

    The token of a row depends only on its logits and its sampler. On a GPU, all rows are sampled at once.
    """
    logits = logits.float()
    if ruled := [row for row, sampler in enumerate(samplers) if sampler.rules.active]:
        logits = logits.clone()
        for row in ruled:
            logits[row] = samplers[row].rules.apply(logits[row])
    tokens = logits.argmax(-1)
    random_rows = [row for row, sampler in enumerate(samplers) if sampler.params.temperature > 0]
    for rows in [random_rows] if logits.is_cuda and random_rows else [[row] for row in random_rows]:
        index = torch.tensor(rows, device=logits.device)  # CUDA copies it once; a list would be copied for each use
        tokens[index] = sample_inverse_cdf(logits[index], [samplers[row].params for row in rows],
                                           [samplers[row].random.random() for row in rows])
    found: list[int] = tokens.tolist()
    for sampler, token in zip(samplers, found, strict=True):
        sampler.rules.remember(token)
    return found


def sample_inverse_cdf(logits: Tensor, params: Sequence[SamplingParams], numbers: Sequence[float]) -> Tensor:
    """Sample tokens (n,) from logits (n, V): invert the cumulative distribution at one number in [0, 1) per row."""
    temperatures, targets = _columns(logits.device, [max(p.temperature, MIN_FACTOR) for p in params], numbers)
    values, order = filter_logits(logits / temperatures.to(logits.dtype), params)
    total = values.double().softmax(-1).cumsum(-1)
    places = torch.searchsorted(total, targets * total[:, -1:], right=True)
    last = values.isfinite().sum(-1, keepdim=True) - 1
    return order.gather(-1, places.clamp_(max=last)).squeeze(-1)


def filter_logits(logits: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Apply top_k, top_p and min_p, in this order, to logits (n, V). At least one token per row is kept.

    Returns:
        logits (n, V) in descending order, minus infinity for excluded tokens; their token ids (n, V).
    """
    values, order = logits.sort(stable=True, dim=-1, descending=True)
    width = logits.shape[-1]
    counts, top_p, min_p = _columns(values.device, [min(p.top_k or width, width) for p in params],
                                    [p.top_p for p in params], [p.min_p for p in params]).to(values.dtype)
    values = values.masked_fill(torch.arange(width, device=values.device) >= counts, -math.inf)
    probabilities = values.softmax(-1)
    enough = probabilities.cumsum(-1) - probabilities >= top_p
    unlikely = probabilities < min_p * probabilities[:, :1]
    enough &= top_p < 1
    enough[:, 0] = False  # a top_p that is 0 in float32 still keeps one token
    return values.masked_fill(enough | unlikely, -math.inf), order


def _columns(device: torch.device, *columns: Sequence[float]) -> Tensor:
    """Columns of n numbers as (columns, n, 1) float64, in one copy to a GPU."""
    return torch.tensor(columns, dtype=torch.float64, device=device)[..., None]
