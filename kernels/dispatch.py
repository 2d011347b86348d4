"""Which kernel runs: chosen once when a weight is prepared, called through one function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import (
    cpu_layout,
    cpu_matmul,
    cpu_packed_rows,
    dequantize_matmul,
    gradient,
    groupwise,
    reference,
    triton_layout,
    triton_matmul,
)
from .cpu_layout import CpuWeight
from .layout import CanonicalWeight, canonical, longest_run
from .triton_layout import SlicedWeight

PreparedWeight = CanonicalWeight | CpuWeight | SlicedWeight


class KernelChoice(NamedTuple):
    """The kernel that a case takes, and why it is not a faster one (empty where there is none)."""

    kernel: str  # "native", "groupwise", "triton", "dequantize+matmul" or "reference"
    reason: str


def choose_kernel(g_idx: Tensor, *, device: torch.device, dtype: torch.dtype) -> KernelChoice:
    """Choose the kernel for one linear layer. Neither bits nor the number of outputs matter.

    Args:
        g_idx: (K,) integers, the group of each input.
        device: device of the weight.
        dtype: dtype of the activations.
    """
    if device.type == "cuda":
        reason = triton_matmul.unsupported_reason(g_idx, device, dtype)
        return KernelChoice("triton", "") if reason is None else KernelChoice("dequantize+matmul", reason)
    reason = cpu_layout.unsupported_reason(g_idx, device, dtype)
    if reason is None:
        return KernelChoice("native", "")
    if longest_run(g_idx):
        return KernelChoice("groupwise", reason)
    return KernelChoice("reference", f"{reason}; groupwise takes groups of neighbouring inputs, not act-order")


def prepare(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zero_offset: int, *,
            device: torch.device, dtype: torch.dtype, precision: str = "exact") -> PreparedWeight:
    """`prepare_weight` for the tensors of a file, which are checked.

    Args:
        qweight, qzeros, scales, g_idx, bits, zero_offset: see `layout.canonical`.
        device, dtype, precision: see `prepare_weight`.
    Raises:
        ValueError: tensors that do not fit together; the message says what is allowed.
    """
    return prepare_weight(canonical(qweight, qzeros, scales, g_idx, bits, zero_offset), device=device, dtype=dtype,
                          precision=precision)


def prepare_weight(weight: CanonicalWeight, *, device: torch.device, dtype: torch.dtype,
                   precision: str = "exact") -> PreparedWeight:
    """Lay out one packed weight for its kernel; it is left as it is.

    Args:
        weight: as it stands in files.
        device: where the weight will live.
        dtype: of the activations that it will meet. Others work too, only slower or less exactly.
        precision: on a CPU, "exact" (16 bits of each activation) or "fast" (8 bits). CUDA has one precision a dtype.
    Returns:
        the words copied to `device`, or another layout that replaces them.
    """
    choice = choose_kernel(weight.g_idx, device=device, dtype=dtype)
    if choice.kernel == "native":
        return cpu_layout.prepare(weight, precision)
    there = weight._replace(
        qweight=weight.qweight.to(device, copy=True), qzeros=weight.qzeros.to(device, copy=True),
        scales=weight.scales.to(device, copy=True), g_idx=weight.g_idx.to(device, copy=True),
    )
    return triton_layout.prepare(there) if choice.kernel == "triton" else there


def lookup_rows(weight: PreparedWeight, ids: Tensor) -> Tensor:
    """Rows ids (n,) of the matrix (N, K) whose product a weight is: (n, K) float32. An embedding is looked up so.
    """
    if isinstance(weight, CpuWeight):
        return cpu_packed_rows.lookup_rows(weight, ids)
    if isinstance(weight, SlicedWeight):
        return triton_layout.lookup_rows(weight, ids)
    return reference.lookup_rows(weight, ids)


def quant_matmul(x: Tensor, weight: PreparedWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times the weight (K, N), plus bias (N,): (..., N) in x's dtype, whichever kernel runs.

    Where x asks for its gradient, the result has one, to x alone.
    """
    if x.requires_grad and torch.is_grad_enabled():
        y: Tensor = _Differentiable.apply(x, weight, bias)
        return y
    return _product(x, weight, bias)


def bind(weight: PreparedWeight, bias: Tensor | None = None) -> Callable[..., Tensor]:
    """`quant_matmul` with one weight, without gradients: what is the same at every call is done once.

    Returns:
        a function of x, and of what is to be added to the product, if anything.
    """
    if isinstance(weight, CpuWeight):
        return cpu_matmul.CpuMatmul(weight, bias)

    def product(x: Tensor, plus: Tensor | None = None) -> Tensor:
        y = _product(x, weight, bias)
        return y if plus is None else y.add_(plus)

    return product


class _Differentiable(torch.autograd.Function):
    """The product with a gradient to x. Torch's own would keep the expanded weight until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PreparedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return gradient.input_gradient(grads[0], ctx.weight), None, None


def _product(x: Tensor, weight: PreparedWeight, bias: Tensor | None) -> Tensor:
    if isinstance(weight, CpuWeight):
        # As an operation of torch only where a graph is made: calling one from Python takes 20 microseconds more.
        return (cpu_matmul.op if torch.compiler.is_compiling() else cpu_matmul.quant_matmul)(x, weight, bias)
    if isinstance(weight, SlicedWeight):
        return (triton_matmul.op if torch.compiler.is_compiling() else triton_matmul.quant_matmul)(x, weight, bias)
    if x.is_cuda:
        return dequantize_matmul.quant_matmul(x, weight, bias)
    if weight.run and x.numel() <= groupwise.MOST_ROWS * weight.in_features:
        return groupwise.quant_matmul(x, weight, bias)
    return reference.quant_matmul(x, weight, bias)  # with many rows, expanding the weight is worth it
