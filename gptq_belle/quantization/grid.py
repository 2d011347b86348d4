"""Quantization grids: the scale and zero point of each group, from the min-max range or by weighted search."""

from types import ModuleType

import torch
from torch import Tensor

from gptq_belle.errors import InputError
from gptq_belle.kernels import cpu_solver, triton_matmul

SMALLEST_SCALE = 1e-7  # float16 can represent it (its smallest step is 6e-8); groups below it count as all zero
SMALLEST_SEARCHED = 1e-5  # float16 has 7 bits of precision here; smaller scales are not searched or refitted
POINTS = 28  # candidate scales per sign
NARROWEST, WIDEST = 0.55, 1.1  # range of candidates, relative to the span that reaches the largest weight
VALUES_AT_A_TIME = 1 << 18  # weights searched at a time in torch, so that the working set stays in the cache


def fused_kernels(tensor: Tensor) -> ModuleType | None:
    """The module with `solve_block` and `descend` for this tensor, up to `BLOCK` inputs per call; None for torch."""
    if cpu_solver.is_supported(tensor):
        return cpu_solver
    if not tensor.is_cuda or tensor.dtype != torch.float32 or triton_matmul.unavailable_reason(tensor.device):
        return None
    from gptq_belle.kernels import triton_gptq

    return triton_gptq


def min_max_grid(weight: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    """The grid from a group's smallest to its largest weight, zero included, as in the original GPTQ.

    Args:
        weight: (g, N), the group's weights.
        bits: bits per code.
        sym: use the same range on both sides of zero, with the zero point in the middle of the codes.
    Returns:
        scales (N,) in weight's dtype, rounded to float16; zeros (N,) in weight's dtype, integers in 0 .. 2**bits - 1.
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


def searched_grid(weight: Tensor, importance: Tensor, bits: int, sym: bool, *,
                  positive: bool = False) -> tuple[Tensor, Tensor]:
    """The grid with the smallest weighted rounding error, sum over k of importance_k (w_k - q_k)^2.

    Candidates are narrower and slightly wider spans than min-max; where symmetric, with both signs of the scale too,
    because there is one more code below zero than above (weighted clipping search as in AWQ, arXiv 2306.00978, section
    3.2; signed scales as in llama.cpp's Q4_0). Of equally good candidates the first one is chosen.

    Args:
        weight: (g, N), the group's weights.
        importance: (g,), positive, such as `hessian.remaining_error`.
        bits, sym: as for `min_max_grid`.
        positive: exclude negative scales.
    Returns:
        scales (N,) and zeros (N,) as `min_max_grid`; scales may be negative.
    Raises:
        InputError: a scale is too large for float16.
    """
    low, high = weight.amin(0).clamp_(max=0), weight.amax(0).clamp_(min=0)
    check_storable(torch.maximum(-low, high) / (1 << (bits - 1)))
    scales, zeros = _candidate_grids(low, high, bits, sym, positive)
    if cpu_solver.is_supported(weight):
        best = cpu_solver.search_grid(weight, importance.float(), scales, zeros, bits, SMALLEST_SEARCHED).long()
    else:
        step = max(1, VALUES_AT_A_TIME // len(weight))
        parts = zip(*(table.split(step, dim=-1) for table in (weight, scales, zeros)), strict=True)
        best = torch.cat([_search(part, scale, zero, importance, bits) for part, scale, zero in parts])
    found = best.clamp(min=0)[None]
    scales, zeros = (table.gather(0, found)[0] for table in (scales, zeros))
    return torch.where(best < 0, 1.0, scales), torch.where(best < 0, float(1 << (bits - 1)), zeros)


def _search(weight: Tensor, scales: Tensor, zeros: Tensor, importance: Tensor, bits: int) -> Tensor:
    """Index of the best candidate for each output (N,) int64, -1 where none is valid; as `cpu_solver.search_grid`."""
    least = torch.full_like(scales[0], torch.inf)
    best = torch.full(least.shape, -1, device=least.device)
    for index, (scale, zero) in enumerate(zip(scales, zeros, strict=True)):
        decoded = to_codes(weight, scale, zero, bits).sub_(zero).mul_(scale)
        loss = importance @ decoded.sub_(weight).square_()
        better = (loss < least) & (scale.abs() >= SMALLEST_SEARCHED)
        least = torch.where(better, loss, least)
        best = torch.where(better, index, best)
    return best


def _candidate_grids(low: Tensor, high: Tensor, bits: int, sym: bool, positive: bool) -> tuple[Tensor, Tensor]:
    """Candidate scales, rounded to float16, and zeros for groups that range from low <= 0 to high >= 0, each (N,).

    Symmetric: +-(absmax / (2**(b-1) - 0.5)) times `NARROWEST` .. `WIDEST`, and absmax / 2**(b-1), which with the right
    sign reaches the largest weight exactly. Asymmetric: the min-max span times the same factors.

    Returns:
        Scales and zeros, each (candidates, N).
    """
    half, levels = 1 << (bits - 1), (1 << bits) - 1
    last = (half - 0.5) / half if sym else 1.0
    shares = torch.cat([torch.linspace(NARROWEST, WIDEST, POINTS - 1, dtype=torch.float64), torch.tensor([last])])
    shares = shares.to(low)[:, None]
    if not sym:
        scales = _rounded_to_float16((high - low) * shares / levels)
        return scales, (-low * shares / scales).round_().nan_to_num_(0).clamp_(0, levels)
    scales = _rounded_to_float16(torch.maximum(-low, high) * shares / (half - 0.5))
    if not positive:
        scales = torch.stack([scales, -scales], 1).flatten(0, 1)
    return scales, torch.full_like(scales, half)


def to_codes(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The nearest codes, clamped to 0 .. 2**bits - 1, in weight's dtype; all arguments broadcast."""
    return (weight / scales).round_().add_(zeros).clamp_(0, (1 << bits) - 1)


def check_storable(scales: Tensor) -> None:
    """Raise InputError where a scale is too large for float16 or infinite."""
    if not torch.isfinite(scales.to(torch.float16)).all():
        raise InputError(f"a group's scale {float(scales.max()):.3g} is too large for float16",
                         "This layer's weights are not those of a trained model; check the source.")


def _float16_exact(scales: Tensor) -> Tensor:
    """Round to float16 and back, so that codes are chosen for the scale that is stored; 1 for groups of zeros."""
    check_storable(scales)
    rounded = _rounded_to_float16(scales)
    return torch.where(rounded < SMALLEST_SCALE, 1.0, rounded)


def _rounded_to_float16(scales: Tensor) -> Tensor:
    return scales.to(torch.float16).to(scales.dtype)
