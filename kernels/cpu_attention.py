"""Attention of one new token in each of some sequences on a CPU, straight from a cache in float32, float16 or int8.

torch's operation takes keys in the dtype of queries only: behind 900 tokens of a LLaMA-7B, converting a float16 cache
took as long at every token as reading all weights. Row m of the result depends, to the bit, on row m alone.
"""

import torch
from torch import Tensor

from .library import ISAS, AttentionStruct, Library, library

LANES = 16  # head_dim is a multiple of it
KINDS = {torch.float32: 0, torch.float16: 1, torch.int8: 2}


def refusal(head_dim: int, kind: torch.dtype, device: torch.device) -> str | None:
    """Why this kernel does not serve a cache, or None where it does."""
    if device.type != "cpu":
        return f"the native kernels here are for CPUs, not {device.type}"
    if kind not in KINDS or head_dim % LANES:
        return f"a cache of {kind} with heads of {head_dim}: not {', '.join(map(str, KINDS))} with whole {LANES}"
    found = library()
    return found if isinstance(found, str) else None


def attend(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor, *,
           scales: tuple[Tensor, Tensor] | None = None, slopes: Tensor | None = None, isa: str | None = None) -> Tensor:
    """Softmax of scaled scores, times the values: (M, H, head_dim) float32.

    Args:
        query: (M, H, head_dim) float32; strides of the first two are free.
        keys, values: (S, H', capacity, head_dim) float32, float16 or int8, H' a divisor of H; with int8, `scales` of
            keys and values, (S, H', capacity, 1) float16.
        slots: (M,) int64, the row of the cache for each query.
        lengths: (M,) int64, how many of its positions a query meets, its own included.
        slopes: (H,) float32 of ALiBi: -slope times the distance is added to a score.
        isa: one of `library().usable`; left out, the fastest.
    Raises:
        ValueError: tensors that do not fit together; nothing was read or written.
    """
    native = library()
    if not isinstance(native, Library):
        raise RuntimeError(native)
    _check(query, keys, values, slots, lengths, scales, slopes)
    if isa is not None and isa not in native.usable:
        raise ValueError(f"instruction set {isa!r} is not one of {', '.join(native.usable)}")
    rows, heads, size = query.shape
    out = torch.empty(rows, heads, size)
    key_scales, value_scales = (None, None) if scales is None else (scales[0].data_ptr(), scales[1].data_ptr())
    struct = AttentionStruct(
        query.data_ptr(), keys.data_ptr(), values.data_ptr(), key_scales, value_scales, slots.data_ptr(),
        lengths.data_ptr(), None if slopes is None else slopes.data_ptr(), out.data_ptr(), rows, heads, keys.shape[1],
        size, keys.shape[2], keys.shape[0], query.stride(0), query.stride(1), size**-0.5, KINDS[keys.dtype])
    outcome = native.attend(struct, torch.get_num_threads(), ISAS.index(isa or native.isa))
    if outcome == 1:
        raise ValueError(f"slots or lengths beyond the cache's {keys.shape[0]} and {keys.shape[2]}")
    if outcome:
        raise MemoryError(f"no memory for the scores of {rows} rows")
    return out


def _check(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor,
           scales: tuple[Tensor, Tensor] | None, slopes: Tensor | None) -> None:
    if query.dim() != 3 or keys.dim() != 4 or query.dtype != torch.float32 or query.stride(2) != 1:
        raise ValueError(f"query {query.dtype} {tuple(query.shape)}, keys {tuple(keys.shape)}: not (M, H, D) float32 "
                         "and (S, H', capacity, D)")
    rows, heads, size = query.shape
    if size % LANES or keys.shape[3] != size or not keys.shape[1] or heads % keys.shape[1]:
        raise ValueError(f"{heads} heads of {size} do not meet keys {tuple(keys.shape)}")
    wanted = [("values", values, keys.shape, keys.dtype), ("slots", slots, (rows,), torch.int64),
              ("lengths", lengths, (rows,), torch.int64), ("keys", keys, keys.shape, keys.dtype)]
    if slopes is not None:
        wanted.append(("slopes", slopes, (heads,), torch.float32))
    for table in scales or ():
        wanted.append(("scales", table, (*keys.shape[:3], 1), torch.float16))
    if keys.dtype not in KINDS or (keys.dtype == torch.int8) != (scales is not None):
        raise ValueError(f"keys of {keys.dtype} {'with' if scales else 'without'} scales")
    for name, tensor, shape, dtype in wanted:
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, not a contiguous "
                             f"{dtype} {tuple(shape)} on the CPU")
    if not query.is_cpu:
        raise ValueError(f"query is on {query.device}, the cache on the CPU")
