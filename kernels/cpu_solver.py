"""The inner loops of quantization on a CPU, by `native/solver.h`: GPTQ, coordinate descent, and the grid search.

Tensors are (inputs, N) float32, as in the solver. Every operation is rounded as NumPy rounds it, so that results are
the same, to the bit, with every instruction set and number of threads, and the same as those of `triton_gptq.py`.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .native_library import NativeLibrary, load_library, require_library
from .native_structs import CoordinateDescentStruct, GptqBlockStruct, GridSearchStruct
from .tensor_checks import check_tensors

BLOCK = 128  # most inputs per call, of GPTQ and of coordinate descent
LANES = 16  # N of a grid search is padded to a multiple of it


def is_supported(tensor: Tensor) -> bool:
    """Whether these kernels take such weights: float32 on a CPU, and the library is built."""
    return tensor.is_cpu and tensor.dtype == torch.float32 and isinstance(load_library(), NativeLibrary)


def solve_block(W: Tensor, Hinv: Tensor, codes: Tensor, Err: Tensor, scales: Tensor, zeros: Tensor, *, group: int,
                bits: int, sym: bool, isa: str | None = None) -> None:
    """Round the inputs of one block in order, each after the errors of those before it are compensated.

    Args:
        W, Hinv, codes, Err, scales, zeros, group, bits, sym: as for `triton_gptq.solve_block`; W is overwritten.
        isa: one of `load_library().usable_isas`; by default the fastest.
    Raises:
        ValueError: tensors that do not fit together; nothing was read or written.
    """
    lib = require_library()
    inputs, outputs = W.shape
    grids = inputs // group if group else scales.shape[0]
    if not 0 < inputs <= BLOCK or group and inputs % group or not group and grids not in (1, inputs):
        raise ValueError(f"a block of {inputs} inputs in groups of {group} with {grids} grids")
    check_tensors((inputs, outputs), torch.float32, W=W, Err=Err)
    check_tensors((inputs, outputs), torch.uint8, codes=codes)
    check_tensors((grids, outputs), torch.float32, scales=scales, zeros=zeros)
    check_tensors((inputs, inputs), torch.float32, contiguous=False, Hinv=Hinv)
    lib.gptq_block(
        GptqBlockStruct(W.data_ptr(), Hinv.data_ptr(), codes.data_ptr(), Err.data_ptr(), scales.data_ptr(),
                        zeros.data_ptr(), inputs, outputs, Hinv.stride(0), Hinv.stride(1), outputs if grids > 1 else 0,
                        group, 2**bits - 1, sym),
        torch.get_num_threads(), lib.isa_index(isa))


def descend(code: Tensor, scale: Tensor, zero: Tensor, residual: Tensor, block: Tensor, diagonal: Tensor, bits: int, *,
            isa: str | None = None) -> None:
    """One sweep of coordinate descent over at most 128 inputs of a group, which changes `code` in place.

    Args:
        code, scale, zero, residual, block, diagonal, bits: as for `refine.descend`; residual is not changed.
        isa: as for `solve_block`.
    Raises:
        ValueError: tensors that do not fit together; nothing was read or written.
    """
    lib = require_library()
    inputs, outputs = code.shape
    if not 0 < inputs <= BLOCK or block.shape != (inputs, inputs):
        raise ValueError(f"{inputs} inputs with a block {tuple(block.shape)} of the Hessian")
    block = block if block.stride(1) == 1 else block.contiguous()
    check_tensors((inputs, outputs), torch.float32, code=code, residual=residual)
    check_tensors((outputs,), torch.float32, scale=scale, zero=zero)
    check_tensors((inputs,), torch.float32, block=block[0], diagonal=diagonal)
    lib.descend(
        CoordinateDescentStruct(code.data_ptr(), residual.data_ptr(), scale.data_ptr(), zero.data_ptr(),
                                block.data_ptr(), diagonal.data_ptr(), inputs, outputs, block.stride(0), 2**bits - 1),
        torch.get_num_threads(), lib.isa_index(isa))


def search_grid(weight: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, bits: int, smallest: float, *,
                isa: str | None = None) -> Tensor:
    """For each output, the candidate grid with the smallest error of a group: sum_k h_k (w_k - s (code_k - zero))^2.

    Args:
        weight: (g, N) float32, the group's weights.
        importance: (g,) float32, h.
        scales, zeros: (candidates, N) float32.
        bits: bits per code.
        smallest: magnitude of a scale below which a candidate is ignored.
        isa: as for `solve_block`.
    Returns:
        (N,) int32, the index of the first of the best candidates; -1 if all are ignored.
    Raises:
        ValueError: tensors that do not fit together; nothing was read or written.
    """
    lib = require_library()
    (inputs, outputs), padding = weight.shape, -weight.shape[1] % LANES
    if padding:
        weight, scales, zeros = (pad(table, (0, padding)) for table in (weight, scales, zeros))
    weight, importance = weight.contiguous(), importance.contiguous()
    candidates, lanes = len(scales), outputs + padding
    check_tensors((inputs, lanes), torch.float32, weight=weight)
    check_tensors((inputs,), torch.float32, importance=importance)
    check_tensors((candidates, lanes), torch.float32, scales=scales, zeros=zeros)
    best = torch.empty(lanes, dtype=torch.int32)
    lib.search(
        GridSearchStruct(weight.data_ptr(), importance.data_ptr(), scales.data_ptr(), zeros.data_ptr(), best.data_ptr(),
                         inputs, lanes, candidates, smallest, 2**bits - 1),
        torch.get_num_threads(), lib.isa_index(isa))
    return best[:outputs]
