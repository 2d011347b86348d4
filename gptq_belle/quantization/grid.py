"""The grid: scale and zero point of a group, and rounding to it.

Everything here is laid out inputs first: a group of g inputs and N outputs is (g, N), so that one input's weights are
contiguous, which is the order in which GPTQ visits them.
"""

import torch
from torch import Tensor

from gptq_belle.errors import InputError

SMALLEST_SCALE = 1e-7  # float16 still holds it (its smallest step is 6e-8); below, a group counts as all zero


def min_max_grid(weight: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    """The grid that spans a group's smallest and largest weight, zero always included (GPTQ's own choice).

    Args:
        weight: (g, N), the group's weights.
        bits: bits a code.
        sym: the same span on both sides of zero, and the zero point in the middle of the codes.
    Returns:
        scales (N,) in weight's dtype, rounded to what float16 holds; zeros (N,) in weight's dtype, whole numbers in
        0 .. 2**bits - 1.
    Raises:
        InputError: a scale is too large for float16.
    """
    low, high = weight.amin(0).clamp_(max=0), weight.amax(0).clamp_(min=0)
    levels = (1 << bits) - 1
    if sym:
        scales = _float16_exact(torch.maximum(-low, high) * 2 / levels)
        return scales, torch.full_like(scales, 1 << (bits - 1))
    scales = _float16_exact((high - low) / levels)
    return scales, (-low / scales).round_().clamp_(0, levels)


def to_codes(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The nearest codes, clamped to 0 .. 2**bits - 1, still in weight's dtype; all arguments broadcast."""
    return (weight / scales).round_().add_(zeros).clamp_(0, (1 << bits) - 1)


def check_storable(scales: Tensor) -> None:
    """Refuse scales that float16 does not hold, infinite ones included.

    Raises:
        InputError: one is too large.
    """
    if not torch.isfinite(scales.to(torch.float16)).all():
        raise InputError(f"a group's scale {float(scales.max()):.3g} is too large for float16",
                         "The weights of this layer are not those of a trained model; check the source.")


def _float16_exact(scales: Tensor) -> Tensor:
    """Round to float16 and back, so that codes are chosen for the scale that the file will hold."""
    check_storable(scales)
    rounded = scales.to(torch.float16).to(scales.dtype)
    return torch.where(rounded < SMALLEST_SCALE, 1.0, rounded)
