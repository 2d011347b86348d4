"""Attention of one forward pass: over whole sequences, over a chunk of a prompt, or over one new token per sequence.

A decoder calls `attention(block, query, key, value)` and does not know which of them it is. On a CPU the queries of a
prompt are processed in blocks that begin at multiples of QUERY_BLOCK, and each block sees exactly the keys up to its
end: the result for a token does not depend on how a prompt was chunked, on other sequences of the batch, or on cache
capacity. On a GPU one call processes all queries of a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gptq_belle.engine.kv_cache import KVCache
from gptq_belle.kernels import cpu_attention
from gptq_belle.kernels.call_recorder import reject_while_recording
from gptq_belle.models.decoder_config import DecoderConfig
from gptq_belle.models.sizes import KV_HEADS_PER_PASS, QUERY_BLOCK


class Attention(Protocol):
    """Attention of one forward pass; keys and values are stored if there is a cache."""

    def __call__(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (n, heads, head_dim), key and value (n, kv_heads, head_dim) of a block: (n, heads * head_dim)."""


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Numbers of heads, and the encoding of positions: rotary frequencies or ALiBi slopes, both float32 on the device
    of the model."""

    heads: int
    kv_heads: int
    head_dim: int
    frequencies: Tensor | None  # (head_dim / 2,)
    slopes: Tensor | None  # (heads,)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Cosines and signed sines (n, 1, head_dim) for positions (n,); None without rotary embeddings."""
        if self.frequencies is None:
            return None
        angles = positions[:, None, None].float() * self.frequencies
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def bias(self, start: int, stop: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """Bias of the scores of queries start .. stop on keys 0 .. stop: causal mask and ALiBi.

        Returns:
            (1 or kv_heads, group * queries, keys), minus infinity for keys after their query; None if no bias is
            needed.
        """
        if self.slopes is None and stop == start + 1:
            return None
        group, queries = self.heads // self.kv_heads, torch.arange(start, stop, device=device)
        offset = torch.arange(stop, device=device) - queries[:, None]  # (Q, S): positive for keys after the query
        if self.slopes is None:
            table = torch.zeros(offset.shape, device=device).masked_fill_(offset > 0, -torch.inf)
            return table.repeat(group, 1)[None].to(dtype)
        table = (self.slopes[:, None, None] * offset).masked_fill_(offset > 0, -torch.inf)
        return table.view(self.kv_heads, group * len(queries), stop).to(dtype)


def attention_config(config: DecoderConfig, device: torch.device) -> AttentionConfig:
    """The configuration of a model's attention; its tensors are copied to the device of the model once."""
    d = config.dimensions
    frequencies, slopes = (None if one is None else one.to(device) for one in (config.frequencies, config.slopes))
    return AttentionConfig(d.num_heads, d.num_kv_heads, d.head_dim, frequencies, slopes)


def apply_rotary(x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotate the two halves of x (n, h, head_dim) by the angles of `AttentionConfig.rotation`."""
    if rotation is None:
        return x
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class CausalAttention:
    """Causal attention of positions start .. stop of one sequence; biases are computed once for all blocks.

    A bias depends only on the distance from key to query, so the biases of all query blocks are columns of one table,
    that of the last query block: 17 MB for 2,048 tokens of BELLE-7B, where separate tables would take 67.
    """

    def __init__(self, config: AttentionConfig, start: int, stop: int, device: torch.device,
                 dtype: torch.dtype) -> None:
        first = start // QUERY_BLOCK * QUERY_BLOCK
        edges = [start, *range(first + QUERY_BLOCK, stop, QUERY_BLOCK), stop]
        spans = list(zip(edges, edges[1:], strict=False))
        (last, _), most = spans[-1], max(b - a for a, b in spans)
        table = config.bias(last, last + most, device, dtype)
        self.config, self.start = config, start
        self.query_blocks = [(a, b, self._bias(table, most, a, b, last - a)) for a, b in spans]

    def _bias(self, table: Tensor | None, most: int, begin: int, end: int, shift: int) -> Tensor | None:
        """Biases of queries begin .. end, cut from the table of `most` queries that begin `shift` positions later."""
        if table is None or (self.config.slopes is None and end == begin + 1):
            return None
        rows = table.unflatten(1, (-1, most))[:, :, : end - begin, shift : shift + end]
        return rows.flatten(1, 2)  # a copy only if there are fewer queries and several heads share keys

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, first: int = 0) -> Tensor:
        """query (T, h, head_dim); keys, values (h', stop, head_dim), from key head `first` on: (T, h * head_dim)."""
        count, head_dim = len(keys), self.config.head_dim
        outputs = []
        for begin, end, bias in self.query_blocks:
            # Query heads that share keys count as further queries.
            rows = query[begin - self.start : end - self.start].transpose(0, 1).reshape(1, count, -1, head_dim)
            if bias is not None and len(bias) > 1:
                bias = bias[first : first + count]
            found = scaled_dot_product_attention(rows, keys[None, :, :end], values[None, :, :end],
                                                 None if bias is None else bias[None])
            outputs.append(found.view(-1, end - begin, head_dim).transpose(0, 1).flatten(1))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


class FusedCausalAttention:
    """`CausalAttention` on a GPU: one call for all queries and heads.

    Results may differ in the last bits from those of other chunks of the same prompt. The biases of ALiBi take heads *
    queries * keys numbers, once for all blocks: 268 MB in float16 for 2,048 tokens of BELLE-7B.
    """

    def __init__(self, config: AttentionConfig, start: int, stop: int, device: torch.device,
                 dtype: torch.dtype) -> None:
        self.config = config
        self.is_causal = config.slopes is None and start == 0
        self.mask: Tensor | None = None
        if not self.is_causal and (bias := config.bias(start, stop, device, dtype)) is not None:
            # Without ALiBi all heads share the rows of the first one.
            heads = 1 if config.slopes is None else config.heads
            self.mask = bias.view(-1, stop - start, stop)[:heads][None]

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, first: int = 0) -> Tensor:
        """query (T, heads, head_dim); keys, values (kv_heads, stop, head_dim) of all heads: (T, heads * head_dim)."""
        found = scaled_dot_product_attention(
            query.transpose(0, 1)[None], keys[None], values[None], self.mask, is_causal=self.is_causal,
            enable_gqa=self.config.heads != self.config.kv_heads)
        return found[0].transpose(0, 1).flatten(1)


def causal_attention(config: AttentionConfig, start: int, stop: int, device: torch.device,
                     dtype: torch.dtype) -> CausalAttention | FusedCausalAttention:
    """Causal attention as suits the device."""
    kind = CausalAttention if device.type == "cpu" else FusedCausalAttention
    return kind(config, start, stop, device, dtype)


class UncachedAttention:
    """Attention over `rows` sequences of `length` tokens without a cache; activations are ordered by sequence."""

    def __init__(self, config: AttentionConfig, rows: int, length: int, device: torch.device,
                 dtype: torch.dtype) -> None:
        self.rows = rows
        self.rotation = config.rotation(torch.arange(length, device=device).repeat(rows), dtype)
        self.causal = causal_attention(config, 0, length, device, dtype)

    def __call__(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = apply_rotary(query, self.rotation), apply_rotary(key, self.rotation)
        rows = zip(query.chunk(self.rows), key.chunk(self.rows), value.chunk(self.rows), strict=True)
        return torch.cat([self.causal(q, k.transpose(0, 1), v.transpose(0, 1)) for q, k, v in rows])


class PrefillAttention:
    """Attention of `length` tokens of a slot whose first `start` tokens are in the cache."""

    def __init__(self, config: AttentionConfig, cache: KVCache, slot: int, start: int, length: int,
                 dtype: torch.dtype) -> None:
        self.config, self.cache = config, cache
        self.slot, self.start, self.stop = slot, start, start + length
        self.rotation = config.rotation(torch.arange(start, self.stop, device=cache.device), dtype)
        self.causal = causal_attention(config, start, self.stop, cache.device, dtype)
        self.pass_heads = KV_HEADS_PER_PASS if cache.device.type == "cpu" else config.kv_heads

    def __call__(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.cache.write(block, self.slot, self.start, apply_rotary(key, self.rotation), value)
        query, kv_heads = apply_rotary(query, self.rotation), self.config.kv_heads
        group, outputs = self.config.heads // kv_heads, []
        for first in range(0, kv_heads, self.pass_heads):
            last = min(first + self.pass_heads, kv_heads)
            keys, values = self.cache.read(block, self.slot, self.stop, query.dtype, slice(first, last))
            outputs.append(self.causal(query[:, group * first : group * last], keys, values, first))
        return torch.cat(outputs, 1)


class DecodeAttention:
    """Attention of one new token per slot, at position lengths[i] of slots[i], in torch."""

    def __init__(self, config: AttentionConfig, cache: KVCache, slots: Sequence[int], lengths: Sequence[int],
                 dtype: torch.dtype) -> None:
        self.cache, self.slots, self.lengths = cache, slots, lengths
        self.slot_ids, self.positions = torch.tensor([list(slots), list(lengths)], device=cache.device)
        self.rotation = config.rotation(self.positions, dtype)
        self.causal = [causal_attention(config, n, n + 1, cache.device, dtype) for n in lengths]

    def __call__(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = apply_rotary(query, self.rotation)
        self.cache.append(block, self.slot_ids, self.positions, apply_rotary(key, self.rotation), value)
        outputs = [causal(query[i : i + 1], *self.cache.read(block, slot, length + 1, query.dtype))
                   for i, (slot, length, causal) in enumerate(zip(self.slots, self.lengths, self.causal, strict=True))]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


class NativeDecodeAttention:
    """`DecodeAttention` on a CPU by the native kernel of `kernels.cpu_attention`."""

    def __init__(self, config: AttentionConfig, tables: Sequence[cpu_attention.KvCacheBlock], slots: Sequence[int],
                 lengths: Sequence[int]) -> None:
        self.config, self.tables = config, tables
        self.slot_ids, self.positions = (torch.tensor(list(n), device="cpu") for n in (slots, lengths))
        self.rotation = config.rotation(self.positions, torch.float32)
        self.step = cpu_attention.DecodeStep(self.slot_ids, self.positions, self.rotation, config.slopes)

    def update(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Set other slots (the same number) and positions in place; a recorded step then uses these."""
        for tensor, numbers in ((self.slot_ids, slots), (self.positions, lengths)):
            tensor.copy_(torch.tensor(list(numbers), device="cpu"))
        rotation = self.config.rotation(self.positions, torch.float32)
        for table, new in zip(self.rotation or (), rotation or (), strict=True):
            table.copy_(new)

    def __call__(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if (dtype := query.dtype) is torch.float32:
            return self.step.attend(self.tables[block], query, key, value)
        reject_while_recording("attention with converted dtypes")
        return self.step.attend(self.tables[block], query.float(), key.float(), value.float()).to(dtype)
