"""The inner loops of quantizing on a CPU, by `native/solver.h`: GPTQ's walk, coordinate descent, the search for a grid.

Laid out inputs first, as in the solver: (inputs, N) float32. Operations are those of NumPy, one by one, so that results
are the same, to the bit, with every instruction set and number of threads, and those of `triton_gptq.py` on a GPU.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .native_library import NativeLibrary, check_tensors, load_library, require_library
from .native_structs import CoordinateDescentStruct, GptqBlockStruct, GridSearchStruct

BLOCK = 128  # most inputs at a time, of a walk and of a descent
LANES = 16  # N of a search is padded to it


def is_supported(tensor: Tensor) -> bool:
    """Whether these kernels take such weights: float32, on a CPU, where the library is built."""
    return tensor.is_cpu and tensor.dtype == torch.float32 and isinstance(load_library(), NativeLibrary)


def solve_block(W: Tensor, Hinv: Tensor, codes: Tensor, Err: Tensor, scales: Tensor, zeros: Tensor, *, group: int,
                bits: int, sym: bool, isa: str | None = None) -> None:
    """Round the inputs of one block, each making up for those before it; arguments as of `triton_gptq.solve_block`.

    Args:
        W: used up here.
        isa: one of `load_library().usable`; left out, the fastest.
    Raises:
        ValueError: tensors that do not fit together; nothing was read or written.
    """
    lib = require_library()
    inputs, outputs = W.shape
    tables = (inputs // group if group else scales.shape[0], outputs)
    if not 0 < inputs <= BLOCK or group and inputs % group or not group and tables[0] not in (1, inputs):
        raise ValueError(f"a block of {inputs} inputs in groups of {group} with {tables[0]} grids")
    check_tensors((inputs, outputs), W=W, Err=Err)
    check_tensors((inputs, outputs), torch.uint8, codes=codes)
    check_tensors(tables, scales=scales, zeros=zeros)
    if Hinv.shape != (inputs, inputs) or Hinv.dtype != torch.float32 or not Hinv.is_cpu:
        raise ValueError(f"Hinv: {Hinv.dtype} {tuple(Hinv.shape)}, not float32 {(inputs, inputs)}")
    lib.gptq_block(
        GptqBlockStruct(W.data_ptr(), Hinv.data_ptr(), codes.data_ptr(), Err.data_ptr(), scales.data_ptr(),
                        zeros.data_ptr(), inputs, outputs, Hinv.stride(0), Hinv.stride(1),
                        outputs if tables[0] > 1 else 0, group, 2**bits - 1, sym),
        torch.get_num_threads(), lib.number(isa))


def descend(code: Tensor, scale: Tensor, zero: Tensor, residual: Tensor, block: Tensor, diagonal: Tensor, bits: int, *,
            isa: str | None = None) -> None:
    """One sweep of coordinate descent over at most 128 inputs of a group; arguments as of `refine.descend`.

    Args:
        residual: left as it is.
        isa: as for `solve_block`.
    Raises:
        ValueError: as there.
    """
    lib = require_library()
    inputs, outputs = code.shape
    if not 0 < inputs <= BLOCK or block.shape != (inputs, inputs):
        raise ValueError(f"{inputs} inputs with a block {tuple(block.shape)} of the Hessian")
    block = block if block.stride(1) == 1 else block.contiguous()
    check_tensors((inputs, outputs), code=code, residual=residual)
    check_tensors((outputs,), scale=scale, zero=zero)
    check_tensors((inputs,), block=block[0], diagonal=diagonal)
    lib.descend(
        CoordinateDescentStruct(code.data_ptr(), residual.data_ptr(), scale.data_ptr(), zero.data_ptr(),
                                block.data_ptr(), diagonal.data_ptr(), inputs, outputs, block.stride(0), 2**bits - 1),
        torch.get_num_threads(), lib.number(isa))


def search_grid(weight: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, bits: int, smallest: float, *,
                isa: str | None = None) -> Tensor:
    """Which of some grids costs a group's outputs least: sum_k h_k (w_k - s (code_k - zero))^2.

    Args:
        weight: (g, N) float32, the group's weights.
        importance: (g,) float32, h.
        scales, zeros: (candidates, N) float32.
        bits: bits a code.
        smallest: a scale's magnitude below which a candidate does not count.
        isa: as for `solve_block`.
    Returns:
        (N,) int32, the first of the best candidates; -1 where none counts.
    Raises:
        ValueError: as for `solve_block`.
    """
    lib = require_library()
    (inputs, outputs), padding = weight.shape, -weight.shape[1] % LANES
    if padding:
        weight, scales, zeros = (pad(table, (0, padding)) for table in (weight, scales, zeros))
    weight, importance = weight.contiguous(), importance.contiguous()
    tables = (len(scales), outputs + padding)
    check_tensors((inputs, tables[1]), weight=weight)
    check_tensors((inputs,), importance=importance)
    check_tensors(tables, scales=scales, zeros=zeros)
    best = torch.empty(tables[1], dtype=torch.int32)
    lib.search(
        GridSearchStruct(weight.data_ptr(), importance.data_ptr(), scales.data_ptr(), zeros.data_ptr(), best.data_ptr(),
                         inputs, tables[1], tables[0], smallest, 2**bits - 1),
        torch.get_num_threads(), lib.number(isa))
    return best[:outputs]
