"""Changes of logits before sampling: penalties, logit bias, and the minimum length of an answer."""

import math
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.engine.token_constraint import TokenConstraint

# Bounds of temperature and repetition penalty: beyond these, float32 overflows and logits become NaN.
MIN_FACTOR, MAX_FACTOR = 1e-10, 1e10


class LogitRules:
    """The changes that one answer asks for, and the tokens that occurred before.

    Args:
        params: sampling parameters.
        prompt: token ids of the prompt.
        ends: tokens that end the answer.
        device: device of the logits.
        constraint: the grammar of the answer, if any.
    Attributes:
        active: whether logits are changed at all.
        seen: the tokens that the repetition penalty counts; empty without one.
    """

    def __init__(self, params: SamplingParams, prompt: Iterable[int], ends: Iterable[int],
                 device: torch.device, constraint: TokenConstraint | None = None) -> None:
        self._params, self._device, self.constraint = params, device, constraint
        self.seen = set(prompt if params.repetition_penalty != 1 else ())
        self._seen, self._added = self._ids(sorted(self.seen)), list[int]()  # tensor, and tokens to add to it
        self._answer: Counter[int] = Counter()
        self._ends = self._ids(sorted(set(ends if params.min_tokens else ())))
        bias = params.logit_bias or {}
        self._bias = self._ids(list(bias)), torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        self._need_host = bool(params.presence_penalty or params.frequency_penalty or bias or constraint is not None)
        self.active = self._need_host or params.min_tokens > 0 or params.repetition_penalty != 1

    @property
    def need_host(self) -> bool:
        """Whether the next logits are changed by more than the repetition penalty, which fused steps apply on a GPU."""
        return self._need_host or self._answer.total() < self._params.min_tokens

    def apply(self, logits: Tensor) -> Tensor:
        """Change logits (V,) float32 of the next token, in vLLM's order: grammar, bias, minimum length, penalties."""
        params = self._params
        if self.constraint is not None:
            logits = logits.masked_fill(self.constraint.excluded().to(self._device), -math.inf)
        if len(self._bias[0]):
            logits = logits.index_add(0, *self._bias)
        if self._answer.total() < params.min_tokens:
            logits = exclude(logits, self._ends)
        if params.repetition_penalty != 1:
            if self._added:
                self._seen, self._added = torch.cat((self._seen, self._ids(self._added))), []
            logits = apply_repetition_penalty(logits, self._seen, params.repetition_penalty)
        if self._answer and (params.presence_penalty or params.frequency_penalty):
            ids, counts = torch.tensor([list(self._answer), list(self._answer.values())], device=self._device)
            logits = logits.index_add(0, ids, -params.presence_penalty - params.frequency_penalty * counts.float())
        return logits

    def remember(self, token: int) -> None:
        """Count `token` as a token of the answer."""
        if not self.active:
            return
        self._answer[token] += 1
        if self.constraint is not None:
            self.constraint.accept(token)
        if self._params.repetition_penalty != 1 and token not in self.seen:
            self.seen.add(token)
            self._added.append(token)  # copied to the device by `apply`: fused steps do not need it

    def _ids(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self._device)


def exclude(logits: Tensor, ids: Tensor) -> Tensor:
    """Logits (V,) without the token ids (n,); unchanged if no other token is left."""
    left = logits.index_fill(0, ids, -math.inf)
    return torch.where(left.isfinite().any(), left, logits)


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the token ids `seen` (n,) less likely in logits (V,)."""
    values, penalty = logits[seen], min(max(penalty, MIN_FACTOR), MAX_FACTOR)
    return logits.scatter(0, seen, torch.where(values > 0, values / penalty, values * penalty))
