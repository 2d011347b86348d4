"""Keys and values of earlier prompts in host memory, for prompts that begin with the same tokens.

Prompts are stored in blocks of QUERY_BLOCK tokens, whose keys and values do not depend on the tokens after them. The
key of a block is a hash of all tokens up to its end, so prompts with the same beginning share its blocks. A slot of the
KV cache is saved here when another prompt takes it, and the prefix that is missing in a slot is copied back.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import torch

from gptq_belle.common.memory import available_bytes, format_bytes
from gptq_belle.engine.kv_cache import KVCache
from gptq_belle.errors import HardwareError, UsageError
from gptq_belle.models.sizes import QUERY_BLOCK


class PrefixCache:
    """Blocks of prompts; the least recently used ones are replaced.

    On a GPU, copies are queued on the current stream like the steps that write and read the KV cache, from and to
    pinned memory, so the host waits for none of them. On a CPU, memory is committed when it is written.

    Args:
        block: a KV cache with one slot of QUERY_BLOCK positions; caches that are saved have the same blocks, heads,
            dtype and device.
        nbytes: limit of host memory in bytes.
    Attributes:
        capacity: number of blocks that there is room for.
    Raises:
        UsageError: no block has room.
        HardwareError: more memory than is available.
    """

    def __init__(self, block: KVCache, nbytes: int) -> None:
        self.capacity, self._block_bytes = nbytes // block.nbytes, block.nbytes
        if self.capacity < 1:
            raise UsageError(f"a prefix cache of {format_bytes(nbytes)} has no room for {QUERY_BLOCK} tokens of this "
                             f"model, which take {format_bytes(block.nbytes)}", "Choose a larger --prefix-cache.")
        available, pinned = available_bytes(), block.device.type == "cuda"
        try:
            if available is not None and nbytes > available:
                raise RuntimeError(f"{available} bytes are available")
            self._blocks = [torch.empty((self.capacity, len(tables), *tables[0].shape[1:]), dtype=tables[0].dtype,
                                        pin_memory=pinned) for tables in block.parts]
        except RuntimeError as error:
            raise HardwareError(f"not enough memory for a prefix cache of {format_bytes(nbytes)}",
                                "Choose a smaller --prefix-cache.") from error
        self._free = list(range(self.capacity))
        self._places: OrderedDict[bytes, int] = OrderedDict()  # by key, the least recently used first

    @property
    def used_bytes(self) -> int:
        """Memory of the blocks that are stored."""
        return len(self._places) * self._block_bytes

    def save(self, cache: KVCache, slot: int, ids: Sequence[int]) -> None:
        """Store the whole blocks of a slot that are not stored yet.

        Args:
            cache: the KV cache.
            slot: number of the slot.
            ids: tokens whose keys and values the slot has.
        """
        for number, key in self._from_last(_keys(ids)[: self.capacity]):
            if key in self._places:
                self._places.move_to_end(key)
                continue
            if not self._free:
                self._free.append(self._places.popitem(last=False)[1])
            span = slice(number * QUERY_BLOCK, (number + 1) * QUERY_BLOCK)
            for blocks, tables in zip(self._blocks, cache.parts, strict=True):
                stacked = torch.stack([table[slot, :, span] for table in tables])
                blocks[self._free[-1]].copy_(stacked, non_blocking=True)
            self._places[key] = self._free.pop()  # only now: a copy can fail for lack of memory

    def load(self, cache: KVCache, slot: int, ids: Sequence[int], start: int) -> int:
        """Copy the longest stored prefix of `ids` to a slot that has the first `start` tokens, a multiple of
        QUERY_BLOCK.

        Returns:
            how many of `ids` the slot has then.
        """
        keys = _keys(ids)
        found = next((number for number, key in enumerate(keys) if key not in self._places), len(keys))
        for number, key in self._from_last(keys[:found]):
            self._places.move_to_end(key)
            span = slice(number * QUERY_BLOCK, (number + 1) * QUERY_BLOCK)
            if span.start < start:
                continue
            for blocks, tables in zip(self._blocks, cache.parts, strict=True):
                block = blocks[self._places[key]].to(cache.device, non_blocking=True)
                for table, stored in zip(tables, block, strict=True):
                    table[slot, :, span] = stored
        return max(start, found * QUERY_BLOCK)

    @staticmethod
    def _from_last(keys: Sequence[bytes]) -> list[tuple[int, bytes]]:
        """Numbered keys from the last to the first: a block counts as used after those that follow it, and is
        replaced after them."""
        return list(enumerate(keys))[::-1]


def _keys(ids: Sequence[int]) -> list[bytes]:
    """Keys of the whole blocks of a prompt; each is a hash of its tokens with the key of the block before it."""
    found, key = [], b""
    for start in range(0, len(ids) - QUERY_BLOCK + 1, QUERY_BLOCK):
        key = blake2b(array("i", ids[start : start + QUERY_BLOCK]), key=key, digest_size=16).digest()
        found.append(key)
    return found
