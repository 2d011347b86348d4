"""Requests, the events of their answers, and the slots of the KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gptq_belle.engine.sampling import Sampler
from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.engine.token_constraint import TokenConstraint

CACHE_CHECK_INTERVAL = 64  # decode steps between checks of the cache: a check takes 5 us per block, once in that many


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and its answer so far.

    Attributes:
        ids: token ids of the prompt.
        params: sampling parameters.
        max_new_tokens: limit of the answer's length.
        ends: tokens that end the answer: the model's eos and `SamplingParams.stop_token_ids`.
        constraint: the grammar of the answer, if any.
        answer: token ids so far, without the one of `ends`.
        end: the token of `ends` that ended it, if any.
        finished: finish reason: "stop" (a token of `ends`), "length", "cancelled" or "error"; None while it is running.
        reused: number of prompt tokens taken from the cache.
    """

    ids: list[int]
    params: SamplingParams
    max_new_tokens: int
    ends: frozenset[int] = frozenset()
    constraint: TokenConstraint | None = None
    answer: list[int] = field(default_factory=list)
    end: int | None = None
    finished: str | None = None
    reused: int = 0


class Event(NamedTuple):
    """Result of one step for one request: a token, the end of the answer, or both.

    Attributes:
        logprob: natural logarithm of the token's probability; None unless `SamplingParams.logprobs` is set.
        top: the requested number of most likely tokens with their log probabilities.
        error: why the answer cannot be continued if `finished` is "error"; other requests are not affected.
    """

    request: Request
    token: int | None
    finished: str | None
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()
    error: Exception | None = None


@dataclass(slots=True)
class Slot:
    """One sequence of the cache.

    Attributes:
        number: its place in the cache.
        cached: token ids whose keys and values are in the cache.
        prefilled: how many of them come from prefill. Those of an answer were computed one by one, which rounds
            differently, so they are not reused.
        checked: how many of them are known to fit the range of the cache.
        admitted: number of requests that were admitted before this one; orders the prompts by age.
        last_used: number of the last step that ran the slot's request or reused its contents.
    """

    number: int
    cached: list[int] = field(default_factory=list)
    prefilled: int = 0
    checked: int = 0
    admitted: int = 0
    last_used: int = 0
    request: Request | None = None
    sampler: Sampler | None = None

    def clear(self) -> None:
        """Forget the contents, so that nothing of them is reused."""
        self.cached, self.prefilled, self.checked = [], 0, 0

    @property
    def is_check_due(self) -> bool:
        """Whether the next token needs a check of the cache: its last token, the first one, and every 64th."""
        assert self.request is not None
        last = len(self.request.answer) + 1 == self.request.max_new_tokens
        return last or self.checked < self.prefilled or len(self.cached) - self.checked >= CACHE_CHECK_INTERVAL


class DecodingRow(NamedTuple):
    """One sequence in a fused decode step."""

    slot: int
    length: int  # cached tokens
    token: int  # the input
    sampler: Sampler
    remaining: int  # how many tokens can follow
