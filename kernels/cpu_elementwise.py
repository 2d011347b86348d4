"""What stands between two products, in one call each on a CPU: norms, and the activations of feed-forward layers.

After a product has read megabytes, every operation of torch comes from memory anew and takes 10 to 50 microseconds.
All is native where tensors are contiguous, float32 and on the CPU, else torch's. Every row is, to the bit, what it is
alone.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .call_recorder import GELU, LAYER_NORM, RMS_NORM, SILU_AND_MUL, empty_result, execute, reject_while_recording
from .native_library import NativeLibrary, data_pointer, is_contiguous_float32, load_library
from .native_structs import CallStruct


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (1910.07467, equation 4).

    Args:
        weight: (H,) of any floating dtype; it is kept.
        eps: added to the mean of squares.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight.contiguous(), eps
        self._native = _native(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., H), of any floating dtype; raises ValueError where H is another."""
        _check_width(x, self.weight)
        if self._native and is_contiguous_float32(x):
            return _normed(RMS_NORM, x, self.weight, None, self.eps)
        reject_while_recording("an RMS norm by torch")
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm:
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last dimension (1607.06450, equation 4).

    Args:
        weight, bias: (H,) of any floating dtype; they are kept.
        eps: added to the variance.
    """

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.weight, self.bias, self.eps = weight.contiguous(), bias.contiguous(), eps
        self._native = _native(self.weight) and _native(self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., H), of any floating dtype; raises ValueError where H is another."""
        _check_width(x, self.weight)
        if self._native and is_contiguous_float32(x):
            return _normed(LAYER_NORM, x, self.weight, self.bias, self.eps)
        reject_while_recording("a layer norm by torch")
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(g) * u of x (..., 2 I), which holds g and u side by side: (..., I) (2002.05202, SwiGLU in section 2).

    Raises:
        ValueError: a width that is not even.
    """
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"x of {tuple(x.shape)} does not hold two numbers for each result")
    if not _served(x):
        reject_while_recording("a gate by torch")
        return F.silu(x[..., : width // 2]).mul_(x[..., width // 2 :])
    out = empty_result(*x.shape[:-1], width // 2)
    execute(CallStruct(SILU_AND_MUL, 0, None, x.data_ptr(), None, out.data_ptr(), x.numel() // width, width), (x, out))
    return out


def gelu_(x: Tensor) -> Tensor:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) in place (1606.08415, section 2); returns x."""
    if not _served(x):
        reject_while_recording("a GELU by torch")
        return torch.ops.aten.gelu_(x, approximate="tanh")
    execute(CallStruct(GELU, 0, None, x.data_ptr(), None, x.data_ptr(), x.numel() // x.shape[-1], x.shape[-1]), x)
    return x


def _native(tensor: Tensor) -> bool:
    return isinstance(load_library(), NativeLibrary) and is_contiguous_float32(tensor)


def _served(x: Tensor) -> bool:
    return is_contiguous_float32(x) and x.numel() > 0 and isinstance(load_library(), NativeLibrary)


def _check_width(x: Tensor, weight: Tensor) -> None:
    if x.shape[-1] != len(weight):
        raise ValueError(f"a weight of {len(weight)} numbers does not fit x of {tuple(x.shape)}")


def _normed(kind: int, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    out, width = empty_result(*x.shape), len(weight)
    execute(CallStruct(kind, 0, weight.data_ptr(), x.data_ptr(), data_pointer(bias), out.data_ptr(),
                       x.numel() // width, width, eps), (x, weight, bias, out))
    return out
