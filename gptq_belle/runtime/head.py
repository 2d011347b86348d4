"""The embedding and the head: one matrix (V, H) for both where they are tied, looked up by row and multiplied by.

BLOOM's is 2 GB in float16, 40 % of a 4-bit BELLE-7B, and every token reads it whole. In 8 bits (one scale for up to 128
inputs of a row) it is half as large as there and what it costs in KL is hard to measure; one packed copy serves the
look-up and the product. Rows are rounded some at a time while they are read: nothing larger than the result is held.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_belle.checkpoint.packing import pack_rows
from gptq_belle.errors import InputError, UsageError
from gptq_belle.kernels import cpu, cpu_rows
from gptq_belle.kernels.dispatch import PreparedWeight, choose, prepare, rows
from gptq_belle.kernels.layout import canonical
from gptq_belle.kernels.triton_layout import SlicedWeight
from gptq_belle.models.registry import HEAD
from gptq_belle.models.shapes import Dimensions
from gptq_belle.runtime.weights import Dense, Packed, Product, Weights

PADDED = cpu.PADDED  # rows come in multiples of it
HEAD_BITS = (16, 8, 4)
GROUPS = (128, 64, 32)  # inputs that share a scale: the largest that divides the width
STEP = 1 << 24  # weights rounded at a time
CLIPS = {8: (1.0,), 4: (1.0, 0.9, 0.8)}  # shares of a group's largest weight tried as the end of the grid


@dataclass(slots=True)
class Lookup:
    """Token ids (n,) to embeddings (n, H) in the dtype of activations; the table stays in that of the file."""

    table: Tensor
    dtype: torch.dtype
    extra_bytes: int  # of the table, where it is not also the head

    def __call__(self, ids: Tensor) -> Tensor:
        return self.table[ids].to(self.dtype)


@dataclass(slots=True)
class PackedLookup:
    """The same from the head's packed copy."""

    weight: PreparedWeight
    dtype: torch.dtype
    extra_bytes: int = 0

    def __call__(self, ids: Tensor) -> Tensor:
        return rows(self.weight, ids).to(self.dtype)


def check_head_bits(bits: int | None) -> None:
    """Raises UsageError for bits that a head does not come in; None leaves the choice."""
    if bits not in (None, *HEAD_BITS):
        raise UsageError(f"head bits {bits} is not allowed", f"Choose one of {', '.join(map(str, HEAD_BITS))}.")


def embedding_and_head(weights: Weights, name: str, sizes: Dimensions) -> tuple[Lookup | PackedLookup, Product]:
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
    shape, stored, embedding = (sizes.vocabulary, sizes.width), f"{HEAD}.weight", f"{name}.weight"
    tied = sizes.tied and (stored not in weights.reader or _same(weights, embedding, stored))
    packable = tied and weights.quantization is not None and refusal(weights, shape) is None
    bits = weights.head_bits or (8 if packable else 16)
    head: Product
    if tied:
        weights.mark_used(stored)
    if bits != 16:
        weight = _packed(weights, embedding if tied else stored, shape, bits)
        head = Packed(weight, None)
        if tied:
            return PackedLookup(weight, weights.dtype), head
    elif tied:
        table = weights.tensor(embedding, *shape)
        return Lookup(table, weights.dtype, 0), Dense(table, None)
    else:
        head = Dense(weights.tensor(stored, *shape), None)
    table = weights.tensor(embedding, *shape, narrow=True)
    return Lookup(table, weights.dtype, table.nbytes), head


def rounded(matrix: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Round rows of a matrix (n, H) to symmetric codes.

    Returns:
        codes (n, H) uint8, the zero point at 2**(bits - 1); scales (n, H / group) float16.
    Raises:
        ValueError: it holds NaN or infinity.
    """
    groups = matrix.float().unflatten(-1, (-1, group))
    largest, top = groups.abs().amax(-1, keepdim=True), (1 << (bits - 1)) - 1
    if not bool(largest.isfinite().all()):
        raise ValueError("it holds NaN or infinity")
    best: tuple[Tensor, Tensor] | None = None
    error = torch.full_like(largest, torch.inf)
    for clip in CLIPS[bits]:
        scales = (largest * clip / top).clamp_(min=6e-8, max=65504).half().float()
        codes = (groups / scales).round_().clamp_(-top - 1, top)
        if best is None and len(CLIPS[bits]) == 1:
            best = codes, scales
            break
        found = (codes * scales - groups).square_().sum(-1, keepdim=True)
        better = found < error
        error = torch.where(better, found, error)
        best = (codes, scales) if best is None else (torch.where(better, codes, best[0]),
                                                     torch.where(better, scales, best[1]))
    assert best is not None
    return best[0].add_(top + 1).to(torch.uint8).flatten(1), best[1].squeeze(-1).half()


def _packed(weights: Weights, name: str, shape: tuple[int, int], bits: int) -> PreparedWeight:
    """The matrix `name` rounded and laid out for its kernel on the device."""
    if (refused := refusal(weights, shape)) is not None:
        raise UsageError(f"{name} of shape {shape} cannot be packed: {refused}", "Choose head bits 16.")
    group = next(size for size in GROUPS if shape[1] % size == 0)
    try:
        prepared = (_native if _kernel(weights, shape) == "native" else _words)(weights, name, shape, bits, group)
    except ValueError as error:
        raise InputError(f"{weights.reader.path}: tensor {name}: {error}", "The file is damaged.") from error
    weights.nbytes += sum(part.nbytes for part in prepared._asdict().values() if isinstance(part, Tensor))
    return prepared


def refusal(weights: Weights, shape: tuple[int, int]) -> str | None:
    """Why a head of that shape cannot be packed; None where it can."""
    if shape[1] % GROUPS[-1]:
        return f"its rows are no multiple of {GROUPS[-1]}"
    if shape[0] % PADDED and _kernel(weights, shape) not in ("native", "triton"):
        return f"without the fast kernels, its rows must be a multiple of {PADDED} in number"
    return None


def _kernel(weights: Weights, shape: tuple[int, int]) -> str:
    g_idx = torch.arange(shape[1], dtype=torch.int32) // GROUPS[-1]
    return choose(8, g_idx, shape[0], device=weights.device, dtype=weights.dtype).kernel


def _native(weights: Weights, name: str, shape: tuple[int, int], bits: int, group: int) -> PreparedWeight:
    blocks = -(-shape[0] // PADDED) * PADDED // cpu.BLOCK
    codes = cpu.empty_codes(blocks, shape[1] // group, group * bits // 32)
    scales = torch.empty(blocks, shape[1] // group, cpu.BLOCK, dtype=torch.float16)
    at = 0
    for piece in _pieces(weights, name, shape):
        part = cpu_rows.from_rows(*rounded(piece, bits, group), bits, weights.precision)
        codes[at : at + len(part.codes)], scales[at : at + len(part.codes)] = part.codes, part.scales
        at += len(part.codes)
    return part._replace(codes=codes, scales=scales, out_features=shape[0])


def _words(weights: Weights, name: str, shape: tuple[int, int], bits: int, group: int) -> PreparedWeight:
    device, outputs, groups = weights.device, -(-shape[0] // PADDED) * PADDED, shape[1] // group
    words = torch.empty(shape[1] * bits // 32, outputs, dtype=torch.int32, device=device)
    scales = torch.empty(groups, outputs, dtype=torch.float16, device=device)
    at = 0
    for piece in _pieces(weights, name, shape):
        codes, scale = rounded(piece.to(device), bits, group)
        words[:, at : at + len(piece)], scales[:, at : at + len(piece)] = pack_rows(codes.t(), bits), scale.t()
        at += len(piece)
    stored = torch.full((outputs, groups), (1 << (bits - 1)) - 1, dtype=torch.uint8, device=device)
    weight = canonical(words, pack_rows(stored, bits).t().contiguous(), scales, None, bits, 1)
    if device.type == "cpu":  # not through `prepare`: torch's int4 layout cannot be looked into
        return weight
    prepared = prepare(*weight[:4], bits, 1, device=device, dtype=weights.dtype)
    return prepared._replace(out_features=shape[0]) if isinstance(prepared, SlicedWeight) else prepared


def _pieces(weights: Weights, name: str, shape: tuple[int, int]) -> Iterator[Tensor]:
    """The rows of a matrix, some at a time, a multiple of PADDED each; zeros behind the last one."""
    weights.expect(name, *shape)
    step = max(1, STEP // shape[1] // PADDED) * PADDED
    for begin in range(0, shape[0], step):
        piece = weights.reader.rows(name, range(begin, min(begin + step, shape[0])))
        yield torch.nn.functional.pad(piece, (0, 0, 0, -len(piece) % PADDED))


def _same(weights: Weights, first: str, second: str) -> bool:
    reader = weights.reader
    if reader.shape(first) != reader.shape(second):
        return False
    return all(torch.equal(a.float(), b.float()) for a, b in zip(reader.chunks(first), reader.chunks(second),
                                                                 strict=False))
