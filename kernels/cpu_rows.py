"""The matrix (N, K) of a product in `cpu.py`'s layout, row by row: made from its rows, and looked up by row."""

import torch
from torch import Tensor

from .cpu import BLOCK, PADDED, PARTS, CpuWeight, empty_codes, native
from .library import RowsStruct
from .runs import RUNS


def from_rows(matrix: Tensor, scales: Tensor, bits: int, precision: str = "exact",
              codes: Tensor | None = None) -> CpuWeight:
    """Lay out a symmetric matrix (N, K) whose inputs stand in order, such as an embedding.

    Args:
        matrix: (N, K) uint8 codes below 2**bits, the zero point in the middle; or, with 8 bits, the float32 numbers
            themselves, all finite, which are rounded by their scales. N a multiple of 32.
        scales: (N, G) float16, G runs of 32, 64 or 128 inputs.
        bits: 4 or 8.
        precision: as `prepare`.
        codes: memory for the codes, from `empty_codes`.
    Raises:
        ValueError: anything else.
    """
    (outputs, inputs), groups = matrix.shape, scales.shape[1]
    run, rounds = inputs // groups, bits == 8 and matrix.dtype == torch.float32
    fits = outputs % PADDED == 0 and scales.shape[0] == outputs and run in RUNS and groups * run == inputs
    if not fits or bits not in (4, 8) or not (rounds or matrix.dtype == torch.uint8):
        raise ValueError(f"{matrix.dtype} {tuple(matrix.shape)} of {bits} bits and {groups} groups have no such layout")
    shape = outputs // BLOCK, groups, run * bits // 32
    codes = empty_codes(*shape) if codes is None else codes
    if codes.shape != (*shape, 64) or not codes.is_contiguous() or codes.dtype != torch.uint8:
        raise ValueError(f"codes {codes.dtype} {tuple(codes.shape)} are no contiguous memory for {(*shape, 64)}")
    rows, divisors = matrix.contiguous(), scales.float().contiguous()
    native().pack_rows(RowsStruct(rows.data_ptr(), divisors.data_ptr() if rounds else None, outputs, groups, run, bits),
                       codes.data_ptr(), torch.get_num_threads())
    g_idx = torch.arange(inputs, dtype=torch.int32) // run
    table = scales.view(-1, BLOCK, groups).transpose(1, 2).contiguous()
    return CpuWeight(codes, table, None, None, g_idx, inputs, outputs, run, bits, 1 << (bits - 1), PARTS[precision],
                     bits, groups, 1)


def rows(weight: CpuWeight, ids: Tensor) -> Tensor:
    """Rows ids (n,) of the matrix (N, K) whose product this is: (n, K) float32, exact where scales are float16."""
    block, lane, mask = ids // BLOCK, ids % BLOCK, 2**weight.bits - 1
    packed = weight.codes.unflatten(-1, (BLOCK, 4))[block, :, :, lane]  # (n, G, vectors, 4)
    fields = torch.stack([packed >> shift & mask for shift in range(0, 8, weight.bits)], 3)
    zeros = weight.zero if weight.zeros is None else weight.zeros[block, :, lane].float()[..., None]
    values = (fields.flatten(2).float() - zeros) * weight.scales[block, :, lane].float()[..., None]
    values = values.flatten(1)
    if weight.order is None:
        return values[:, : weight.in_features]
    filled = weight.order >= 0
    found = values.new_empty(len(ids), weight.in_features)
    found[:, weight.order[filled].long()] = values[:, filled]
    return found
