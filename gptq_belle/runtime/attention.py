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

from gptq_belle.runtime.cache import Cache

QUERIES = 64


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
        """Cosines and sines (n, 1, head_dim / 2) for positions (n,); None without rotary positions."""
        if self.frequencies is None:
            return None
        angles = positions[:, None, None].float() * self.frequencies.to(positions.device)
        return angles.cos().to(dtype), angles.sin().to(dtype)

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
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Piece:
    """Causal attention of positions start .. stop of one sequence; biases are made once for all blocks."""

    def __init__(self, heads: Heads, start: int, stop: int, device: torch.device, dtype: torch.dtype) -> None:
        first = start // QUERIES * QUERIES
        edges = [start, *range(first + QUERIES, stop, QUERIES), stop]
        self.heads, self.start = heads, start
        self.parts = [(a, b, heads.bias(a, b, device, dtype)) for a, b in zip(edges, edges[1:], strict=False)]

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """query (T, heads, head_dim); keys, values (kv_heads, stop, head_dim): (T, heads * head_dim)."""
        h = self.heads
        outputs = []
        for begin, end, bias in self.parts:
            # Heads that share keys count as further queries of theirs.
            rows = query[begin - self.start : end - self.start].transpose(0, 1).reshape(1, h.kv_heads, -1, h.head_dim)
            found = scaled_dot_product_attention(rows, keys[None, :, :end], values[None, :, :end],
                                                 None if bias is None else bias[None])
            outputs.append(found.view(h.heads, end - begin, h.head_dim).transpose(0, 1).flatten(1))
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
        keys, values = self.cache.read(block, self.slot, self.stop, query.dtype)
        return self.piece(rotated(query, self.rotation), keys, values)


class Decode:
    """Attention of one new token in each of some slots, at position lengths[i] of slots[i]."""

    def __init__(self, heads: Heads, cache: Cache, slots: Sequence[int], lengths: Sequence[int],
                 dtype: torch.dtype) -> None:
        self.cache, self.slots, self.lengths = cache, slots, lengths
        self.rotation = heads.rotation(torch.tensor(lengths, device=cache.device), dtype)
        self.pieces = [Piece(heads, length, length + 1, cache.device, dtype) for length in lengths]

    def __call__(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = rotated(query, self.rotation), rotated(key, self.rotation)
        outputs = []
        for i, (slot, length, piece) in enumerate(zip(self.slots, self.lengths, self.pieces, strict=True)):
            self.cache.write(block, slot, length, key[i : i + 1], value[i : i + 1])
            outputs.append(piece(query[i : i + 1], *self.cache.read(block, slot, length + 1, query.dtype)))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
