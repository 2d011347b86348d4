"""From logits to the next token."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_belle.errors import UsageError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an answer is drawn.

    Attributes:
        max_new_tokens: the most tokens to generate; None for as many as the context leaves room for, 512 at most.
        temperature: divides the logits; 0 takes the likeliest token each time (greedy).
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together have this probability; 1 for all.
        repetition_penalty: tokens that stood before have positive logits divided, negative ones multiplied by it
            (Keskar et al., 1909.05858); 1 for none.
        seed: of the draw; None for a new one each time.
        stop: strings that end the answer and are not part of it.
        ignore_eos: go on behind eos (for benchmarks).

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

    def __post_init__(self) -> None:
        for name, allowed, good in (
            ("max_new_tokens", "1 or more", self.max_new_tokens is None or self.max_new_tokens >= 1),
            ("temperature", "0 or more", 0 <= self.temperature < math.inf),
            ("top_k", "0 or more", self.top_k >= 0),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("repetition_penalty", "above 0", 0 < self.repetition_penalty < math.inf),
            ("seed", "from 0 to 2**63 - 1", self.seed is None or 0 <= self.seed < 2**63),
        ):
            if not good:
                raise UsageError(f"{name} {getattr(self, name)} is not allowed", f"It must be {allowed}.")
        if isinstance(self.stop, str):
            raise UsageError(f"stop {self.stop!r} is one string", "Give a tuple of strings.")


class Sampler:
    """Draws the tokens of one sequence; keeps the generator and what stood before.

    Args:
        params: how to draw.
        prompt: (T,) token ids that count as having stood before.
        device: where the logits will be.
    """

    def __init__(self, params: SamplingParams, prompt: Iterable[int], device: torch.device) -> None:
        self._params = params
        self._before = torch.tensor(sorted(set(prompt)), dtype=torch.long, device=device)
        self._generator = torch.Generator(device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def __call__(self, logits: Tensor) -> int:
        """The next token for logits (V,); it counts as having stood before from now on."""
        logits = logits.float()
        if self._params.repetition_penalty != 1:
            logits = penalized(logits, self._before, self._params.repetition_penalty)
        token = self._draw(logits)
        if self._params.repetition_penalty != 1:
            self._before = torch.cat((self._before, token)).unique()
        return int(token)

    def _draw(self, logits: Tensor) -> Tensor:
        if self._params.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        logits = kept(logits / self._params.temperature, self._params.top_k, self._params.top_p)
        return logits.softmax(-1).multinomial(1, generator=self._generator)


def penalized(logits: Tensor, before: Tensor, penalty: float) -> Tensor:
    """Logits (V,) with those of the token ids `before` (n,) made less likely."""
    values = logits[before]
    return logits.scatter(0, before, torch.where(values > 0, values / penalty, values * penalty))


def kept(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (V,) with all but the likeliest tokens at minus infinity; at least one is kept.

    Args:
        top_k: how many to keep; 0 for all.
        top_p: keep the fewest likeliest tokens whose probabilities reach this sum; 1 for all.
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -math.inf)
    if top_p < 1:
        values, order = logits.sort(descending=True)
        probabilities = values.softmax(-1)
        enough = probabilities.cumsum(-1) - probabilities >= top_p  # those before it suffice already
        logits = logits.scatter(0, order, values.masked_fill(enough, -math.inf))
    return logits
