"""Attention of one new token in each of some sequences on a CPU, on a cache in float32, float16 or int8.

One call turns query and key by their position, keeps key and value, and attends. torch's operation takes keys in the
dtype of queries only (behind 900 tokens of a LLaMA-7B, converting a float16 cache took as long at every token as
reading all weights), and the way there is a dozen operations. What row m gets depends, to the bit, on row m alone.
"""

from ctypes import addressof, pointer

import torch
from torch import Tensor

from .call_recorder import ATTENTION, empty_result, execute
from .native_library import NativeLibrary, check_tensors, data_pointer, load_library
from .native_structs import AttentionStruct, CallStruct, DecodeStepStruct, KvCacheStruct, NewTokensStruct

LANES = 16  # head_dim is a multiple of it
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.int8: 2}


def unsupported_reason(head_dim: int, kind: torch.dtype, device: torch.device) -> str | None:
    """Why this kernel does not serve a cache, or None where it does."""
    if device.type != "cpu":
        return f"the native kernels here are for CPUs, not {device.type}"
    if kind not in DTYPE_CODES or head_dim % LANES:
        return f"a cache of {kind} with heads of {head_dim}: not {', '.join(map(str, DTYPE_CODES))} with whole {LANES}"
    found = load_library()
    return None if isinstance(found, NativeLibrary) else found


class KvCacheBlock:
    """Keys and values of one block, checked once.

    Args:
        keys, values: (S, H', capacity, head_dim) float32, float16 or int8: S sequences, H' heads.
        scales: of keys and values, (S, H', capacity, 1) float16, with int8.
    Raises:
        ValueError: tensors that do not fit together.
    """

    def __init__(self, keys: Tensor, values: Tensor, scales: tuple[Tensor, Tensor] | None = None) -> None:
        if keys.dim() != 4 or keys.dtype not in DTYPE_CODES or (keys.dtype == torch.int8) != (scales is not None):
            raise ValueError(f"keys of {keys.dtype} {tuple(keys.shape)} {'with' if scales else 'without'} scales")
        check_tensors(keys.shape, keys.dtype, keys=keys, values=values)
        for tensor in scales or ():
            check_tensors((*keys.shape[:3], 1), torch.float16, scales=tensor)
        self.kept = (keys, values, scales)  # the struct points into them
        _, self.kv_heads, _, self.head_dim = self.shape = keys.shape
        if self.head_dim % LANES or not self.kv_heads:
            raise ValueError(f"{self.kv_heads} heads of {self.head_dim}: not whole {LANES}")
        key_scales, value_scales = scales or (None, None)
        self.pointer = pointer(KvCacheStruct(keys.data_ptr(), values.data_ptr(), data_pointer(key_scales),
                                             data_pointer(value_scales), *keys.shape, DTYPE_CODES[keys.dtype]))


class DecodeStep:
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
        check_tensors((self.rows,), torch.int64, slots=slots, lengths=lengths)
        for tensor in rotation or ():
            check_tensors((self.rows, 1, self.head_dim), rotation=tensor)
        if slopes is not None:
            check_tensors((self.heads,), slopes=slopes)
        cosines, sines = rotation or (None, None)
        self.kept = (slots, lengths, rotation, slopes)  # the struct points into them
        self.pointer = pointer(DecodeStepStruct(slots.data_ptr(), lengths.data_ptr(), data_pointer(cosines),
                                                data_pointer(sines), data_pointer(slopes), self.rows))

    def attend(self, table: KvCacheBlock, query: Tensor, key: Tensor, value: Tensor, *,
               isa: str | None = None) -> Tensor:
        """Keep the new keys and values in a block's table, and return the attention of the new tokens: the softmax of
        scaled scores, times the values (1706.03762, section 3.2.1).

        Args:
            query: (M, H, head_dim) float32; strides of the first two are free.
            key, value: (M, H', head_dim) float32, likewise; H' a divisor of H.
            isa: one of `load_library().usable`; left out, the fastest.
        Returns:
            (M, H * head_dim) float32.
        Raises:
            ValueError: tensors that do not fit together; nothing was read or written.
        """
        heads = query.shape[1]
        self._fit(table, heads)
        out = empty_result(self.rows, heads * table.head_dim)
        struct = AttentionStruct(
            table.pointer, self.pointer, self._new("query", query, table, heads),
            self._new("key", key, table, table.kv_heads), self._new("value", value, table, table.kv_heads),
            out.data_ptr(), heads)
        execute(CallStruct(ATTENTION, 0, addressof(struct)), (self, table, struct, query, key, value, out), isa=isa)
        return out

    def _fit(self, table: KvCacheBlock, heads: int) -> None:
        if (heads % table.kv_heads or (self.head_dim or table.head_dim) != table.head_dim
                or (self.heads or heads) != heads):
            raise ValueError(f"{heads} heads do not meet {table.kv_heads} of {table.head_dim}: slopes of {self.heads}, "
                             f"rotation of {self.head_dim}")

    def _new(self, name: str, numbers: Tensor, table: KvCacheBlock, heads: int) -> NewTokensStruct:
        if (numbers.dtype is not torch.float32 or numbers.shape != (self.rows, heads, table.head_dim)
                or not numbers.is_cpu or numbers.stride(2) != 1):
            raise ValueError(f"{name}: {numbers.dtype} {tuple(numbers.shape)} on {numbers.device}, not float32 "
                             f"{(self.rows, heads, table.head_dim)} on the CPU")
        return NewTokensStruct(numbers.data_ptr(), numbers.stride(0), numbers.stride(1))
