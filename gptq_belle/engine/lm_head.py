"""The embedding and the lm_head. A packed lm_head is one matrix (V, H) for both if they are tied.

BLOOM's matrix has 2 GB in float16, 40 % of a 4-bit BELLE-7B, and every token reads all of it. In 8 bits (one scale per
row and up to 128 inputs) it has half the size, and its effect on the KL divergence is hard to measure. The embedding
lookup and the lm_head share the packed matrix. It is quantized while it is read, some rows at a time, so nothing larger
than the result is in memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from gptq_belle.checkpoint.packed_reader import linear_quantization, packed_lm_head_bits, packed_lm_head_rows
from gptq_belle.checkpoint.prefetch import prefetch
from gptq_belle.engine.linear import DenseLinear, LinearOperator, PackedLinear
from gptq_belle.engine.weight_loader import WeightLoader
from gptq_belle.errors import InputError, UsageError
from gptq_belle.formats.packed_lm_head import (
    GROUP_SIZES,
    HEAD_CODES,
    WEIGHTS_PER_STEP,
    head_group_size,
    quantize_rows,
)
from gptq_belle.formats.packing import pack_rows
from gptq_belle.formats.quantize_config import HEAD_BITS
from gptq_belle.kernels import cpu_layout, cpu_packed_rows
from gptq_belle.kernels.dispatch import PreparedWeight, choose_kernel, lookup_rows, prepare_weight
from gptq_belle.kernels.huge_pages import MemoryPool
from gptq_belle.kernels.layout import checked_weight
from gptq_belle.kernels.triton_layout import SlicedWeight
from gptq_belle.models.architectures import LM_HEAD
from gptq_belle.models.dimensions import Dimensions

PADDED = cpu_layout.OUTPUT_MULTIPLE  # the number of rows is padded to a multiple of this
# Codes (n, H) uint8 and scales (n, groups) float16 of some rows at a time.
QuantizedRows = Iterable[tuple[Tensor, Tensor]]


@dataclass(slots=True)
class Embedding:
    """Token ids (n,) to embeddings (n, H) in the dtype of activations.

    Attributes:
        table: (V, H) in the dtype of the file.
        dtype: dtype of activations.
        extra_bytes: size of the table if the lm_head does not use it, else 0.
    """

    table: Tensor
    dtype: torch.dtype
    extra_bytes: int

    def __call__(self, ids: Tensor) -> Tensor:
        return self.table[ids].to(self.dtype)


@dataclass(slots=True)
class PackedEmbedding:
    """`Embedding` on the packed matrix of a tied lm_head."""

    weight: PreparedWeight
    dtype: torch.dtype
    extra_bytes: int = 0

    def __call__(self, ids: Tensor) -> Tensor:
        return lookup_rows(self.weight, ids).to(self.dtype)


def check_head_bits(bits: int | None) -> None:
    """Raise UsageError unless bits are in HEAD_BITS, or None for the default."""
    if bits not in (None, *HEAD_BITS):
        raise UsageError(f"head bits {bits} is not allowed", f"Choose one of {', '.join(map(str, HEAD_BITS))}.")


def embedding_and_head(weights: WeightLoader, name: str,
                       sizes: Dimensions) -> tuple[Embedding | PackedEmbedding, LinearOperator]:
    """Load the embedding and the lm_head.

    Args:
        weights: loader of the checkpoint. Its `head_bits` are 16 (the dtype of activations), 8, 4 or None: 8 for a tied
            lm_head of a model with packed blocks, else 16.
        name: full name of the embedding.
        sizes: sizes of the model. If they say that the lm_head is tied, but the file has another lm_head, the file's
            is used.
    Raises:
        InputError: a matrix is missing, has another shape, or contains NaN or infinity.
        UsageError: the shape does not allow the requested bits.
    """
    shape, stored, embedding = (sizes.vocab_size, sizes.hidden_size), f"{LM_HEAD}.weight", f"{name}.weight"
    if (bits_on_disk := packed_lm_head_bits(weights.reader, *shape)) is not None:
        return _load_packed_head(weights, embedding, shape, bits_on_disk, sizes.tied)
    if weights.reader.is_packed(LM_HEAD):
        return _load_gptq_head(weights, embedding, shape)
    tied = sizes.tied and (stored not in weights.reader or _is_same_tensor(weights, embedding, stored))
    packable = tied and weights.quantization is not None and packing_obstacle(weights, shape) is None
    bits = weights.head_bits or (8 if packable else 16)
    head: LinearOperator
    if bits != 16:
        source = embedding if tied else stored
        weights.expect(source, *shape)
        group = head_group_size(shape[1]) or 0
        rows = (quantize_rows(matrix, bits, group) for matrix in _read_rows(weights, source, shape))
        weight = _packed_head(weights, source, shape, bits, rows)
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


def _load_packed_head(weights: WeightLoader, embedding: str, shape: tuple[int, int], bits: int,
                      tied: bool) -> tuple[Embedding | PackedEmbedding, LinearOperator]:
    """Load an lm_head that is packed on disk, and the embedding."""
    if weights.head_bits not in (None, bits):
        raise UsageError(f"{weights.reader.path} contains its lm_head in {bits} bits only",
                         f"Omit the head bits or choose {bits}; other bits need the full-precision model.")
    rows = packed_lm_head_rows(weights.reader, bits, _rows_per_step(shape))
    weight = _packed_head(weights, HEAD_CODES, shape, bits, rows)
    if tied:
        return PackedEmbedding(weight, weights.dtype), PackedLinear(weight, None)
    table = weights.tensor(embedding, *shape, narrow=True)
    return Embedding(table, weights.dtype, table.nbytes), PackedLinear(weight, None)


def _load_gptq_head(weights: WeightLoader, embedding: str, shape: tuple[int, int]) -> tuple[Embedding, LinearOperator]:
    """Load an lm_head that was quantized like the linears of the blocks, and the embedding."""
    bits = linear_quantization(weights.reader, weights.quantization, LM_HEAD).bits
    if weights.head_bits not in (None, bits):
        raise UsageError(f"{weights.reader.path} contains its lm_head in {bits} bits only",
                         "Omit the head bits; other bits need the full-precision model.")
    head = weights.linear([LM_HEAD], shape[1], [shape[0]], False)
    table = weights.tensor(embedding, *shape, narrow=True)
    return Embedding(table, weights.dtype, table.nbytes), head


def _packed_head(weights: WeightLoader, name: str, shape: tuple[int, int], bits: int,
                 rows: QuantizedRows) -> PreparedWeight:
    """Pack quantized rows of the matrix `name` in the layout of the kernel that computes the lm_head."""
    group = head_group_size(shape[1])
    if (obstacle := packing_obstacle(weights, shape)) is not None or group is None:
        raise UsageError(f"{name} of shape {shape} cannot be packed: {obstacle}", "Choose head bits 16.")
    try:
        pack = _pack_for_cpu if _kernel(weights, shape) == "native" else _pack_words
        prepared = pack(weights, shape, bits, group, rows)
    except ValueError as error:
        raise InputError(f"{weights.reader.path}: tensor {name}: {error}", "The file is damaged.") from error
    weights.count_bytes(prepared)
    return prepared


def packing_obstacle(weights: WeightLoader, shape: tuple[int, int]) -> str | None:
    """Reason why an lm_head of this shape cannot be packed; None if it can."""
    if shape[1] % GROUP_SIZES[-1]:
        return f"its width is not a multiple of {GROUP_SIZES[-1]}"
    if shape[0] % PADDED and _kernel(weights, shape) not in ("native", "triton"):
        return f"without the fast kernels, its number of rows must be a multiple of {PADDED}"
    return None


def _kernel(weights: WeightLoader, shape: tuple[int, int]) -> str:
    g_idx = torch.arange(shape[1], dtype=torch.int32) // GROUP_SIZES[-1]
    return choose_kernel(g_idx, device=weights.device, dtype=weights.dtype).kernel


def _pack_for_cpu(weights: WeightLoader, shape: tuple[int, int], bits: int, group: int,
                  rows: QuantizedRows) -> PreparedWeight:
    """Pack rows in the layout of the native CPU kernel."""
    blocks = -(-shape[0] // PADDED) * PADDED // cpu_layout.BLOCK
    all_codes = cpu_layout.empty_codes(blocks, shape[1] // group, group * bits // 32)
    all_scales = torch.empty(blocks, shape[1] // group, cpu_layout.BLOCK, dtype=torch.float16)
    start = 0
    for codes, scales in _padded(rows):
        stop = start + len(codes) // cpu_layout.BLOCK
        part = cpu_packed_rows.prepare_rows(codes, scales, bits, weights.precision, all_codes[start:stop])
        all_scales[start:stop] = part.scales
        start = stop
    return part._replace(codes=all_codes, scales=all_scales, out_features=shape[0])


def _pack_words(weights: WeightLoader, shape: tuple[int, int], bits: int, group: int,
                rows: QuantizedRows) -> PreparedWeight:
    """Pack rows in GPTQ's words, and prepare these for their kernel."""
    device, outputs, groups = weights.device, -(-shape[0] // PADDED) * PADDED, shape[1] // group
    qweight = torch.empty(shape[1] * bits // 32, outputs, dtype=torch.int32, device=device)
    all_scales = torch.empty(groups, outputs, dtype=torch.float16, device=device)
    start = 0
    for codes, scales in _padded(rows):
        stop = start + len(codes)
        qweight[:, start:stop] = pack_rows(codes.to(device).t(), bits)
        all_scales[:, start:stop] = scales.to(device).t()
        start = stop
    stored_zeros = torch.full((outputs, groups), (1 << (bits - 1)) - 1, dtype=torch.uint8, device=device)
    weight = checked_weight(qweight, pack_rows(stored_zeros, bits).t().contiguous(), all_scales, None, bits, 1)
    if device.type == "cpu":  # no native library; `prepare_weight` would copy the words
        return weight
    prepared = prepare_weight(weight, device=device, dtype=weights.dtype)
    return prepared._replace(out_features=shape[0]) if isinstance(prepared, SlicedWeight) else prepared


def _padded(rows: QuantizedRows) -> Iterator[tuple[Tensor, Tensor]]:
    """Pad each chunk of rows to a multiple of PADDED rows; the scales of the added rows are 0."""
    for codes, scales in rows:
        missing = -len(codes) % PADDED
        yield (pad(codes, (0, 0, 0, missing)), pad(scales, (0, 0, 0, missing))) if missing else (codes, scales)


def _read_rows(weights: WeightLoader, name: str, shape: tuple[int, int]) -> Iterator[Tensor]:
    """Read a matrix some rows at a time, always a multiple of PADDED except at the end."""
    step, memory = _rows_per_step(shape), MemoryPool()
    parts = (range(start, min(start + step, shape[0])) for start in range(0, shape[0], step))
    for rows in prefetch(partial(weights.reader.rows, name, part, memory) for part in parts):
        yield rows.to(weights.device)


def _rows_per_step(shape: tuple[int, int]) -> int:
    return max(1, WEIGHTS_PER_STEP // shape[1] // PADDED) * PADDED


def _is_same_tensor(weights: WeightLoader, first: str, second: str) -> bool:
    reader = weights.reader
    if reader.shape(first) != reader.shape(second):
        return False
    return all(torch.equal(a.float(), b.float()) for a, b in zip(reader.chunks(first), reader.chunks(second),
                                                                 strict=False))
