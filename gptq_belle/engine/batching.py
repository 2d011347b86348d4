"""Continuous batching: requests share one KV cache, one slot each, and every step advances all of them.

A step prefills one chunk of the oldest incomplete prompt, then decodes one token for every request whose prompt is
complete. A free slot keeps its contents: a request whose prompt begins with the same tokens (the earlier turns of a
chat) reuses them. New prompts take the slot that was not used for the longest time; its contents go to the prefix cache
of the model, if there is one. On a CPU every request gets the same bits as it would get alone.
"""

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptq_belle.engine.finite_check import cache_overflow, explain_nonfinite, nonfinite_cache_block, nonfinite_rows
from gptq_belle.engine.logits_model import LogitsModel
from gptq_belle.engine.prompt_arguments import new_token_limit
from gptq_belle.engine.sampling import sample_tokens
from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.engine.slot_table import SlotTable
from gptq_belle.engine.slots import DecodingRow, Event, Request, Slot
from gptq_belle.engine.token_constraint import TokenConstraint
from gptq_belle.errors import GptqBelleError

if TYPE_CHECKING:
    from gptq_belle.engine.fused_decoding import FusedDecoding


class Engine:
    """Runs requests on one model with continuous batching. On a GPU, creating it compiles the kernels of its steps.

    Args:
        model: from `gptq_belle.load`.
        slots: number of requests answered at a time; others wait.
        capacity: limit of prompt and answer tokens per request; default: the model's context.
    Attributes:
        slots, capacity: as given.
    Raises:
        HardwareError: not enough memory for the KV cache.
    """

    def __init__(self, model: LogitsModel, slots: int = 1, capacity: int | None = None) -> None:
        self.model, self.slots = model, slots
        self.capacity = min(capacity or model.context or 2048, model.context or 1 << 30)
        self.cache = model.new_cache(slots, self.capacity)
        model.warm_up(slots, self.capacity)
        model.fused_decoding(self.cache, 1)  # allocates its buffers, so that memory is not missing later
        self._table = SlotTable(self.cache, model.prefix_cache)
        self._waiting: deque[Request] = deque()

    @property
    def idle(self) -> bool:
        """Whether no request is running or waiting."""
        return not self._waiting and not self._table.active

    @property
    def requests(self) -> list[Request]:
        """Running requests, then waiting ones."""
        return [slot.request for slot in self._table.active if slot.request is not None] + list(self._waiting)

    @property
    def used(self) -> float:
        """Share of the cache's positions used by running requests."""
        used = sum(len(slot.cached) for slot in self._table.active)
        return used / (self.slots * self.capacity)

    def submit(self, ids: Sequence[int], params: SamplingParams,
               constraint: TokenConstraint | None = None) -> Request:
        """Queue a request; `step` runs it.

        Args:
            ids: token ids of the prompt.
            params: without `max_new_tokens`, the answer is limited by the capacity and DEFAULT_MAX_NEW_TOKENS.
            constraint: from `Model.constraint`; eos ends such an answer also with `ignore_eos`.
        Raises:
            UsageError: no ids, ids outside the vocabulary, also in `params`, or a prompt and answer that exceed the
                capacity.
        """
        self.model.check_ids(torch.tensor([list(ids)], dtype=torch.int64))
        params.check_vocabulary(self.model.vocabulary_size)
        limit = new_token_limit(len(ids), params.max_new_tokens, self.capacity)
        endless = params.ignore_eos and constraint is None
        ends = frozenset(params.stop_token_ids) | (frozenset() if endless else self.model.eos_ids)
        request = Request(list(ids), params, limit, ends, constraint)
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request that is no longer needed; no effect on one that has ended."""
        if request.finished is None:
            request.finished = "cancelled"
            if request in self._waiting:
                self._waiting.remove(request)
        for slot in self._table.slots:
            if slot.request is request:
                slot.request = None

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Prefill a chunk of the oldest incomplete prompt, then decode one token for every complete one.

        Returns:
            new tokens and ends of requests; empty if only a part of a prompt was prefilled. A request whose logits or
            cached keys are not finite ends with an error that names the layer.
        """
        while self._waiting and self._table.free:
            self._table.admit(self._waiting.popleft())
        events: list[Event] = []
        active = self._table.begin_step()
        incomplete = [slot for slot in active if slot.request and len(slot.cached) < len(slot.request.ids)]
        decoding = [slot for slot in active if slot not in incomplete]
        if incomplete:
            slot = min(incomplete, key=lambda slot: slot.admitted)
            try:
                events += self._prefill(slot)
            except Exception as error:  # of this request only, such as memory that is missing for its chunk
                events.append(self._fail(slot, error))
        if decoding:
            events += self._decode(decoding)
        return events

    def release(self) -> None:
        """Save the prompts of all slots in the model's prefix cache, if it has one; for an engine that is dropped."""
        self._table.release()

    def check_device(self) -> None:
        """Raise the error of a device that cannot be used any more: those of CUDA last until the process ends."""
        torch.zeros(1, device=self.model.device).item()

    def _prefill(self, slot: Slot) -> list[Event]:
        """Prefill the next chunk. A prompt that is not started yet first takes what older ones share with it."""
        request = slot.request
        assert request is not None
        if len(slot.cached) == request.reused:
            self._table.share(slot)
        start = len(slot.cached)
        chunk = request.ids[start : start + self.model.prefill_chunk]
        ids = torch.tensor(chunk, device=self.model.device)
        logits = self.model.prefill_slot(ids, self.cache, slot.number, start)
        slot.cached += chunk
        slot.prefilled = len(slot.cached)
        if len(slot.cached) == len(request.ids):
            same = [other for other in self._table.slots if other is not slot and other.request is not None
                    and len(other.cached) < len(other.request.ids) and other.request.ids == request.ids]
            for other in same:  # other answers to the same prompt
                self._table.reuse(slot, other, len(request.ids))
            return self._sample([slot, *same], logits.expand(1 + len(same), -1))
        error = self._cache_error(slot)
        return [] if error is None else [self._fail(slot, error)]

    def _decode(self, slots: Sequence[Slot]) -> list[Event]:
        if (fused := self.model.fused_decoding(self.cache, len(slots))) is not None:
            return self._decode_fused(fused, slots)
        tokens = [slot.request.answer[-1] for slot in slots if slot.request is not None]
        logits = self.model.decode_slots(torch.tensor(tokens, device=self.model.device), self.cache,
                                         [slot.number for slot in slots],
                                         [len(slot.cached) for slot in slots])
        for slot, token in zip(slots, tokens, strict=True):
            slot.cached.append(token)
        return self._sample(slots, logits)

    def _decode_fused(self, fused: "FusedDecoding", slots: Sequence[Slot]) -> list[Event]:
        """Decode one token per slot. The GPU chooses it, or else leaves the logits of the row to the host.

        The random numbers of a step that was queued ahead and dropped are not lost: a sampler goes on by one number for
        each token that is read.
        """
        rows = [DecodingRow(slot.number, len(slot.cached), slot.request.answer[-1], slot.sampler,
                            slot.request.max_new_tokens - len(slot.request.answer))
                for slot in slots if slot.request is not None and slot.sampler is not None]
        result = fused.step(rows)
        for slot, row in zip(slots, rows, strict=True):
            slot.cached.append(row.token)
        failed = _grammar_errors(slots)  # while the GPU computes
        tokens, finite = result.read()
        failed |= self._due_cache_errors(slots) | {
            index: explain_nonfinite(self.model, slots[index].cached, self.cache, rows[index].slot)
            for index, is_finite in enumerate(finite) if not is_finite}
        events, hosted = [self._fail(slots[index], error) for index, error in failed.items()], []
        for index, row in enumerate(rows):
            if index not in failed and row.sampler.needs_host:
                hosted.append(index)
            elif index not in failed:
                row.sampler.accept(tokens[index])
                events.append(self._accept(slots[index], tokens[index], None))
        if hosted:
            logits = torch.stack([result.logits[index] for index in hosted])
            events += self._sample_finite([slots[index] for index in hosted], logits)
        return events

    def _sample(self, slots: Sequence[Slot], logits: Tensor) -> list[Event]:
        if not (failed := self._find_errors(slots, logits)):
            return self._sample_finite(slots, logits)
        events = [self._fail(slots[row], error) for row, error in failed.items()]
        rows = [row for row in range(len(slots)) if row not in failed]
        return events + (self._sample_finite([slots[row] for row in rows], logits[rows]) if rows else [])

    def _sample_finite(self, slots: Sequence[Slot], logits: Tensor) -> list[Event]:
        tokens = sample_tokens([slot.sampler for slot in slots if slot.sampler is not None], logits)
        return [self._accept(slot, token, row) for slot, token, row in zip(slots, tokens, logits, strict=True)]

    def _find_errors(self, slots: Sequence[Slot], logits: Tensor) -> dict[int, GptqBelleError]:
        """Errors by row: logits (n, V) or keys in the cache that are not finite, or grammars that cannot continue."""
        failed: dict[int, GptqBelleError] = {
            row: explain_nonfinite(self.model, slots[row].cached, self.cache, slots[row].number)
            for row in nonfinite_rows(logits)}
        return _grammar_errors(slots) | self._due_cache_errors(slots) | failed

    def _due_cache_errors(self, slots: Sequence[Slot]) -> dict[int, GptqBelleError]:
        """Errors by row, for keys and values in the cache that are not finite, where a check is due."""
        errors = {row: self._cache_error(slot) for row, slot in enumerate(slots) if slot.is_check_due}
        return {row: error for row, error in errors.items() if error is not None}

    def _cache_error(self, slot: Slot) -> GptqBelleError | None:
        """Error if keys or values that were added since the last check exceed the range of the cache."""
        block = nonfinite_cache_block(self.cache, slot.number, slot.checked, len(slot.cached))
        slot.checked = len(slot.cached)
        return None if block is None else cache_overflow(self.model, block)

    def _fail(self, slot: Slot, error: Exception) -> Event:
        """End the request of a slot with an error; nothing of the slot is reused."""
        request = slot.request
        assert request is not None
        request.finished, slot.request = "error", None
        slot.clear()
        return Event(request, None, "error", error=error)

    def _accept(self, slot: Slot, token: int, logits: Tensor | None) -> Event:
        """Add a sampled token to the slot's answer, or end it; logits (V,) are needed for log probabilities only."""
        request = slot.request
        assert request is not None
        if token in request.ends:
            request.end, request.finished, slot.request = token, "stop", None
            return Event(request, None, "stop")
        request.answer.append(token)
        if len(request.answer) == request.max_new_tokens:
            request.finished, slot.request = "length", None
        if request.params.logprobs is None or logits is None:
            return Event(request, token, request.finished)
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(request.params.logprobs)
        *values, own = torch.cat((best.values, logprobs[token, None])).tolist()
        return Event(request, token, request.finished, own, list(zip(best.indices.tolist(), values, strict=True)))


def _grammar_errors(slots: Sequence[Slot]) -> dict[int, GptqBelleError]:
    """Compute the next tokens of answers that follow a grammar; errors by row where that is not possible."""
    constraints = [None if slot.request is None else slot.request.constraint for slot in slots]
    errors = {row: constraint.advance() for row, constraint in enumerate(constraints) if constraint is not None}
    return {row: error for row, error in errors.items() if error is not None}
