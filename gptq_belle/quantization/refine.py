"""Behind GPTQ: scales and codes moved to where the layer's error is smaller still, one group of inputs after the other.

Laid out inputs first, as in the solver. With D = Q - W, the error is tr(D^T H D), and R = H D is half its gradient.
"""

import torch
from torch import Tensor

from gptq_belle.common.devices import threads
from gptq_belle.quantization import grid
from gptq_belle.quantization.grid import SMALLEST_SEARCHED
from gptq_belle.quantization.hessian import nonzero_diagonal

INNER = 32  # inputs, in torch, whose own changes R takes in one at a time; the rest of the group gets them together


def refine(codes: Tensor, scales: Tensor, zeros: Tensor, W: Tensor, H: Tensor, *, bits: int, sweeps: int,
           positive: bool = False) -> None:
    """Sweeps of scale refit and coordinate descent over all groups; no step makes the error larger.

    A group's rows of R are computed when its turn comes. A sweep is one product of H and D, twice that of GPTQ.

    Args:
        codes: (K, N) uint8; changed in place, as are the scales.
        scales, zeros: (G, N) in W's dtype; group g holds the inputs g * K / G and on.
        W: (K, N), the weight; used up.
        H: (K, K) in W's dtype, undamped.
        bits: bits a code.
        sweeps: how many.
        positive: no scale may turn negative.
    """
    D, group = W, len(codes) // len(scales)
    parts = [slice(start, start + group) for start in range(0, len(codes), group)]
    for g, part in enumerate(parts):
        torch.sub((codes[part] - zeros[g]).mul_(scales[g]), W[part], out=D[part])
    diagonal = nonzero_diagonal(H)
    for _ in range(sweeps):
        for g, part in enumerate(parts):
            code, residual, block = codes[part] - zeros[g], H[part] @ D, H[part, part]
            before = code * scales[g]
            scales[g] = refit_scales(code, scales[g], residual, block, positive=positive)
            descend(code, scales[g], zeros[g], residual, block, diagonal[part], bits)
            codes[part] = code + zeros[g]
            D[part] += code.mul_(scales[g]).sub_(before)


def refit_scales(code: Tensor, scale: Tensor, residual: Tensor, block: Tensor, *, positive: bool = False) -> Tensor:
    """Each output's scale of one group where the error is smallest, codes as they are.

    ds = -(c . R_g) / (c^T H_gg c), the root of the derivative of tr(D^T H D) along c; then rounded to float16, and left
    out where it would not be an improvement, or be too small.

    Args:
        code: (g, N), codes less their zero points.
        scale: (N,), as they are.
        residual: (g, N), the group's rows of R = H D; brought up to date.
        block: (g, g), the group's own part of H.
        positive: keep signs as they are.
    Returns:
        (N,), the new scales.
    """
    image = block @ code
    curvature = (code * image).sum(0)
    slope = (code * residual).sum(0)
    found = (scale - slope / curvature).to(torch.float16).to(scale.dtype)
    change = found - scale
    gain = change * (2 * slope + change * curvature)  # of the error; negative is better; NaN where all codes are 0
    better = (gain < 0) & (found.abs() >= SMALLEST_SEARCHED) & ((found > 0) | (not positive))
    change = torch.where(better, change, 0.0)
    residual.addcmul_(image, change)
    return torch.where(better, found, scale)


def descend(code: Tensor, scale: Tensor, zero: Tensor, residual: Tensor, block: Tensor, diagonal: Tensor,
            bits: int) -> None:
    """One sweep of coordinate descent over the codes of one group, scales as they are.

    c_j = clamp(round((q_j - R_j / H_jj) / s)), the best code of input j with all others as they are; R follows by a
    rank-one update (as in QuantEase, arXiv 2309.01885, section 3).

    Args:
        code: (g, N), codes less their zero points; changed in place.
        scale, zero: (N,).
        residual: as for `refit_scales`; used up.
        block: as there.
        diagonal: (g,), of H, without zeros.
        bits: bits a code.
    """
    found = grid.kernels(code)
    step, sweep = (found.BLOCK, found.descend) if found else (INNER, _descend)
    for j1 in range(0, len(code), step):
        part, rest = slice(j1, j1 + step), slice(j1 + step, None)
        before = code[part].clone() if j1 + step < len(code) else None
        sweep(code[part], scale, zero, residual[part], block[part, part], diagonal[part], bits)
        if before is not None:
            residual[rest].addmm_(block[rest, part], (code[part] - before).mul_(scale))


def _descend(code: Tensor, scale: Tensor, zero: Tensor, residual: Tensor, block: Tensor, diagonal: Tensor,
             bits: int) -> None:
    """`descend` of some inputs, in torch: a few operations an input."""
    low, high = -zero, ((1 << bits) - 1) - zero
    with threads(1):  # as in the solver: steps of microseconds
        for j in range(len(code)):
            wanted = torch.addcdiv(code[j], residual[j], scale * diagonal[j], value=-1).round_()
            wanted = torch.minimum(torch.maximum(wanted, low, out=wanted), high, out=wanted)
            change = (wanted - code[j]).mul_(scale)
            code[j] = wanted
            residual[j + 1 :].addr_(block[j, j + 1 :], change)
