"""A matrix (N, K) in the layout of `cpu_layout.py`, row by row: rounded to codes, laid out, and looked up."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .cpu_layout import ACTIVATION_PARTS, BLOCK, OUTPUT_MULTIPLE, CpuWeight, empty_codes
from .layout import RUN_LENGTHS, restore_input_order
from .native_library import NativeLibrary, load_library, require_library
from .native_structs import CodeRowsStruct, RowQuantizationStruct
from .tensor_checks import check_tensors

MATRIX_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in native.h


def is_supported(matrix: Tensor) -> bool:
    """Whether `quantize_rows` takes such a matrix, and the library is built."""
    return matrix.dtype in MATRIX_KINDS and matrix.is_cpu and isinstance(load_library(), NativeLibrary)


def quantize_rows(matrix: Tensor, bits: int, group: int, clips: Sequence[float] = (), *,
                  isa: str | None = None) -> tuple[Tensor, Tensor]:
    """Round the rows of a matrix (N, K) to symmetric codes with one scale per `group` inputs, halves to even.

    Args:
        matrix: float32, float16 or bfloat16.
        bits: 4 or 8.
        group: 32, 64 or 128, a divisor of K.
        clips: fractions of a group's largest magnitude that are tried as the end of the grid besides 1; the one with
            the smallest sum of squared errors is used.
        isa: one of `load_library().usable_isas`; by default the fastest.
    Returns:
        codes (N, K) uint8, the zero point at 2**(bits - 1); scales (N, K / group) float16.
    Raises:
        ValueError: NaN or infinity; another dtype, shape or device.
    """
    check_tensors((None, None), *MATRIX_KINDS, contiguous=False, matrix=matrix)
    count, inputs = matrix.shape
    if group not in RUN_LENGTHS or inputs % group or bits not in (4, 8):
        raise ValueError(f"{inputs} inputs in groups of {group}, {bits} bits: not {RUN_LENGTHS}, 4 or 8")
    matrix, tried, lib = matrix.contiguous(), torch.tensor(clips, dtype=torch.float32), require_library()
    codes = torch.empty(count, inputs, dtype=torch.uint8)
    scales = torch.empty(count, inputs // group, dtype=torch.float16)
    struct = RowQuantizationStruct(matrix.data_ptr(), codes.data_ptr(), scales.data_ptr(), tried.data_ptr(), count,
                                   inputs, len(tried), group, bits, MATRIX_KINDS[matrix.dtype])
    if lib.round_rows(struct, torch.get_num_threads(), lib.isa_index(isa)):
        raise ValueError("the matrix holds NaN or infinity")
    return codes, scales


def prepare_rows(matrix: Tensor, scales: Tensor, bits: int, precision: str = "exact",
                 codes: Tensor | None = None) -> CpuWeight:
    """Lay out a symmetric matrix (N, K) with inputs in their original order, such as an embedding.

    Args:
        matrix: (N, K) uint8 codes below 2**bits, the zero point in the middle. N a multiple of 32.
        scales: (N, G) float16 for G runs of 32, 64 or 128 inputs.
        bits: 4 or 8.
        precision: as for `cpu_layout.prepare`.
        codes: memory for the codes, from `empty_codes`.
    Raises:
        ValueError: anything else.
    """
    (outputs, inputs), groups = matrix.shape, scales.shape[1]
    run = inputs // groups
    if outputs % OUTPUT_MULTIPLE or run not in RUN_LENGTHS or groups * run != inputs or bits not in (4, 8):
        raise ValueError(f"a matrix {tuple(matrix.shape)} of {bits} bits and {groups} groups cannot be laid out")
    check_tensors((outputs, inputs), torch.uint8, contiguous=False, matrix=matrix)
    check_tensors((outputs, groups), torch.float16, contiguous=False, scales=scales)
    shape = outputs // BLOCK, groups, run * bits // 32
    codes = empty_codes(*shape) if codes is None else codes
    check_tensors((*shape, 64), torch.uint8, codes=codes)
    rows = matrix.contiguous()
    require_library().pack_rows(CodeRowsStruct(rows.data_ptr(), outputs, groups, run, bits), codes.data_ptr(),
                                torch.get_num_threads())
    g_idx = torch.arange(inputs, dtype=torch.int32) // run
    table = scales.view(-1, BLOCK, groups).transpose(1, 2).contiguous()
    return CpuWeight(codes, table, None, None, g_idx, inputs, outputs, run, bits, 1 << (bits - 1),
                     ACTIVATION_PARTS[precision], bits, groups, 1)


def lookup_rows(weight: CpuWeight, ids: Tensor) -> Tensor:
    """Rows ids (n,) of the matrix (N, K) of a product: (n, K) float32, exact if scales are float16."""
    block, lane, mask = ids // BLOCK, ids % BLOCK, 2**weight.bits - 1
    packed = weight.codes.unflatten(-1, (BLOCK, 4))[block, :, :, lane]  # (n, G, vectors, 4)
    fields = torch.stack([packed >> shift & mask for shift in range(0, 8, weight.bits)], 3)
    zeros = weight.zero if weight.zeros is None else weight.zeros[block, :, lane].float()[..., None]
    values = (fields.flatten(2).float() - zeros) * weight.scales[block, :, lane].float()[..., None]
    return restore_input_order(values.flatten(1), weight.order, weight.in_features)
