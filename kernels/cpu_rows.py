"""The matrix (N, K) of a product in `cpu.py`'s layout, row by row: made from its rows, and looked up by row."""

import torch
from torch import Tensor

from .cpu import BLOCK, PADDED, PARTS, CpuWeight, empty_codes
from .runs import RUNS


def from_rows(codes: Tensor, scales: Tensor, bits: int, precision: str = "exact") -> CpuWeight:
    """Lay out symmetric codes of a matrix (N, K) whose inputs stand in order, such as an embedding.

    Args:
        codes: (N, K) uint8 below 2**bits, the zero point in the middle; N a multiple of 32.
        scales: (N, G) float16, G runs of 32, 64 or 128 inputs.
        bits: 4 or 8.
        precision: as `prepare`.
    """
    outputs, inputs = codes.shape
    groups, fields = scales.shape[1], 8 // bits
    run = inputs // groups
    if outputs % PADDED or run not in RUNS or groups * run != inputs or bits not in (4, 8):
        raise ValueError(f"codes {tuple(codes.shape)} of {bits} bits with {groups} groups have no such layout")
    laid = empty_codes(outputs // BLOCK, groups, run * bits // 32)
    places = codes.view(outputs // BLOCK, BLOCK, groups, -1, fields, 4).permute(4, 0, 2, 3, 1, 5)
    shape = (*laid.shape[:-1], BLOCK, 4)
    laid.view(shape).copy_(places[0])
    for field in range(1, fields):
        laid.view(shape).bitwise_or_(places[field] << field * bits)
    g_idx = torch.arange(inputs, dtype=torch.int32) // run
    table = scales.view(-1, BLOCK, groups).transpose(1, 2).contiguous()
    return CpuWeight(laid, table, None, None, g_idx, inputs, outputs, run, bits, 1 << (bits - 1), PARTS[precision],
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
