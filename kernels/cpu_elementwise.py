"""Norms and the activation functions of feed-forward layers on a CPU, in one native call each.

After a product has read megabytes, the data of every torch operation comes from memory again, which takes 10 to 50
microseconds. The native kernels take contiguous float32 tensors on the CPU; torch computes everything else. Every row
is, to the bit, the same as if it were computed alone.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .call_recorder import GELU, LAYER_NORM, RMS_NORM, SILU_AND_MUL, empty_result, execute, reject_while_recording
from .native_library import NativeLibrary, data_pointer, load_library
from .native_structs import CallStruct
from .tensor_checks import is_contiguous_float32


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467, equation 4).

    Args:
        weight: (H,) of any floating dtype; the object keeps a reference.
        eps: added to the mean of squares.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight.contiguous(), eps
        self._native = _is_native(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize x (..., H) of any floating dtype; raises ValueError for another width."""
        _check_width(x, self.weight)
        if self._native and is_contiguous_float32(x):
            return _native_norm(RMS_NORM, x, self.weight, None, self.eps)
        reject_while_recording("an RMS norm by torch")
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm:
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last dimension (arXiv 1607.06450, equation 4).

    Args:
        weight, bias: (H,) of any floating dtype; the object keeps references.
        eps: added to the variance.
    """

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.weight, self.bias, self.eps = weight.contiguous(), bias.contiguous(), eps
        self._native = _is_native(self.weight) and _is_native(self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize x (..., H) of any floating dtype; raises ValueError for another width."""
        _check_width(x, self.weight)
        if self._native and is_contiguous_float32(x):
            return _native_norm(LAYER_NORM, x, self.weight, self.bias, self.eps)
        reject_while_recording("a layer norm by torch")
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(g) * u of the two halves g and u of x (..., 2 I): (..., I) (SwiGLU; arXiv 2002.05202, section 2).

    Raises:
        ValueError: a width that is not even.
    """
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"x of {tuple(x.shape)} does not hold two numbers for each result")
    if not _is_native(x) or not x.numel():
        reject_while_recording("SiLU-and-multiply by torch")
        return F.silu(x[..., : width // 2]).mul_(x[..., width // 2 :])
    out = empty_result(*x.shape[:-1], width // 2)
    execute(CallStruct(SILU_AND_MUL, 0, None, x.data_ptr(), None, out.data_ptr(), x.numel() // width, width), (x, out))
    return out


def gelu_(x: Tensor) -> Tensor:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) in place (arXiv 1606.08415, section 2); returns x."""
    if not _is_native(x) or not x.numel():
        reject_while_recording("a GELU by torch")
        return torch.ops.aten.gelu_(x, approximate="tanh")
    execute(CallStruct(GELU, 0, None, x.data_ptr(), None, x.data_ptr(), x.numel() // x.shape[-1], x.shape[-1]), x)
    return x


def _is_native(tensor: Tensor) -> bool:
    return is_contiguous_float32(tensor) and isinstance(load_library(), NativeLibrary)


def _check_width(x: Tensor, weight: Tensor) -> None:
    if x.shape[-1] != len(weight):
        raise ValueError(f"a weight of {len(weight)} numbers does not fit x of {tuple(x.shape)}")


def _native_norm(kind: int, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    out, width = empty_result(*x.shape), len(weight)
    execute(CallStruct(kind, 0, weight.data_ptr(), x.data_ptr(), data_pointer(bias), out.data_ptr(),
                       x.numel() // width, width, eps), (x, weight, bias, out))
    return out
