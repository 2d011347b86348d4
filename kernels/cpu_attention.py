"""Attention of one new token in each of some sequences on a CPU, on a cache in float32, float16 or int8.

One call turns query and key by their position, keeps key and value, and attends. torch's operation takes keys in the
dtype of queries only (behind 900 tokens of a LLaMA-7B, converting a float16 cache took as long at every token as
reading all weights), and the way there is a dozen operations. What row m gets depends, to the bit, on row m alone.
"""

from ctypes import addressof, pointer

import torch
from torch import Tensor

from .library import Library, address, library, require
from .structs import AttentionStruct, CacheStruct, CallStruct, NewStruct, StepStruct
from .tape import ATTENTION, empty, run

LANES = 16  # head_dim is a multiple of it
KINDS = {torch.float32: 0, torch.float16: 1, torch.int8: 2}


def refusal(head_dim: int, kind: torch.dtype, device: torch.device) -> str | None:
    """Why this kernel does not serve a cache, or None where it does."""
    if device.type != "cpu":
        return f"the native kernels here are for CPUs, not {device.type}"
    if kind not in KINDS or head_dim % LANES:
        return f"a cache of {kind} with heads of {head_dim}: not {', '.join(map(str, KINDS))} with whole {LANES}"
    found = library()
    return None if isinstance(found, Library) else found


class Table:
    """Keys and values of one block, checked once.

    Args:
        keys, values: (S, H', capacity, head_dim) float32, float16 or int8: S sequences, H' heads.
        scales: of keys and values, (S, H', capacity, 1) float16, with int8.
    Raises:
        ValueError: tensors that do not fit together.
    """

    def __init__(self, keys: Tensor, values: Tensor, scales: tuple[Tensor, Tensor] | None = None) -> None:
        if keys.dim() != 4 or keys.dtype not in KINDS or (keys.dtype == torch.int8) != (scales is not None):
            raise ValueError(f"keys of {keys.dtype} {tuple(keys.shape)} {'with' if scales else 'without'} scales")
        require(keys.shape, keys.dtype, keys=keys, values=values)
        for tensor in scales or ():
            require((*keys.shape[:3], 1), torch.float16, scales=tensor)
        self.kept = (keys, values, scales)  # the struct points into them
        _, self.kv_heads, _, self.head_dim = self.shape = keys.shape
        if self.head_dim % LANES or not self.kv_heads:
            raise ValueError(f"{self.kv_heads} heads of {self.head_dim}: not whole {LANES}")
        key_scales, value_scales = scales or (None, None)
        self.pointer = pointer(CacheStruct(keys.data_ptr(), values.data_ptr(), address(key_scales),
                                           address(value_scales), *keys.shape, KINDS[keys.dtype]))


class Step:
    """One new token in each of some sequences, the same for all blocks.

    Args:
        slots: (M,) int64, a place in the cache for each row, none twice.
        lengths: (M,) int64, how many tokens it holds in front of the new one.
        rotation: cosines, and sines of which the first half is negative, (M, 1, head_dim) float32, by which query and
            key are turned, halves against each other (2104.09864, section 3.4.2).
        slopes: (H,) float32 of ALiBi (2108.12409): -slope times the distance is added to a score.
    Raises:
        ValueError: tensors that do not fit together.
    """

    def __init__(self, slots: Tensor, lengths: Tensor, rotation: tuple[Tensor, Tensor] | None = None,
                 slopes: Tensor | None = None) -> None:
        self.rows = len(slots)
        self.head_dim = None if rotation is None else rotation[0].shape[-1]
        self.heads = None if slopes is None else len(slopes)
        require((self.rows,), torch.int64, slots=slots, lengths=lengths)
        for tensor in rotation or ():
            require((self.rows, 1, self.head_dim), rotation=tensor)
        if slopes is not None:
            require((self.heads,), slopes=slopes)
        cosines, sines = rotation or (None, None)
        self.kept = (slots, lengths, rotation, slopes)  # the struct points into them
        self.pointer = pointer(StepStruct(slots.data_ptr(), lengths.data_ptr(), address(cosines), address(sines),
                                          address(slopes), self.rows))

    def attend(self, table: Table, query: Tensor, key: Tensor, value: Tensor, *, isa: str | None = None) -> Tensor:
        """Keep the new keys and values in a block's table, and return the attention of the new tokens: the softmax of
        scaled scores, times the values (1706.03762, section 3.2.1).

        Args:
            query: (M, H, head_dim) float32; strides of the first two are free.
            key, value: (M, H', head_dim) float32, likewise; H' a divisor of H.
            isa: one of `library().usable`; left out, the fastest.
        Returns:
            (M, H * head_dim) float32.
        Raises:
            ValueError: tensors that do not fit together; nothing was read or written.
        """
        heads = query.shape[1]
        self._fit(table, heads)
        out = empty(self.rows, heads * table.head_dim)
        struct = AttentionStruct(
            table.pointer, self.pointer, self._new("query", query, table, heads),
            self._new("key", key, table, table.kv_heads), self._new("value", value, table, table.kv_heads),
            out.data_ptr(), heads)
        run(CallStruct(ATTENTION, 0, addressof(struct)), (self, table, struct, query, key, value, out), isa=isa)
        return out

    def _fit(self, table: Table, heads: int) -> None:
        if (heads % table.kv_heads or (self.head_dim or table.head_dim) != table.head_dim
                or (self.heads or heads) != heads):
            raise ValueError(f"{heads} heads do not meet {table.kv_heads} of {table.head_dim}: slopes of {self.heads}, "
                             f"rotation of {self.head_dim}")

    def _new(self, name: str, numbers: Tensor, table: Table, heads: int) -> NewStruct:
        if (numbers.dtype is not torch.float32 or numbers.shape != (self.rows, heads, table.head_dim)
                or not numbers.is_cpu or numbers.stride(2) != 1):
            raise ValueError(f"{name}: {numbers.dtype} {tuple(numbers.shape)} on {numbers.device}, not float32 "
                             f"{(self.rows, heads, table.head_dim)} on the CPU")
        return NewStruct(numbers.data_ptr(), numbers.stride(0), numbers.stride(1))
