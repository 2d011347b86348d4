"""Decoders without a native one: transformers' own forward pass on packed linears and the engine's KV cache.

One sequence runs at a time, also in a decode step of several: the weights are read once for each of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from gptq_belle.engine.hf_model import load_modules
from gptq_belle.engine.kv_cache import KVCache
from gptq_belle.engine.weight_loader import WeightLoader
from gptq_belle.errors import UsageError
from gptq_belle.models.architectures import LM_HEAD
from gptq_belle.models.discovery import cache_argument


class SlotCache(Cache):
    """Transformers' view of one slot of a `KVCache` with `start` tokens, to which a forward pass adds."""

    def __init__(self, cache: KVCache, slot: int, start: int) -> None:
        super().__init__(layers=[])
        self.cache, self.slot, self.start = cache, slot, start

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any,
               ) -> tuple[Tensor, Tensor]:
        """Store keys and values (1, heads, T, head_dim), and return those of all positions so far."""
        stop = self.start + key_states.shape[2]
        self.cache.write(layer_idx, self.slot, self.start, key_states[0].transpose(0, 1),
                         value_states[0].transpose(0, 1))
        keys, values = self.cache.read(layer_idx, self.slot, stop, key_states.dtype)
        return keys[None], values[None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens before this forward pass."""
        return self.start

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the first query."""
        return self.start

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Number of keys of a mask, and the position of the first; older versions give the positions of queries."""
        return self.start + (len(query_length) if isinstance(query_length, Tensor) else int(query_length)), 0


@dataclass(slots=True)
class WholeSequences:
    """A forward pass over `rows` sequences of `length` tokens without a cache, see `attention.UncachedAttention`."""

    config: None
    rows: int
    length: int
    device: torch.device
    dtype: torch.dtype

    def pieces(self, ids: Tensor) -> Iterator[tuple[Tensor, SlotCache | None]]:
        """Token ids (1, T) of each sequence, without a cache."""
        for row in ids.view(self.rows, 1, self.length):
            yield row, None


@dataclass(slots=True)
class Chunk:
    """A forward pass over `length` tokens of a slot with `start` tokens, see `attention.PrefillAttention`."""

    config: None
    cache: KVCache
    slot: int
    start: int
    length: int
    dtype: torch.dtype

    def pieces(self, ids: Tensor) -> Iterator[tuple[Tensor, SlotCache | None]]:
        """Token ids (1, T) with the slot's cache."""
        yield ids[None], SlotCache(self.cache, self.slot, self.start)


@dataclass(slots=True)
class NewTokens:
    """A forward pass over one new token per slot, see `attention.DecodeAttention`."""

    config: None
    cache: KVCache
    slots: Sequence[int]
    lengths: Sequence[int]
    dtype: torch.dtype

    def pieces(self, ids: Tensor) -> Iterator[tuple[Tensor, SlotCache | None]]:
        """The token (1, 1) of each slot with its cache."""
        for token, slot, length in zip(ids, self.slots, self.lengths, strict=True):
            yield token.view(1, 1), SlotCache(self.cache, slot, length)


class TransformersDecoder:
    """The interface of the native decoders; what stands for hidden states before the blocks are the token ids.

    Args:
        weights: loader of the checkpoint; all tensors of the model are loaded.
    Raises:
        UsageError: packing the lm_head, which transformers cannot do, is asked for.
    """

    uncached: Any = WholeSequences
    prefill: Any = Chunk
    decode: Any = NewTokens
    is_native = False
    attention_config: Any = None
    blocks: Sequence[Any] = ()  # no native ones

    def __init__(self, weights: WeightLoader) -> None:
        if weights.head_bits not in (None, 16):
            raise UsageError(f"an lm_head of {weights.head_bits} bits needs one of the native decoders",
                             "Choose head bits 16: this architecture runs with transformers.")
        self.arch = weights.reader.arch
        self.model = load_modules(weights)
        self.base: Any = self.model.get_submodule(self.arch.blocks.rpartition(".")[0])
        self.embedding: Any = self.model.get_submodule(self.arch.modules_before[0])
        self.head: Any = self.model.get_submodule(LM_HEAD)
        shared = self.head.weight is self.embedding.weight
        setattr(self.embedding, "extra_bytes", 0 if shared else self.embedding.weight.nbytes)  # noqa: B010 - for mypy
        self._argument = cache_argument(self.model)
        weights.native = False  # no steps are recorded

    @property
    def linears(self) -> list[nn.Module]:
        """The linears of all blocks."""
        return [self.model.get_submodule(f"{self.arch.blocks}.{index}.{name}")
                for index in range(self.arch.num_layers) for name in self.arch.linears]

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (n,) as they are: transformers embeds them."""
        return ids

    def run_blocks(self, ids: Tensor, attention: Any) -> Tensor:
        """Token ids (n,) to the outputs (n, width) of the last block after the last norm.

        Args:
            attention: `WholeSequences`, a `Chunk` or `NewTokens`.
        """
        parts = []
        for row, cache in attention.pieces(ids):
            cached: dict[str, Any] = {} if cache is None else {self._argument: cache}
            parts.append(self.base(input_ids=row, use_cache=bool(cached), **cached)[0][0])
        return torch.cat(parts)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (n, width) to logits (n, vocabulary), with the scaling and soft-capping of the model."""
        with _returning(self.base, hidden[None]):
            ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        return found

    def layer_outputs(self, ids: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Names of the modules outside the blocks and of the blocks, with their outputs for ids (T,), in order."""
        arch = self.arch
        found: list[tuple[str, Tensor]] = []
        names = [*arch.modules_before, *(f"{arch.blocks}.{index}" for index in range(arch.num_layers)),
                 *arch.modules_after, LM_HEAD]

        def note(name: str) -> Any:
            return lambda _, __, output: found.append((name, output[0] if isinstance(output, tuple) else output))

        handles = [self.model.get_submodule(name).register_forward_hook(note(name)) for name in names]
        try:
            self.model(input_ids=ids[None], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        yield from found


@contextmanager
def _returning(module: nn.Module, hidden: Tensor) -> Iterator[None]:
    """A context in which the base model returns these hidden states, so that only what follows it runs."""
    module.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden)
    try:
        yield
    finally:
        del module.forward  # restores the method of the class
