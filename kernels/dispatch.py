"""How a kernel is chosen (`choose_kernel`), once when a weight is loaded, and the one function that calls it.

The kernels are in `cpu_matmul.py`, `triton_matmul.py`, `dequantize_matmul.py` and `reference.py`.
"""

from collections.abc import Callable, Iterable
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
    reference,
    triton_layout,
    triton_matmul,
    triton_warm_up,
)
from .cpu_layout import CpuWeight
from .layout import CanonicalWeight, checked_weight, longest_run
from .triton_launch import Launch
from .triton_layout import SlicedWeight
from .triton_warm_up import Progress

PreparedWeight = CanonicalWeight | CpuWeight | SlicedWeight


class KernelChoice(NamedTuple):
    """The kernel for a layer, and why no faster one is used (empty for the fastest)."""

    kernel: str  # "native", "groupwise", "triton", "dequantize+matmul" or "reference"
    reason: str


def choose_kernel(g_idx: Tensor, *, device: torch.device, dtype: torch.dtype) -> KernelChoice:
    """Choose the kernel for one linear layer. The choice does not depend on bits or the number of outputs.

    Args:
        g_idx: (K,) integers, the group of each input.
        device: device of the weight.
        dtype: dtype of the activations.
    """
    if device.type == "cuda":
        reason = triton_matmul.unsupported_reason(g_idx, device, dtype)
        return KernelChoice("triton", "") if reason is None else KernelChoice("dequantize+matmul", reason)
    reason = cpu_matmul.unsupported_reason(g_idx, device, dtype)
    if reason is None:
        return KernelChoice("native", "")
    if longest_run(g_idx):
        return KernelChoice("groupwise", reason)
    return KernelChoice("reference", f"{reason}; groupwise takes groups of neighbouring inputs, not act-order")


def prepare_tensors(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zero_offset: int,
                    *, device: torch.device, dtype: torch.dtype, precision: str = "exact") -> PreparedWeight:
    """Check the tensors of a file and lay them out for their kernel.

    Args:
        qweight, qzeros, scales, g_idx, bits, zero_offset: see `layout.checked_weight`.
        device, dtype, precision: see `prepare_weight`.
    Raises:
        ValueError: tensors that do not fit together; the message states what is allowed.
    """
    return prepare_weight(checked_weight(qweight, qzeros, scales, g_idx, bits, zero_offset), device=device,
                          dtype=dtype, precision=precision)


def prepare_weight(weight: CanonicalWeight, *, device: torch.device, dtype: torch.dtype,
                   precision: str = "exact") -> PreparedWeight:
    """Lay out one packed weight for its kernel, in new memory.

    Args:
        weight: with the words of the file.
        device: device on which the weight will be used.
        dtype: expected dtype of the activations. Others work too, but slower or less exactly.
        precision: on a CPU, "exact" (16 bits of each activation) or "fast" (8 bits). CUDA has one precision per dtype.
    Returns:
        the words copied to `device`, or another layout that replaces them.
    """
    choice = choose_kernel(weight.g_idx, device=device, dtype=dtype)
    if choice.kernel == "native":
        return cpu_layout.prepare(weight, precision)
    moved = weight._replace(
        qweight=weight.qweight.to(device, copy=True), qzeros=weight.qzeros.to(device, copy=True),
        scales=weight.scales.to(device, copy=True), g_idx=weight.g_idx.to(device, copy=True),
    )
    return triton_layout.prepare(moved) if choice.kernel == "triton" else moved


def lookup_rows(weight: PreparedWeight, ids: Tensor) -> Tensor:
    """Rows ids (n,) of the matrix (N, K) of a product, as an embedding needs them: (n, K) float32."""
    if isinstance(weight, CpuWeight):
        return cpu_packed_rows.lookup_rows(weight, ids)
    if isinstance(weight, SlicedWeight):
        return triton_layout.lookup_rows(weight, ids)
    return reference.lookup_rows(weight, ids)


def quant_matmul(x: Tensor, weight: PreparedWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times the weight (K, N), plus bias (N,): (..., N) in x's dtype, with the kernel of the layout.

    If x requires a gradient, the result has one, to x only.
    """
    if x.requires_grad and torch.is_grad_enabled():
        y: Tensor = _Differentiable.apply(x, weight, bias)
        return y
    return _call_kernel(x, weight, bias)


def bind_weight(weight: PreparedWeight, bias: Tensor | None = None) -> Callable[..., Tensor]:
    """Bind `quant_matmul` to one weight, without gradients. What is the same for every call is computed once.

    Returns:
        a function of x (..., K) and, optionally, of a tensor (..., N) to add to the product.
    """
    if isinstance(weight, CpuWeight):
        return cpu_matmul.CpuMatmul(weight, bias)

    def product(x: Tensor, addend: Tensor | None = None) -> Tensor:
        y = _call_kernel(x, weight, bias)
        return y if addend is None else y.add_(addend)

    return product


def warm_up(products: Iterable[tuple[PreparedWeight, Tensor | None, int]], dtype: torch.dtype,
            progress: Progress | None = None, others: Iterable[Launch] = ()) -> None:
    """Compile the kernels of products (weight, bias, most rows) that are compiled at run time, and those of other
    launches; see `triton_warm_up`."""
    found = (triton_warm_up.Product(weight, bias, rows) for weight, bias, rows in products
             if isinstance(weight, SlicedWeight))
    triton_warm_up.warm_up(found, dtype, progress, others)


class _Differentiable(torch.autograd.Function):
    """The product with a gradient to x. Torch's own would keep the expanded weight until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PreparedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return _call_kernel(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return gradient.input_gradient(grads[0], ctx.weight), None, None


def _call_kernel(x: Tensor, weight: PreparedWeight, bias: Tensor | None) -> Tensor:
    if isinstance(weight, CpuWeight):
        # A torch operation only in a compiled graph: calling one from Python takes 20 microseconds longer.
        return (cpu_matmul.op if torch.compiler.is_compiling() else cpu_matmul.quant_matmul)(x, weight, bias)
    if isinstance(weight, SlicedWeight):
        return (triton_matmul.op if torch.compiler.is_compiling() else triton_matmul.quant_matmul)(x, weight, bias)
    if x.is_cuda:
        return dequantize_matmul.quant_matmul(x, weight, bias)
    if weight.run and x.numel() <= reference.MAX_GROUPWISE_ROWS * weight.in_features:
        return reference.groupwise_matmul(x, weight, bias)
    return reference.quant_matmul(x, weight, bias)
