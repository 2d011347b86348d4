"""Attention of one forward pass: over whole sequences, over a piece of a prompt, or over one new token a sequence.

A decoder calls `attend(block, query, key, value)` and does not know which of them it is. Queries of a prompt come in
pieces that begin at multiples of QUERIES, and each meets exactly the keys up to its end: what a token gets does not
depend on how a prompt was cut, on its neighbours in a batch, or on the room in the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gptq_belle.engine.kv_cache import Cache
from gptq_belle.kernels import cpu_attention
from gptq_belle.kernels.call_recorder import reject_while_recording

QUERIES = 64
KV_HEADS = 4  # of the cache that a prompt meets at a time, widened to the dtype of activations; 8 take 13 MB more


class Attend(Protocol):
    """Attention of one pass; keys and values of the pass are kept where there is a cache."""

    def __call__(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (n, heads, head_dim), key and value (n, kv_heads, head_dim) of a block: (n, heads * head_dim)."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention's shape and how positions enter it: by rotary frequencies or by ALiBi's slopes, both float32."""

    heads: int
    kv_heads: int
    head_dim: int
    frequencies: Tensor | None  # (head_dim / 2,)
    slopes: Tensor | None  # (heads,)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Cosines, and sines with their signs, (n, 1, head_dim) for positions (n,); None without rotary positions."""
        if self.frequencies is None:
            return None
        angles = positions[:, None, None].float() * self.frequencies.to(positions.device)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def bias(self, start: int, stop: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of queries start .. stop, whose keys are 0 .. stop.

        Returns:
            (1 or kv_heads, group * queries, keys), minus infinity where a key stands behind its query; None where
            nothing is to be added.
        """
        group, queries = self.heads // self.kv_heads, torch.arange(start, stop, device=device)
        behind = torch.arange(stop, device=device) - queries[:, None]  # (Q, S): 0 or less up to the query
        if self.slopes is None:
            if stop == start + 1:
                return None
            table = torch.zeros(behind.shape, device=device).masked_fill_(behind > 0, -torch.inf)
            return table.repeat(group, 1)[None].to(dtype)
        table = (self.slopes.to(device)[:, None, None] * behind).masked_fill_(behind > 0, -torch.inf)
        return table.view(self.kv_heads, group * len(queries), stop).to(dtype)


def rotated(x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """x (n, h, head_dim), its halves turned against each other by the angles of `Heads.rotation`."""
    if rotation is None:
        return x
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Piece:
    """Causal attention of positions start .. stop of one sequence; biases are made once for all blocks.

    They follow from how far a key is behind its query, so that those of every part are columns of one table, the last
    part's: of 2,048 tokens of BELLE-7B 17 MB, where tables of their own would take 67.
    """

    def __init__(self, heads: Heads, start: int, stop: int, device: torch.device, dtype: torch.dtype) -> None:
        first = start // QUERIES * QUERIES
        edges = [start, *range(first + QUERIES, stop, QUERIES), stop]
        parts = list(zip(edges, edges[1:], strict=False))
        (last, _), most = parts[-1], max(b - a for a, b in parts)
        table = heads.bias(last, last + most, device, dtype)
        self.heads, self.start = heads, start
        self.parts = [(a, b, self._columns(table, most, a, b, last - a)) for a, b in parts]

    def _columns(self, table: Tensor | None, most: int, begin: int, end: int, further: int) -> Tensor | None:
        """Biases of queries begin .. end, from a table of `most` queries that begin so much further on."""
        if table is None or (self.heads.slopes is None and end == begin + 1):
            return None
        rows = table.unflatten(1, (-1, most))[:, :, : end - begin, further : further + end]
        return rows.flatten(1, 2)  # a copy only where there are fewer queries, and several heads share keys

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, first: int = 0) -> Tensor:
        """query (T, h, head_dim); keys, values (h', stop, head_dim), from key head `first` on: (T, h * head_dim)."""
        count, head_dim = len(keys), self.heads.head_dim
        outputs = []
        for begin, end, bias in self.parts:
            # Heads that share keys count as further queries of theirs.
            rows = query[begin - self.start : end - self.start].transpose(0, 1).reshape(1, count, -1, head_dim)
            if bias is not None and len(bias) > 1:
                bias = bias[first : first + count]
            found = scaled_dot_product_attention(rows, keys[None, :, :end], values[None, :, :end],
                                                 None if bias is None else bias[None])
            outputs.append(found.view(-1, end - begin, head_dim).transpose(0, 1).flatten(1))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


class Whole:
    """Attention over `rows` sequences of `length` tokens each, without a cache; rows of activations in that order."""

    def __init__(self, heads: Heads, rows: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        self.rows = rows
        self.rotation = heads.rotation(torch.arange(length, device=device).repeat(rows), dtype)
        self.piece = Piece(heads, 0, length, device, dtype)

    def __call__(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = rotated(query, self.rotation), rotated(key, self.rotation)
        parts = zip(query.chunk(self.rows), key.chunk(self.rows), value.chunk(self.rows), strict=True)
        return torch.cat([self.piece(q, k.transpose(0, 1), v.transpose(0, 1)) for q, k, v in parts])


class Prefill:
    """Attention of `length` tokens behind `start` that a slot of the cache holds already."""

    def __init__(self, heads: Heads, cache: Cache, slot: int, start: int, length: int, dtype: torch.dtype) -> None:
        self.cache, self.slot, self.start, self.stop = cache, slot, start, start + length
        self.rotation = heads.rotation(torch.arange(start, self.stop, device=cache.device), dtype)
        self.piece = Piece(heads, start, self.stop, cache.device, dtype)

    def __call__(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.cache.write(block, self.slot, self.start, rotated(key, self.rotation), value)
        query, heads = rotated(query, self.rotation), self.piece.heads
        group, outputs = heads.heads // heads.kv_heads, []
        for first in range(0, heads.kv_heads, KV_HEADS):
            last = min(first + KV_HEADS, heads.kv_heads)
            keys, values = self.cache.read(block, self.slot, self.stop, query.dtype, slice(first, last))
            outputs.append(self.piece(query[:, group * first : group * last], keys, values, first))
        return torch.cat(outputs, 1)


class Decode:
    """Attention of one new token in each of some slots, at position lengths[i] of slots[i], by torch."""

    def __init__(self, heads: Heads, cache: Cache, slots: Sequence[int], lengths: Sequence[int],
                 dtype: torch.dtype) -> None:
        self.cache, self.slots, self.lengths = cache, slots, lengths
        self.places, self.positions = (torch.tensor(list(n), device=cache.device) for n in (slots, lengths))
        self.rotation = heads.rotation(self.positions, dtype)
        self.pieces = [Piece(heads, n, n + 1, cache.device, dtype) for n in lengths]

    def __call__(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = rotated(query, self.rotation)
        self.cache.append(block, self.places, self.positions, rotated(key, self.rotation), value)
        outputs = [piece(query[i : i + 1], *self.cache.read(block, slot, length + 1, query.dtype))
                   for i, (slot, length, piece) in enumerate(zip(self.slots, self.lengths, self.pieces, strict=True))]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


class NativeDecode:
    """The same on a CPU by the kernel of `kernels.cpu_attention`, on the tables of a cache."""

    def __init__(self, heads: Heads, tables: Sequence[cpu_attention.KvCacheBlock], slots: Sequence[int],
                 lengths: Sequence[int]) -> None:
        self.heads, self.tables = heads, tables
        self.places, self.positions = (torch.tensor(list(n), device="cpu") for n in (slots, lengths))
        self.rotation = heads.rotation(self.positions, torch.float32)
        self.step = cpu_attention.DecodeStep(self.places, self.positions, self.rotation, heads.slopes)

    def move(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """To other slots, as many, and other positions; what was recorded of a step means these from now on."""
        for kept, numbers in ((self.places, slots), (self.positions, lengths)):
            kept.copy_(torch.tensor(list(numbers), device="cpu"))
        rotation = self.heads.rotation(self.positions, torch.float32)
        for table, new in zip(self.rotation or (), rotation or (), strict=True):
            table.copy_(new)

    def __call__(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if (dtype := query.dtype) is torch.float32:
            return self.step.attend(self.tables[block], query, key, value)
        reject_while_recording("attention of numbers that were converted")
        return self.step.attend(self.tables[block], query.float(), key.float(), value.float()).to(dtype)
