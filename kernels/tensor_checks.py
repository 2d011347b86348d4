"""The check of a kernel's tensor arguments: shape, dtype, device and contiguity."""

import torch
from torch import Tensor

CPU = torch.device("cpu")


def check_tensors(shape: tuple[int | None, ...], *dtypes: torch.dtype, device: torch.device | None = CPU,
                  contiguous: bool = True, **tensors: Tensor) -> None:
    """Check that every tensor has a shape and one of some dtypes, and is contiguous and on a device.

    Args:
        shape: required sizes; None allows any size.
        dtypes: allowed dtypes; without one, all are allowed.
        device: required device; None allows any.
        contiguous: whether the tensors must be contiguous.
        tensors: the tensors by name.
    Raises:
        ValueError: the first tensor that differs; the message names it and what is required.
    """
    for name, tensor in tensors.items():
        fits = tensor.shape == shape or (tensor.dim() == len(shape) and all(
            required in (None, size) for required, size in zip(shape, tensor.shape, strict=True)))
        if (not fits or (dtypes and tensor.dtype not in dtypes) or (contiguous and not tensor.is_contiguous())
                or (device is not None and tensor.device != device)):
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{name} is {_described(tensor)}; required: ({sizes}), "
                             f"{' or '.join(map(str, dtypes)) or 'any dtype'}{', contiguous' if contiguous else ''}"
                             f"{'' if device is None else f', on {device}'}")


def is_contiguous_float32(tensor: Tensor) -> bool:
    """Whether the native kernels can read a tensor in place: contiguous float32 on the CPU, without a gradient."""
    return tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous() and not tensor.requires_grad


def _described(tensor: Tensor) -> str:
    return (f"{tuple(tensor.shape)}, {tensor.dtype}, {'' if tensor.is_contiguous() else 'not '}contiguous, "
            f"on {tensor.device}")
