"""Matrix products on a CPU by the kernels in `native/`: any bits, groups, zeros and order of inputs, any M.

Activations are split per row and group into two parts of 8 bits (16 bits in all: "exact", an error of about 3e-5 of
the result's norm) or one ("fast", about 7e-3); codes are unpacked and multiplied as integers, whose sums are exact. So
row m of y depends, to the bit, on row m of x alone: not on M, threads or the instruction set (but "portable", which
rounds products before it adds them).
"""

from ctypes import addressof

import torch
from torch import Tensor

from .call_recorder import PRODUCT, empty_result, execute, reject_while_recording
from .cpu_layout import BLOCK, PADDED, CpuWeight
from .group_sort import RUN_LENGTHS
from .native_library import check_tensors, data_pointer, is_contiguous_float32, require_library
from .native_structs import CallStruct, WeightStruct


class CpuMatmul:
    """x (..., K) times a weight (K, N), plus bias (N,): (..., N) in x's dtype, through float32. Has no gradient.

    What is the same at every call is checked and put down once.

    Args:
        weight, bias: on the CPU; they are kept.
    Raises:
        ValueError: tensors that do not fit together; nothing was read.
    """

    def __init__(self, weight: CpuWeight, bias: Tensor | None = None) -> None:
        bias = None if bias is None else _plain(bias)
        _check(weight, bias)
        self.weight, self.bias = weight, bias  # the struct points into them
        self._inputs, self._outputs = weight.in_features, weight.out_features
        self._struct = WeightStruct(
            weight.codes.data_ptr(), weight.scales.data_ptr(), data_pointer(weight.zeros), data_pointer(weight.order),
            data_pointer(bias), weight.in_features, weight.out_features, weight.codes.shape[1], weight.run, weight.bits,
            weight.scales.dtype == torch.float16, weight.zero)
        self._address = addressof(self._struct)

    def __call__(self, x: Tensor, plus: Tensor | None = None, *, isa: str | None = None) -> Tensor:
        """The product with x, on the CPU.

        Args:
            plus: of the result's shape and dtype, to be added to it.
            isa: one of `library().usable`; left out, the fastest.
        Raises:
            ValueError: x has another width or is elsewhere, or `order` names inputs that the weight does not have;
                nothing was written.
        """
        rows = _plain(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
        if not rows.is_cpu or rows.shape[1] != self._inputs:
            raise ValueError(f"x of {rows.shape[1]} columns on {rows.device}, a weight of {self._inputs} inputs on the "
                             "CPU")
        y = empty_result(rows.shape[0], self._outputs)
        inside = plus is not None and is_contiguous_float32(plus) and plus.shape == y.shape
        execute(CallStruct(PRODUCT, self.weight.parts, self._address, rows.data_ptr(),
                           data_pointer(plus) if inside else None, y.data_ptr(), rows.shape[0], self._inputs),
                (self, rows, plus, y), isa=isa)
        if rows is not x or (plus is not None and not inside):
            reject_while_recording("a product with numbers that were converted")
        y = y if x.dtype is torch.float32 else y.to(x.dtype)
        y = y if x.dim() == 2 else y.view(*x.shape[:-1], self._outputs)
        return y if plus is None or inside else y.add_(plus)


def quant_matmul(x: Tensor, weight: CpuWeight, bias: Tensor | None = None, *, isa: str | None = None) -> Tensor:
    """`CpuMatmul` for one time."""
    return CpuMatmul(weight, bias)(x, isa=isa)


def read_memory(tensor: Tensor) -> int:
    """Read a contiguous tensor on the CPU with all threads and do nothing else: the sum of its words of 4 bytes.

    Behind the last whole 256 KiB nothing is read.
    """
    if not (tensor.is_cpu and tensor.is_contiguous()):
        raise ValueError("only a contiguous tensor on the CPU can be read")
    lib = require_library()
    return int(lib.read(tensor.data_ptr(), tensor.nbytes, torch.get_num_threads(), lib.number(None)))


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
    """`quant_matmul` as an operation that torch.compile can put into its graphs; costs some microseconds more."""
    w = weight
    result: Tensor = _op(x, w.codes, w.scales, w.zeros, w.order, bias, w.in_features, w.out_features, w.run, w.bits,
                         w.zero, w.parts)
    return result


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous float32. Even a conversion that does nothing takes 7 microseconds where a product has just been."""
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.to(torch.float32).contiguous()


def _check(weight: CpuWeight, bias: Tensor | None) -> None:
    """Everything that the library takes for granted, except the range of `order`, which it checks itself."""
    w = weight
    if w.run not in RUN_LENGTHS or w.bits not in (2, 4, 8) or w.parts not in (1, 2):
        raise ValueError(f"run {w.run}, bits {w.bits}, parts {w.parts}: not in {RUN_LENGTHS}, (2, 4, 8), (1, 2)")
    if w.in_features < 1 or w.out_features < 1:
        raise ValueError(f"a weight of {w.in_features} inputs, {w.out_features} outputs")
    blocks, groups = -(-w.out_features // PADDED) * PADDED // BLOCK, w.codes.shape[1] if w.codes.dim() == 4 else 0
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
        check_tensors((w.out_features,), bias=bias)
