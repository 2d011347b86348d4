"""Which slot a request gets, and what its prompt takes from earlier prompts."""

from gptq_belle.engine.kv_cache import KVCache
from gptq_belle.engine.prefix_cache import PrefixCache
from gptq_belle.engine.sampling import Sampler
from gptq_belle.engine.slots import Request, Slot
from gptq_belle.models.sizes import QUERY_BLOCK


class SlotTable:
    """The slots of a KV cache.

    Args:
        cache: the KV cache.
        prefix_cache: where a slot's prompt is saved when another one takes the slot.
    Attributes:
        slots: all slots.
    """

    def __init__(self, cache: KVCache, prefix_cache: PrefixCache | None) -> None:
        self.slots = [Slot(number) for number in range(cache.slots)]
        self._cache, self._prefix_cache = cache, prefix_cache
        self._steps = self._admitted = 0

    @property
    def active(self) -> list[Slot]:
        """Slots with a request."""
        return [slot for slot in self.slots if slot.request is not None]

    @property
    def free(self) -> list[Slot]:
        """Slots without a request."""
        return [slot for slot in self.slots if slot.request is None]

    def begin_step(self) -> list[Slot]:
        """Count a step, and return the slots that it runs."""
        self._steps += 1
        for slot in (active := self.active):
            slot.last_used = self._steps
        return active

    def admit(self, request: Request) -> None:
        """Assign one of the free slots. A slot that the prompt continues is taken as it is."""
        source = max(self.slots, key=lambda slot: (reusable_tokens(slot, request), slot.last_used))
        reusable, slot = reusable_tokens(source, request), min(self.free, key=eviction_order)
        if reusable and source.request is None and continues(source, request):
            slot = source  # nothing that another request could reuse is lost there
        else:
            self._save(slot)
        slot.clear()
        slot.request, slot.admitted = request, self._admitted
        slot.sampler = Sampler(request.params, request.ids, self._cache.device, request.ends, request.constraint)
        self._admitted += 1
        self.reuse(source, slot, reusable)

    def share(self, slot: Slot) -> None:
        """Take what slots and the prefix cache have of a prompt that is not started yet."""
        assert (request := slot.request) is not None
        source = max(self.slots, key=lambda other: reusable_tokens(other, request))
        if (reusable := reusable_tokens(source, request)) > len(slot.cached):
            self.reuse(source, slot, reusable)
        if self._prefix_cache is not None:
            found = self._prefix_cache.load(self._cache, slot.number, request.ids[:-1], len(slot.cached))
            self._set_reused(slot, found)

    def reuse(self, source: Slot, slot: Slot, count: int) -> None:
        """Take the first `count` tokens of a slot's prompt from the cache of `source`, which can be the slot itself."""
        if source is not slot and count:
            self._cache.copy(source.number, slot.number, count)
            source.last_used = self._steps
        self._set_reused(slot, count)

    def release(self) -> None:
        """Save the prompts of all slots, before the KV cache is given up."""
        for slot in sorted(self.slots, key=lambda slot: slot.last_used):
            self._save(slot)

    def _set_reused(self, slot: Slot, count: int) -> None:
        assert slot.request is not None
        slot.cached = slot.request.ids[:count]
        slot.prefilled = slot.checked = slot.request.reused = count

    def _save(self, slot: Slot) -> None:
        if self._prefix_cache is not None:
            self._prefix_cache.save(self._cache, slot.number, slot.cached[: slot.prefilled])


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
