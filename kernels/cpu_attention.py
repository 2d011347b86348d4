"""Attention of one new token in each of some sequences on a CPU, with a KV cache in float32, float16 or int8.

One call applies rotary position embeddings to query and key, stores key and value, and attends. torch's operation takes
keys in the dtype of queries only (after 900 tokens of a LLaMA-7B, converting a float16 cache took as long for every
token as reading all weights), and needs a dozen operations around it. The result for row m depends, to the bit, on row
m alone.
"""

from ctypes import addressof, pointer

import torch
from torch import Tensor

from .call_recorder import ATTENTION, empty_result, execute
from .native_library import data_pointer, load_library
from .native_structs import AttentionStruct, CallStruct, DecodeStepStruct, KvCacheStruct, NewTokensStruct
from .tensor_checks import check_tensors

LANES = 16  # head_dim is a multiple of it
CACHE_KINDS = {torch.float32: 0, torch.float16: 1, torch.int8: 2}  # as in native.h


def unsupported_reason(head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this kernel does not support a cache, or None if it does."""
    if device.type != "cpu":
        return f"the native kernels here are for CPUs, not {device.type}"
    if dtype not in CACHE_KINDS or head_dim % LANES:
        return (f"a cache of {dtype} with heads of {head_dim}: the native kernels take "
                f"{', '.join(map(str, CACHE_KINDS))} and multiples of {LANES}")
    return library if isinstance(library := load_library(), str) else None


class KvCacheBlock:
    """Keys and values of one block, checked once.

    Args:
        keys, values: (S, H', capacity, head_dim) float32, float16 or int8: S sequences, H' heads.
        scales: of keys and values, (S, H', capacity, 1) float16; with int8 only.
    Raises:
        ValueError: tensors that do not fit together.
    """

    def __init__(self, keys: Tensor, values: Tensor, scales: tuple[Tensor, Tensor] | None = None) -> None:
        if keys.dim() != 4 or keys.dtype not in CACHE_KINDS or (keys.dtype == torch.int8) != (scales is not None):
            raise ValueError(f"keys of {keys.dtype} {tuple(keys.shape)} {'with' if scales else 'without'} scales")
        check_tensors(tuple(keys.shape), keys.dtype, keys=keys, values=values)
        for tensor in scales or ():
            check_tensors((*keys.shape[:3], 1), torch.float16, scales=tensor)
        self._tensors = (keys, values, scales)  # the struct points into them
        _, self.kv_heads, _, self.head_dim = self.shape = keys.shape
        if self.head_dim % LANES or not self.kv_heads:
            raise ValueError(f"{self.kv_heads} heads of {self.head_dim}: not a multiple of {LANES}")
        key_scales, value_scales = scales or (None, None)
        self.pointer = pointer(KvCacheStruct(keys.data_ptr(), values.data_ptr(), data_pointer(key_scales),
                                             data_pointer(value_scales), *keys.shape, CACHE_KINDS[keys.dtype]))


class DecodeStep:
    """One new token in each of some sequences, the same for all blocks.

    Args:
        slots: (M,) int64, the sequence of each row in the cache, without duplicates.
        lengths: (M,) int64, how many tokens the sequence has before the new one.
        rotation: cosines and sines (M, 1, head_dim) float32 of rotary position embeddings (arXiv 2104.09864, section
            3.4.2), the first half of the sines negated. The first half of a head is rotated against the second.
        slopes: (H,) float32 of ALiBi (arXiv 2108.12409): -slope times the distance is added to a score.
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
            check_tensors((self.rows, 1, self.head_dim), torch.float32, rotation=tensor)
        if slopes is not None:
            check_tensors((self.heads,), torch.float32, slopes=slopes)
        cosines, sines = rotation or (None, None)
        self._tensors = (slots, lengths, rotation, slopes)  # the struct points into them
        self.pointer = pointer(DecodeStepStruct(slots.data_ptr(), lengths.data_ptr(), data_pointer(cosines),
                                                data_pointer(sines), data_pointer(slopes), self.rows))

    def attend(self, cache: KvCacheBlock, query: Tensor, key: Tensor, value: Tensor, *,
               isa: str | None = None) -> Tensor:
        """Store the new keys and values in a block's cache, and return the attention of the new tokens.

        It is the softmax of scaled scores, times the values (arXiv 1706.03762, section 3.2.1).

        Args:
            query: (M, H, head_dim) float32; only the last dimension must be contiguous.
            key, value: (M, H', head_dim) float32, likewise; H' a divisor of H.
            isa: one of `load_library().usable_isas`; by default the fastest.
        Returns:
            (M, H * head_dim) float32.
        Raises:
            ValueError: tensors that do not fit together; nothing was read or written.
        """
        heads = query.shape[1]
        self._check_heads(cache, heads)
        head_dim = cache.head_dim
        check_tensors((self.rows, heads, head_dim), torch.float32, contiguous=False, query=query)
        check_tensors((self.rows, cache.kv_heads, head_dim), torch.float32, contiguous=False, key=key, value=value)
        out = empty_result(self.rows, heads * head_dim)
        struct = AttentionStruct(cache.pointer, self.pointer, _new_tokens(query), _new_tokens(key), _new_tokens(value),
                                 out.data_ptr(), heads)
        execute(CallStruct(ATTENTION, 0, addressof(struct)), (self, cache, struct, query, key, value, out), isa=isa)
        return out

    def _check_heads(self, cache: KvCacheBlock, heads: int) -> None:
        if (heads % cache.kv_heads or (self.head_dim or cache.head_dim) != cache.head_dim
                or (self.heads or heads) != heads):
            raise ValueError(f"{heads} heads do not fit a cache of {cache.kv_heads} heads of {cache.head_dim}, slopes "
                             f"of {self.heads} and a rotation of {self.head_dim}")


def _new_tokens(values: Tensor) -> NewTokensStruct:
    if values.stride(2) != 1:
        raise ValueError("the last dimension of query, key and value must be contiguous")
    return NewTokensStruct(values.data_ptr(), values.stride(0), values.stride(1))
