"""Requests, the events of their answers, and the slots of the KV cache with what a later prompt can reuse of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gptq_belle.engine.sampling import Sampler
from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.engine.token_constraint import TokenConstraint
from gptq_belle.models.sizes import QUERY_BLOCK


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
        cached: token ids whose keys and values are in the cache.
        prefilled: how many of them come from prefill. Those of an answer were computed one by one, which rounds
            differently, so they are not reused.
        checked: how many of them are known to fit the range of the cache.
        admitted: number of requests that were admitted before this one; orders the prompts by age.
        last_used: number of the last step that ran the slot's request or reused its contents.
    """

    cached: list[int] = field(default_factory=list)
    prefilled: int = 0
    checked: int = 0
    admitted: int = 0
    last_used: int = 0
    request: Request | None = None
    sampler: Sampler | None = None


class DecodingRow(NamedTuple):
    """One sequence in a fused decode step."""

    slot: int
    length: int  # cached tokens
    token: int  # the input
    sampler: Sampler
    remaining: int  # how many tokens can follow


def reusable_tokens(slot: Slot, request: Request) -> int:
    """Number of prompt tokens, except the last one, that a slot has keys and values of: a multiple of QUERY_BLOCK,
    because the results of whole query blocks do not depend on the tokens after them."""
    most = min(slot.prefilled, len(request.ids) - 1)
    same = next((i for i in range(most) if slot.cached[i] != request.ids[i]), most)
    return same // QUERY_BLOCK * QUERY_BLOCK


def continues(slot: Slot, request: Request) -> bool:
    """Whether the prompt begins with all that can be reused of a slot, as the next turn of a chat does."""
    whole = slot.prefilled // QUERY_BLOCK * QUERY_BLOCK
    return slot.cached[:whole] == request.ids[:whole]


def eviction_order(slot: Slot) -> tuple[bool, int]:
    """Sort key of free slots: those without anything to reuse first, then the least recently used."""
    return slot.prefilled >= QUERY_BLOCK, slot.last_used
