"""Matrix products on a CPU by the kernels in `native/`: any bits, groups, zero points and order of inputs, any M.

Activations are split per row and group into two parts of 8 bits (16 bits in all: "exact", an error of about 3e-5 of
the result's norm) or one ("fast", about 7e-3). Codes are unpacked and multiplied as integers, whose sums are exact. So
row m of y depends, to the bit, on row m of x alone: not on M, threads or the instruction set (except "portable", which
rounds products before it adds them).
"""

from ctypes import addressof

import torch
from torch import Tensor

from .call_recorder import PRODUCT, empty_result, execute, reject_while_recording
from .cpu_layout import BLOCK, OUTPUT_MULTIPLE, CpuWeight
from .layout import RUN_LENGTHS, is_mostly_padding
from .native_library import data_pointer, load_library, require_library
from .native_structs import CallStruct, WeightStruct
from .tensor_checks import check_tensors, is_contiguous_float32


def unsupported_reason(g_idx: Tensor, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels do not support a layer, or None if they do; arguments as for `dispatch.choose_kernel`."""
    if device.type != "cpu":
        return f"the native kernels here are for CPUs, not {device.type}"
    if dtype == torch.float64:
        return "the native kernels keep 16 bits of an activation: too few for torch.float64"
    if isinstance(library := load_library(), str):
        return library
    if is_mostly_padding(g_idx):
        return f"the native kernels take groups that fill runs of {RUN_LENGTHS[-1]} inputs"
    return None


class CpuMatmul:
    """x (..., K) times a weight (K, N), plus bias (N,): (..., N) in x's dtype, computed in float32. Has no gradient.

    What is the same for every call is checked and stored once.

    Args:
        weight, bias: on the CPU; the object keeps references to them.
    Raises:
        ValueError: tensors that do not fit together; nothing was read.
    """

    def __init__(self, weight: CpuWeight, bias: Tensor | None = None) -> None:
        bias = None if bias is None else _to_contiguous_float32(bias)
        _check(weight, bias)
        self.weight, self.bias = weight, bias  # the struct points into them
        self._inputs, self._outputs = weight.in_features, weight.out_features
        self._struct = WeightStruct(
            weight.codes.data_ptr(), weight.scales.data_ptr(), data_pointer(weight.zeros), data_pointer(weight.order),
            data_pointer(bias), weight.in_features, weight.out_features, weight.codes.shape[1], weight.run, weight.bits,
            weight.scales.dtype == torch.float16, weight.zero)
        self._address = addressof(self._struct)

    def __call__(self, x: Tensor, addend: Tensor | None = None, *, isa: str | None = None) -> Tensor:
        """The product with x (..., K) on the CPU.

        Args:
            addend: added to the product; of its shape and dtype.
            isa: one of `load_library().usable_isas`; by default the fastest.
        Raises:
            ValueError: x has another width or device, or `order` names inputs that the weight does not have; nothing
                was written.
        """
        rows = _to_contiguous_float32(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
        check_tensors((rows.shape[0], self._inputs), x=rows)
        y = empty_result(rows.shape[0], self._outputs)
        inside = addend is not None and is_contiguous_float32(addend) and addend.shape == y.shape
        execute(CallStruct(PRODUCT, self.weight.parts, self._address, rows.data_ptr(),
                           data_pointer(addend) if inside else None, y.data_ptr(), rows.shape[0], self._inputs),
                (self, rows, addend, y), isa=isa)
        if rows is not x or (addend is not None and not inside):
            reject_while_recording("a product with converted tensors")
        y = y if x.dtype is torch.float32 else y.to(x.dtype)
        y = y if x.dim() == 2 else y.view(*x.shape[:-1], self._outputs)
        return y if addend is None or inside else y.add_(addend)


def quant_matmul(x: Tensor, weight: CpuWeight, bias: Tensor | None = None, *, isa: str | None = None) -> Tensor:
    """One call of `CpuMatmul`."""
    return CpuMatmul(weight, bias)(x, isa=isa)


def read_memory(tensor: Tensor) -> int:
    """Read a contiguous tensor on the CPU with all threads and return the sum of its 4-byte words.

    Only whole pieces of 256 KiB are read.
    """
    check_tensors(tuple(tensor.shape), tensor=tensor)
    lib = require_library()
    return int(lib.read(tensor.data_ptr(), tensor.nbytes, torch.get_num_threads(), lib.isa_index(None)))


@torch.library.custom_op("gptq_belle::cpu_matmul", mutates_args=())
def _op(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, order: Tensor | None, bias: Tensor | None,
        in_features: int, out_features: int, run: int, bits: int, zero: int, parts: int) -> Tensor:
    unread = torch.empty(0, dtype=torch.int32)
    return quant_matmul(x, CpuWeight(codes, scales, zeros, order, unread, in_features, out_features, run, bits, zero,
                                     parts, bits, 0, 0), bias)


@_op.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, order: Tensor | None, bias: Tensor | None,
      in_features: int, out_features: int, run: int, bits: int, zero: int, parts: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def op(x: Tensor, weight: CpuWeight, bias: Tensor | None = None) -> Tensor:
    """`quant_matmul` as an operation that torch.compile can include in its graphs; some microseconds slower."""
    w = weight
    result: Tensor = _op(x, w.codes, w.scales, w.zeros, w.order, bias, w.in_features, w.out_features, w.run, w.bits,
                         w.zero, w.parts)
    return result


def _to_contiguous_float32(tensor: Tensor) -> Tensor:
    # Right after a product, even a conversion that does nothing takes 7 microseconds.
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.to(torch.float32).contiguous()


def _check(weight: CpuWeight, bias: Tensor | None) -> None:
    """Check everything that the library relies on, except the values of `order`, which it checks itself."""
    w = weight
    if w.run not in RUN_LENGTHS or w.bits not in (2, 4, 8) or w.parts not in (1, 2):
        raise ValueError(f"run {w.run}, bits {w.bits}, parts {w.parts}: not in {RUN_LENGTHS}, (2, 4, 8), (1, 2)")
    if w.in_features < 1 or w.out_features < 1:
        raise ValueError(f"a weight of {w.in_features} inputs, {w.out_features} outputs")
    blocks = -(-w.out_features // OUTPUT_MULTIPLE) * OUTPUT_MULTIPLE // BLOCK
    groups = w.codes.shape[1] if w.codes.dim() == 4 else 0
    grid = (blocks, groups, BLOCK)
    check_tensors((blocks, groups, w.run * w.bits // 32, 64), torch.uint8, codes=w.codes)
    check_tensors(grid, torch.float16, torch.float32, scales=w.scales)
    if w.zeros is not None:
        check_tensors(grid, torch.int16, zeros=w.zeros)
    if w.order is not None:
        check_tensors((groups * w.run,), torch.int32, order=w.order)
    elif not (groups - 1) * w.run < w.in_features <= groups * w.run:
        raise ValueError(f"{groups} runs of {w.run} do not hold {w.in_features} inputs")
    if bias is not None:
        check_tensors((w.out_features,), torch.float32, bias=bias)
