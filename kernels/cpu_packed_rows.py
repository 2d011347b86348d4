"""The matrix (N, K) of a product in `cpu_layout.py`'s layout, row by row: rounded, laid out, and looked up."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .cpu_layout import BLOCK, PADDED, PARTS, CpuWeight, empty_codes
from .group_sort import RUN_LENGTHS
from .native_library import NativeLibrary, load_library, require_library
from .native_structs import CodeRowsStruct, RowQuantizationStruct

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def is_supported(matrix: Tensor) -> bool:
    """Whether `quantize_rows` takes such a matrix, and the library is built."""
    return matrix.dtype in DTYPE_CODES and matrix.is_cpu and isinstance(load_library(), NativeLibrary)


def quantize_rows(matrix: Tensor, bits: int, group: int, clips: Sequence[float] = (), *,
                  isa: str | None = None) -> tuple[Tensor, Tensor]:
    """Round the rows of a matrix (N, K) to symmetric codes, one scale for `group` inputs, halves to even.

    Args:
        matrix: float32, float16 or bfloat16.
        bits: 4 or 8.
        group: 32, 64 or 128, a divisor of K.
        clips: shares of a group's largest magnitude that are tried as the end of the grid beside 1; that with the
            least sum of squared errors is taken.
        isa: one of `load_library().usable`; left out, the fastest.
    Returns:
        codes (N, K) uint8, the zero point at 2**(bits - 1); scales (N, K / group) float16.
    Raises:
        ValueError: it holds NaN or infinity; another dtype, shape or device.
    """
    if matrix.dtype not in DTYPE_CODES or not matrix.is_cpu or matrix.dim() != 2:
        raise ValueError(f"{matrix.dtype} {tuple(matrix.shape)} on {matrix.device} cannot be rounded here")
    count, inputs = matrix.shape
    if group not in RUN_LENGTHS or inputs % group or bits not in (4, 8):
        raise ValueError(f"{inputs} inputs in groups of {group}, {bits} bits: not {RUN_LENGTHS}, 4 or 8")
    matrix, tried, lib = matrix.contiguous(), torch.tensor(clips, dtype=torch.float32), require_library()
    codes = torch.empty(count, inputs, dtype=torch.uint8)
    scales = torch.empty(count, inputs // group, dtype=torch.float16)
    struct = RowQuantizationStruct(matrix.data_ptr(), codes.data_ptr(), scales.data_ptr(), tried.data_ptr(), count,
                                   inputs, len(tried), group, bits, DTYPE_CODES[matrix.dtype])
    if lib.round_rows(struct, torch.get_num_threads(), lib.number(isa)):
        raise ValueError("it holds NaN or infinity")
    return codes, scales


def prepare_rows(matrix: Tensor, scales: Tensor, bits: int, precision: str = "exact",
                 codes: Tensor | None = None) -> CpuWeight:
    """Lay out a symmetric matrix (N, K) whose inputs stand in order, such as an embedding.

    Args:
        matrix: (N, K) uint8 codes below 2**bits, the zero point in the middle. N a multiple of 32.
        scales: (N, G) float16, G runs of 32, 64 or 128 inputs.
        bits: 4 or 8.
        precision: as `prepare`.
        codes: memory for the codes, from `empty_codes`.
    Raises:
        ValueError: anything else.
    """
    (outputs, inputs), groups = matrix.shape, scales.shape[1]
    run = inputs // groups
    fits = outputs % PADDED == 0 and scales.shape[0] == outputs and run in RUN_LENGTHS and groups * run == inputs
    if not fits or bits not in (4, 8) or matrix.dtype != torch.uint8:
        raise ValueError(f"{matrix.dtype} {tuple(matrix.shape)} of {bits} bits and {groups} groups have no such layout")
    shape = outputs // BLOCK, groups, run * bits // 32
    codes = empty_codes(*shape) if codes is None else codes
    if codes.shape != (*shape, 64) or not codes.is_contiguous() or codes.dtype != torch.uint8:
        raise ValueError(f"codes {codes.dtype} {tuple(codes.shape)} are no contiguous memory for {(*shape, 64)}")
    rows = matrix.contiguous()
    require_library().pack_rows(CodeRowsStruct(rows.data_ptr(), outputs, groups, run, bits), codes.data_ptr(),
                                torch.get_num_threads())
    g_idx = torch.arange(inputs, dtype=torch.int32) // run
    table = scales.view(-1, BLOCK, groups).transpose(1, 2).contiguous()
    return CpuWeight(codes, table, None, None, g_idx, inputs, outputs, run, bits, 1 << (bits - 1), PARTS[precision],
                     bits, groups, 1)


def lookup_rows(weight: CpuWeight, ids: Tensor) -> Tensor:
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
