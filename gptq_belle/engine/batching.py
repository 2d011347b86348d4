"""Many answers at a time: requests come and go, each in a slot of one cache, and every step moves all of them on.

A step reads a piece of one prompt, then decodes one token for every request whose prompt is read. A free slot keeps
what it held: a request that begins with the same tokens (a chat's earlier turns) takes it over. On a CPU each request
gets exactly, to the bit, what it would get alone.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.engine.attention import QUERIES
from gptq_belle.engine.logits_model import CHUNK, MOST_NEW_TOKENS, Tokens
from gptq_belle.engine.sampling import Sampler, SamplingParams, draw
from gptq_belle.errors import UsageError


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and its answer so far.

    Attributes:
        ids: of the prompt.
        params: how the answer is drawn.
        room: the most tokens of the answer.
        answer: token ids so far; eos is not among them.
        end: the eos that ended it, if one did.
        finished: why it ended: "stop" (eos), "length", "cancelled"; None while it goes on.
        reused: tokens of the prompt that a slot held already.
    """

    ids: list[int]
    params: SamplingParams
    room: int
    answer: list[int] = field(default_factory=list)
    end: int | None = None
    finished: str | None = None
    reused: int = 0


class Event(NamedTuple):
    """What a step did for one request: a token, or its end (both with the last token of a full answer).

    Attributes:
        logprob: the natural logarithm of the token's probability; None unless `SamplingParams.logprobs` asks for it.
        top: the likeliest tokens and theirs, as many as it asks for.
    """

    request: Request
    token: int | None
    finished: str | None
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


@dataclass(slots=True)
class _Slot:
    """A place in the cache.

    Attributes:
        held: token ids whose keys and values lie there.
        read: how many of them came from reading prompts; those of answers were computed one by one, which rounds
            otherwise, so they are read again.
    """

    held: list[int] = field(default_factory=list)
    read: int = 0
    request: Request | None = None
    sampler: Sampler | None = None


class Engine:
    """Slots for requests on one model.

    Args:
        model: from `gptq_belle.load`.
        slots: requests that are answered at a time; further ones wait.
        capacity: tokens of prompt and answer together, for each; left out, the model's context.
    Attributes:
        slots, capacity: as they are.
    Raises:
        HardwareError: no memory for so many keys and values.
    """

    def __init__(self, model: Tokens, slots: int = 1, capacity: int | None = None) -> None:
        self.model, self.slots = model, slots
        self.capacity = min(capacity or model.context or 2048, model.context or 1 << 30)
        self.cache = model.new_cache(slots, self.capacity)
        self._slots = [_Slot() for _ in range(slots)]
        self._waiting: deque[Request] = deque()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and all(slot.request is None for slot in self._slots)

    @property
    def requests(self) -> list[Request]:
        """Those that are being answered, then those that wait."""
        return [slot.request for slot in self._slots if slot.request is not None] + list(self._waiting)

    @property
    def used(self) -> float:
        """Share of the cache's positions that requests have filled."""
        held = sum(len(slot.held) for slot in self._slots if slot.request is not None)
        return held / (self.slots * self.capacity)

    def submit(self, ids: Sequence[int], params: SamplingParams) -> Request:
        """Put a request in line; `step` does the work.

        Args:
            ids: of the prompt.
            params: `max_new_tokens` left out means what the capacity leaves, MOST_NEW_TOKENS at most.
        Raises:
            UsageError: no ids, ids that are not in the vocabulary, or no room for prompt and answer.
        """
        self.model.check_ids(torch.tensor([list(ids)], dtype=torch.int64))
        room = self.capacity - len(ids)
        if room < max(1, params.max_new_tokens or 1):
            wanted = f" and {params.max_new_tokens} new ones" if params.max_new_tokens else " and an answer"
            raise UsageError(f"a prompt of {len(ids)} tokens{wanted} do not fit into {self.capacity}",
                             "Shorten the prompt, or ask for fewer new tokens.")
        request = Request(list(ids), params, params.max_new_tokens or min(room, MOST_NEW_TOKENS))
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request that nobody waits for any more; one that has ended is left as it is."""
        if request.finished is None:
            request.finished = "cancelled"
            if request in self._waiting:
                self._waiting.remove(request)
        for slot in self._slots:
            if slot.request is request:
                slot.request = None

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Move on: a piece of the oldest prompt that is not read yet, then one token for all that are.

        Returns:
            what came out, none where only a part of a prompt was read.
        """
        self._admit()
        events: list[Event] = []
        reading = [slot for slot in self._slots if slot.request is not None and len(slot.held) < len(slot.request.ids)]
        going = [slot for slot in self._slots if slot.request is not None and slot not in reading]
        if reading:
            events += self._read(reading[0])
        if going:
            logits = self.model.step(
                torch.tensor([_last(slot) for slot in going], device=self.model.device), self.cache,
                [self._slots.index(slot) for slot in going], [len(slot.held) for slot in going])
            for slot in going:
                slot.held.append(_last(slot))
            events += self._drawn(going, logits)
        return events

    def _admit(self) -> None:
        """Give free slots to those that wait, with what any slot holds of their prompts."""
        while self._waiting and (free := [slot for slot in self._slots if slot.request is None]):
            request = self._waiting.popleft()
            source = max(self._slots, key=lambda slot: _shared(slot, request))
            slot, shared = min(free, key=lambda slot: len(slot.held)), _shared(source, request)
            if source in free and len(source.held) - shared <= len(slot.held):
                slot = source  # less is lost by going on there
            elif shared:
                self.cache.copy(self._slots.index(source), self._slots.index(slot), shared)
            slot.held, slot.read, request.reused = request.ids[:shared], shared, shared
            slot.request, slot.sampler = request, Sampler(request.params, request.ids, self.model.device)

    def _read(self, slot: _Slot) -> list[Event]:
        assert slot.request is not None
        start = len(slot.held)
        piece = slot.request.ids[start : start + CHUNK]
        logits = self.model.read(torch.tensor(piece, device=self.model.device), self.cache, self._slots.index(slot),
                                 start)
        slot.held += piece
        slot.read = len(slot.held)
        return self._drawn([slot], logits) if len(slot.held) == len(slot.request.ids) else []

    def _drawn(self, slots: Sequence[_Slot], logits: Tensor) -> list[Event]:
        samplers = [slot.sampler for slot in slots if slot.sampler is not None]
        tokens = draw(samplers, logits)
        return [self._take(slot, token, row) for slot, token, row in zip(slots, tokens, logits, strict=True)]

    def _take(self, slot: _Slot, token: int, logits: Tensor) -> Event:
        request = slot.request
        assert request is not None
        if token in self.model.eos_ids and not request.params.ignore_eos:
            request.end, request.finished, slot.request = token, "stop", None
            return Event(request, None, "stop")
        request.answer.append(token)
        if len(request.answer) == request.room:
            request.finished, slot.request = "length", None
        if request.params.logprobs is None:
            return Event(request, token, request.finished)
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(request.params.logprobs)
        top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Event(request, token, request.finished, float(logprobs[token]), top)


def _last(slot: _Slot) -> int:
    assert slot.request is not None
    return slot.request.answer[-1]


def _shared(slot: _Slot, request: Request) -> int:
    """Tokens of a prompt, the last one excepted, that a slot can give: whole pieces of QUERIES, which come out the same
    whether they are read alone or with what stands behind them."""
    most = min(slot.read, len(request.ids) - 1)
    same = next((i for i in range(most) if slot.held[i] != request.ids[i]), most)
    return same // QUERIES * QUERIES
