"""The embedding and the head: one matrix (V, H) for both where they are tied, looked up by row and multiplied by.

BLOOM's is 2 GB in float16, 40 % of a 4-bit BELLE-7B, and every token reads it whole. In 8 bits (one scale for up to 128
inputs of a row) it is half as large as there and what it costs in KL is hard to measure; one packed copy serves the
look-up and the product. Rows are rounded some at a time while they are read: nothing larger than the result is held.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gptq_belle.checkpoint.packed_reader import packed_lm_head_bits, packed_lm_head_rows
from gptq_belle.checkpoint.prefetch import prefetch
from gptq_belle.engine.linear import DenseLinear, LinearOperator, PackedLinear
from gptq_belle.engine.weight_loader import WeightLoader
from gptq_belle.errors import InputError, UsageError
from gptq_belle.formats.packed_lm_head import GROUPS, HEAD_CODES, HEAD_SCALES, STEP, head_group_size, quantize_rows
from gptq_belle.formats.packing import pack_rows
from gptq_belle.kernels import cpu_layout, cpu_packed_rows
from gptq_belle.kernels.dispatch import PreparedWeight, choose_kernel, lookup_rows, prepare_weight
from gptq_belle.kernels.huge_pages import MemoryPool
from gptq_belle.kernels.layout import checked_weight
from gptq_belle.kernels.triton_layout import SlicedWeight
from gptq_belle.models.architectures import LM_HEAD
from gptq_belle.models.dimensions import Dimensions

PADDED = cpu_layout.OUTPUT_MULTIPLE  # rows come in multiples of it
HEAD_BITS = (16, 8, 4)
# Some rows at a time: codes (n, H) uint8, and scales (n, groups) float16.
Rounded = Iterable[tuple[Tensor, Tensor]]


@dataclass(slots=True)
class Embedding:
    """Token ids (n,) to embeddings (n, H) in the dtype of activations; the table stays in that of the file."""

    table: Tensor
    dtype: torch.dtype
    extra_bytes: int  # of the table, where it is not also the head

    def __call__(self, ids: Tensor) -> Tensor:
        return self.table[ids].to(self.dtype)


@dataclass(slots=True)
class PackedEmbedding:
    """The same from the head's packed copy."""

    weight: PreparedWeight
    dtype: torch.dtype
    extra_bytes: int = 0

    def __call__(self, ids: Tensor) -> Tensor:
        return lookup_rows(self.weight, ids).to(self.dtype)


def check_head_bits(bits: int | None) -> None:
    """Raises UsageError for bits that a head does not come in; None leaves the choice."""
    if bits not in (None, *HEAD_BITS):
        raise UsageError(f"head bits {bits} is not allowed", f"Choose one of {', '.join(map(str, HEAD_BITS))}.")


def embedding_and_head(weights: WeightLoader, name: str,
                       sizes: Dimensions) -> tuple[Embedding | PackedEmbedding, LinearOperator]:
    """What turns ids into hidden states, and hidden states into logits.

    Args:
        weights: of the checkpoint; its `head_bits` are 16, 8, 4, or None: 8 where the two are tied and the blocks are
            packed, else 16, which means the dtype of activations.
        name: of the embedding.
        sizes: of the model; where it says tied and the file holds another head all the same, the file is believed.
    Raises:
        InputError: a matrix is missing, of another shape, or holds NaN or infinity.
        UsageError: bits were asked for that its shape does not allow.
    """
    shape, stored, embedding = (sizes.vocab_size, sizes.hidden_size), f"{LM_HEAD}.weight", f"{name}.weight"
    if (own := packed_lm_head_bits(weights.reader, *shape)) is not None:
        return _stored(weights, embedding, shape, own, sizes.tied)
    tied = sizes.tied and (stored not in weights.reader or _same(weights, embedding, stored))
    packable = tied and weights.quantization is not None and refusal(weights, shape) is None
    bits = weights.head_bits or (8 if packable else 16)
    head: LinearOperator
    if tied:
        weights.mark_used(stored)
    if bits != 16:
        source = embedding if tied else stored
        weights.expect(source, *shape)
        group = head_group_size(shape[1]) or 0
        pieces = (quantize_rows(piece, bits, group) for piece in _pieces(weights, source, shape))
        weight = _packed(weights, source, shape, bits, pieces)
        head = PackedLinear(weight, None)
        if tied:
            return PackedEmbedding(weight, weights.dtype), head
    elif tied:
        table = weights.tensor(embedding, *shape)
        return Embedding(table, weights.dtype, 0), DenseLinear(table, None)
    else:
        head = DenseLinear(weights.tensor(stored, *shape), None)
    table = weights.tensor(embedding, *shape, narrow=True)
    return Embedding(table, weights.dtype, table.nbytes), head


def _stored(weights: WeightLoader, embedding: str, shape: tuple[int, int], bits: int,
            tied: bool) -> tuple[Embedding | PackedEmbedding, LinearOperator]:
    """A head that the file holds packed; where it is not also the embedding, that one is there beside it."""
    if weights.head_bits not in (None, bits):
        raise UsageError(f"{weights.reader.path} holds its head in {bits} bits only",
                         f"Leave head bits out, or say {bits}; other bits need the full-precision model.")
    for name in (HEAD_CODES, HEAD_SCALES):
        weights.mark_used(name)
    weight = _packed(weights, HEAD_CODES, shape, bits, packed_lm_head_rows(weights.reader, bits, _step(shape)))
    if tied:
        return PackedEmbedding(weight, weights.dtype), PackedLinear(weight, None)
    table = weights.tensor(embedding, *shape, narrow=True)
    return Embedding(table, weights.dtype, table.nbytes), PackedLinear(weight, None)


def _packed(weights: WeightLoader, name: str, shape: tuple[int, int], bits: int, pieces: Rounded) -> PreparedWeight:
    """Rows of the matrix `name`, rounded, laid out for its kernel on the device."""
    group = head_group_size(shape[1])
    if (refused := refusal(weights, shape)) is not None or group is None:
        raise UsageError(f"{name} of shape {shape} cannot be packed: {refused}", "Choose head bits 16.")
    try:
        prepared = (_native if _kernel(weights, shape) == "native" else _words)(weights, shape, bits, group, pieces)
    except ValueError as error:
        raise InputError(f"{weights.reader.path}: tensor {name}: {error}", "The file is damaged.") from error
    weights.count_bytes(prepared)
    return prepared


def refusal(weights: WeightLoader, shape: tuple[int, int]) -> str | None:
    """Why a head of that shape cannot be packed; None where it can."""
    if shape[1] % GROUPS[-1]:
        return f"its rows are no multiple of {GROUPS[-1]}"
    if shape[0] % PADDED and _kernel(weights, shape) not in ("native", "triton"):
        return f"without the fast kernels, its rows must be a multiple of {PADDED} in number"
    return None


def _kernel(weights: WeightLoader, shape: tuple[int, int]) -> str:
    g_idx = torch.arange(shape[1], dtype=torch.int32) // GROUPS[-1]
    return choose_kernel(g_idx, device=weights.device, dtype=weights.dtype).kernel


def _native(weights: WeightLoader, shape: tuple[int, int], bits: int, group: int, pieces: Rounded) -> PreparedWeight:
    blocks = -(-shape[0] // PADDED) * PADDED // cpu_layout.BLOCK
    codes = cpu_layout.empty_codes(blocks, shape[1] // group, group * bits // 32)
    scales = torch.empty(blocks, shape[1] // group, cpu_layout.BLOCK, dtype=torch.float16)
    at = 0
    for piece, scale in _filled(pieces):
        stop = at + len(piece) // cpu_layout.BLOCK
        part = cpu_packed_rows.prepare_rows(piece, scale, bits, weights.precision, codes[at:stop])
        scales[at:stop] = part.scales
        at = stop
    return part._replace(codes=codes, scales=scales, out_features=shape[0])


def _words(weights: WeightLoader, shape: tuple[int, int], bits: int, group: int, pieces: Rounded) -> PreparedWeight:
    device, outputs, groups = weights.device, -(-shape[0] // PADDED) * PADDED, shape[1] // group
    words = torch.empty(shape[1] * bits // 32, outputs, dtype=torch.int32, device=device)
    scales = torch.empty(groups, outputs, dtype=torch.float16, device=device)
    at = 0
    for codes, scale in _filled(pieces):
        stop = at + len(codes)
        words[:, at:stop] = pack_rows(codes.to(device).t(), bits)
        scales[:, at:stop] = scale.to(device).t()
        at = stop
    stored = torch.full((outputs, groups), (1 << (bits - 1)) - 1, dtype=torch.uint8, device=device)
    weight = checked_weight(words, pack_rows(stored, bits).t().contiguous(), scales, None, bits, 1)
    if device.type == "cpu":  # without the native library; `prepare_weight` would copy the words
        return weight
    prepared = prepare_weight(weight, device=device, dtype=weights.dtype)
    return prepared._replace(out_features=shape[0]) if isinstance(prepared, SlicedWeight) else prepared


def _filled(pieces: Rounded) -> Iterator[tuple[Tensor, Tensor]]:
    """Every piece with as many rows as a multiple of PADDED; those added have the scale 0."""
    for piece in pieces:
        if missing := -len(piece[0]) % PADDED:
            piece = torch.nn.functional.pad(piece[0], (0, 0, 0, missing)), torch.nn.functional.pad(
                piece[1], (0, 0, 0, missing))
        yield piece


def _pieces(weights: WeightLoader, name: str, shape: tuple[int, int]) -> Iterator[Tensor]:
    """The rows of a matrix, some at a time, a multiple of PADDED each but the last."""
    parts = (range(begin, min(begin + _step(shape), shape[0])) for begin in range(0, shape[0], _step(shape)))
    memory = MemoryPool()
    for piece in prefetch(partial(weights.reader.rows, name, part, memory) for part in parts):
        yield piece.to(weights.device)


def _step(shape: tuple[int, int]) -> int:
    return max(1, STEP // shape[1] // PADDED) * PADDED


def _same(weights: WeightLoader, first: str, second: str) -> bool:
    reader = weights.reader
    if reader.shape(first) != reader.shape(second):
        return False
    return all(torch.equal(a.float(), b.float()) for a, b in zip(reader.chunks(first), reader.chunks(second),
                                                                 strict=False))
