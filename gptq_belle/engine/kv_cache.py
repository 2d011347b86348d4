"""The KV cache: keys and values of several sequences, allocated once and written in place.

On a CPU, memory is committed when it is written, so unused capacity costs nothing.
"""

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptq_belle.errors import HardwareError, UsageError
from gptq_belle.kernels import cpu_attention

if TYPE_CHECKING:
    from gptq_belle.engine.fused_decoding import FusedDecoding
    from gptq_belle.engine.step_graph import StepGraph

CACHE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
INT8_MAX = 127


class KVCache:
    """Keys and values of all blocks.

    Args:
        blocks: number of decoder blocks.
        slots: number of sequences.
        heads: number of key-value heads.
        capacity: number of positions per slot.
        head_dim: size of a head.
        kind: a key of CACHE_DTYPES; "int8" stores int8 codes with one float16 scale per head and position.
        device: device of the cache.
    Attributes:
        keys, values: for each block, (slots, heads, capacity, head_dim).
        key_scales, value_scales: for each block, (slots, heads, capacity, 1) float16; empty unless `kind` is "int8".
        step_graphs: recorded decode steps on this cache on a CPU, by number of rows.
        fused: fused decode steps on this cache on a GPU.
    Raises:
        UsageError: unknown `kind`.
        HardwareError: not enough memory.
    """

    def __init__(self, blocks: int, slots: int, heads: int, capacity: int, head_dim: int, kind: str,
                 device: torch.device) -> None:
        check_cache_dtype(kind)
        self.slots, self.capacity, self.kind, self.device = slots, capacity, kind, device
        self.step_graphs: dict[int, StepGraph] = {}
        self.fused: FusedDecoding | None = None
        shape = (slots, heads, capacity, head_dim)

        def tables(dtype: torch.dtype, *shape: int) -> list[Tensor]:
            allocate = torch.empty if device.type == "cpu" else torch.zeros  # CUDA kernels read unused positions
            return [allocate(shape, dtype=dtype, device=device) for _ in range(blocks)]

        try:
            self.keys, self.values = tables(CACHE_DTYPES[kind], *shape), tables(CACHE_DTYPES[kind], *shape)
            narrow = kind == "int8"
            self.key_scales = tables(torch.float16, *shape[:-1], 1) if narrow else []
            self.value_scales = tables(torch.float16, *shape[:-1], 1) if narrow else []
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise HardwareError(f"not enough memory for a KV cache of {slots} x {capacity} tokens ({kind})",
                                "Choose fewer slots, a shorter context, or an int8 cache.") from error

    @cached_property
    def tables(self) -> list[cpu_attention.KvCacheBlock] | None:
        """The blocks for the native decode attention; None if it does not support this cache."""
        if not self.keys:
            return None
        keys = self.keys[0]
        if cpu_attention.unsupported_reason(keys.shape[-1], keys.dtype, self.device) is not None:
            return None
        return [cpu_attention.KvCacheBlock(keys, values, self.scales(block))
                for block, (keys, values) in enumerate(zip(self.keys, self.values, strict=True))]

    @property
    def parts(self) -> list[list[Tensor]]:
        """Keys, values and, if the cache is int8, their scales; each is one tensor per block."""
        return [self.keys, self.values, *([self.key_scales, self.value_scales] if self.key_scales else [])]

    @property
    def nbytes(self) -> int:
        """Size of the full cache in bytes."""
        return sum(table.nbytes for tables in self.parts for table in tables)

    def write(self, block: int, slot: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values (T, heads, head_dim) of positions start .. start + T of a slot."""
        for tables, scales, new in ((self.keys, self.key_scales, keys), (self.values, self.value_scales, values)):
            place = (slot, slice(None), slice(start, start + len(new)))
            if scales:
                codes, scale = quantize_int8(new.transpose(0, 1))
                tables[block][place], scales[block][place] = codes, scale
            else:
                tables[block][place] = new.transpose(0, 1)

    def append(self, block: int, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values (n, heads, head_dim) of one position per slot; slots and positions are (n,) int64."""
        for tables, scales, new in ((self.keys, self.key_scales, keys), (self.values, self.value_scales, values)):
            if scales:
                new, scale = quantize_int8(new)
                scales[block][slots, :, positions] = scale
            tables[block][slots, :, positions] = new.to(tables[block].dtype)

    def scales(self, block: int) -> tuple[Tensor, Tensor] | None:
        """Scales of the keys and values of a block; None unless the cache is int8."""
        return (self.key_scales[block], self.value_scales[block]) if self.key_scales else None

    def read(self, block: int, slot: int, stop: int, dtype: torch.dtype,
             heads: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Read keys and values (heads, stop, head_dim) of positions 0 .. stop of a slot, converted to `dtype`."""
        place = (slot, heads, slice(stop))
        keys, values = self.keys[block][place].to(dtype), self.values[block][place].to(dtype)
        if self.key_scales:
            keys *= self.key_scales[block][place].to(dtype)
            values *= self.value_scales[block][place].to(dtype)
        return keys, values

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for tables in self.parts:
            for table in tables:
                table[target, :, :length] = table[source, :, :length]


def check_cache_dtype(kind: str) -> None:
    """Raise UsageError for an unknown kind of cache."""
    if kind not in CACHE_DTYPES:
        raise UsageError(f"cache {kind!r} is not known", f"Choose one of {', '.join(CACHE_DTYPES)}.")


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize x (..., D) symmetrically: codes (..., D) int8 and scales (..., 1) float16 with x ~ codes * scales."""
    scales = (x.abs().amax(-1, keepdim=True).float() / INT8_MAX).clamp_(min=6e-8).half()
    codes = (x / scales.to(x.dtype)).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
    return codes, scales
