"""Refine a GPTQ solution: refit scales and descend over codes, one group of inputs after another.

Tensors are (K, N) as in the solver. With D = Q - W the error is tr(D^T H D), and R = H D is half its gradient.
"""

import torch
from torch import Tensor

from gptq_belle.common.devices import threads
from gptq_belle.quantization import grid
from gptq_belle.quantization.hessian import nonzero_diagonal

INNER = 32  # inputs per step in torch; their changes are then applied to the group's other rows of R in one product


def refine(codes: Tensor, scales: Tensor, zeros: Tensor, W: Tensor, H: Tensor, *, bits: int, sweeps: int,
           ridge: float = 0.0, positive: bool = False) -> None:
    """Refit scales and descend over codes in all groups, several times; no step increases the error.

    A group's rows of R are computed when the sweep reaches it, so a sweep costs one product of H and D.

    Args:
        codes: (K, N) uint8; changed in place.
        scales: (G, N) in W's dtype; changed in place. Each group has K / G consecutive inputs.
        zeros: (G, N) in W's dtype.
        W: (K, N), the weight; overwritten.
        H: (K, K) in W's dtype, undamped.
        bits: bits per code.
        sweeps: number of passes over all groups.
        ridge: added to H's diagonal, as GPTQ's damping is. Without it, weights drift along directions in which the
            calibration rows have hardly any inputs.
        positive: keep every scale positive.
    """
    D, group = W, len(codes) // len(scales)
    for g, start in enumerate(range(0, len(codes), group)):
        part = slice(start, start + group)
        torch.sub((codes[part] - zeros[g]).mul_(scales[g]), W[part], out=D[part])
    sweep_groups(codes, scales, zeros, D, H, bits=bits, sweeps=sweeps, ridge=ridge, positive=positive)


def sweep_groups(codes: Tensor, scales: Tensor, zeros: Tensor, D: Tensor, H: Tensor, gradient: Tensor | None = None, *,
                 bits: int, sweeps: int, ridge: float = 0.0, positive: bool = False) -> None:
    """Lower tr(D^T (H + ridge I) D) + 2 tr(gradient^T D) by sweeps over all groups.

    Args:
        codes, scales, zeros, H, bits, sweeps, ridge, positive: as for `refine`.
        D: (K, N), a difference that every change of the weight is added to; changed in place.
        gradient: (K, N), or None for 0.
    """
    group = len(codes) // len(scales)
    parts = [slice(start, start + group) for start in range(0, len(codes), group)]
    diagonal = nonzero_diagonal(H) + ridge
    for _ in range(sweeps):
        for g, part in enumerate(parts):
            code, residual, block = codes[part] - zeros[g], (H[part] @ D).add_(D[part], alpha=ridge), H[part, part]
            if gradient is not None:
                residual += gradient[part]
            before = code * scales[g]
            scales[g] = refit_scales(code, scales[g], residual, block, ridge=ridge, positive=positive)
            descend(code, scales[g], zeros[g], residual, block, diagonal[part], bits)
            codes[part] = code + zeros[g]
            D[part] += code.mul_(scales[g]).sub_(before)


def refit_scales(code: Tensor, scale: Tensor, residual: Tensor, block: Tensor, *, ridge: float = 0.0,
                 positive: bool = False) -> Tensor:
    """Refit the scales of one group: for each output the scale that minimizes the error with fixed codes.

    ds = -(c . R_g) / (c^T H_gg c), the root of the derivative of tr(D^T H D) along c; rounded to float16, and rejected
    where the error would not decrease or the scale would be too small.

    Args:
        code: (g, N), codes minus their zero points.
        scale: (N,), the current scales.
        residual: (g, N), the group's rows of R = H D; updated in place.
        block: (g, g), the group's diagonal block of H.
        ridge: as for `refine`.
        positive: reject negative scales.
    Returns:
        The new scales (N,).
    """
    image = (block @ code).add_(code, alpha=ridge)
    curvature = (code * image).sum(0)
    slope = (code * residual).sum(0)
    refitted = (scale - slope / curvature).to(torch.float16).to(scale.dtype)
    change = refitted - scale
    gain = change * (2 * slope + change * curvature)  # change of the error; NaN where all codes are 0
    better = (gain < 0) & (refitted.abs() >= grid.SMALLEST_SEARCHED) & ((refitted > 0) | (not positive))
    change = torch.where(better, change, 0.0)
    residual.addcmul_(image, change)
    return torch.where(better, refitted, scale)


def descend(code: Tensor, scale: Tensor, zero: Tensor, residual: Tensor, block: Tensor, diagonal: Tensor,
            bits: int) -> None:
    """One sweep of coordinate descent over the codes of one group, with fixed scales.

    c_j = clamp(round((q_j - R_j / H_jj) / s)), the best code of input j with all others fixed; R is updated by a
    rank-one product (as in QuantEase, arXiv 2309.01885, section 3).

    Args:
        code: (g, N), codes minus their zero points; changed in place.
        scale, zero: (N,).
        residual: as for `refit_scales`; overwritten.
        block: as for `refit_scales`.
        diagonal: (g,), of H, without zeros, plus the ridge.
        bits: bits per code.
    """
    fused = grid.fused_kernels(code)
    step, sweep = (fused.BLOCK, fused.descend) if fused else (INNER, _descend)
    for j1 in range(0, len(code), step):
        part, rest = slice(j1, j1 + step), slice(j1 + step, None)
        before = code[part].clone() if j1 + step < len(code) else None
        sweep(code[part], scale, zero, residual[part], block[part, part], diagonal[part], bits)
        if before is not None:
            residual[rest].addmm_(block[rest, part], (code[part] - before).mul_(scale))


def _descend(code: Tensor, scale: Tensor, zero: Tensor, residual: Tensor, block: Tensor, diagonal: Tensor,
             bits: int) -> None:
    """`descend` for up to `INNER` inputs, in torch operations."""
    low, high = -zero, ((1 << bits) - 1) - zero
    with threads(1):  # as in the solver: each operation takes microseconds
        for j in range(len(code)):
            best = torch.addcdiv(code[j], residual[j], scale * diagonal[j], value=-1).round_()
            best = torch.minimum(torch.maximum(best, low, out=best), high, out=best)
            change = (best - code[j]).mul_(scale)
            code[j] = best
            residual[j + 1 :].addr_(block[j, j + 1 :], change)
