"""One step of block refinement: change the codes and scales of one linear by a quadratic model of the block's error."""

from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.formats.gptq_weight import QuantizedWeight
from gptq_belle.quantization.refine import sweep_groups

SWEEPS = 3  # per step; only the gradient needs the calibration rows, which take most of the time


class Step(NamedTuple):
    """A proposed change of a linear, and what the quadratic model predicts of it."""

    weight: QuantizedWeight
    slope: float  # first-order change of the error
    bend: float  # second-order change of the error for a damping of 1; 0 where nothing changes


def quadratic_step(weight: QuantizedWeight, gradient: Tensor, hessian: Tensor, curvature: Tensor, bits: int, *,
                   positive: bool) -> Step:
    """Lower the quadratic model of the block's error by coordinate descent over one linear's codes and scales.

    For a change D of the weight the model is <G, D> + sum_n a_n d_n^T H d_n, where the output rows n are independent:
    the Gauss-Newton approximation whose factor over outputs (K-FAC, arXiv 1503.05671, section 3) is diagonal.

    Args:
        weight: the current weight Q (N, K).
        gradient: (N, K) float32, G, of the block's error at Q.
        hessian: (K, K) float32, the mean of x x^T.
        curvature: (N,) float32, a, positive.
        bits: bits per code.
        positive: keep every scale positive.
    """
    order = weight.g_idx.argsort(stable=True)
    sorted_inputs = bool((weight.g_idx.diff() >= 0).all())
    H = hessian if sorted_inputs else hessian[order][:, order]
    codes, G = ((part if sorted_inputs else part[:, order]).t().contiguous() for part in (weight.codes, gradient))
    scales, zeros = (part.t().float().contiguous().clone() for part in (weight.scales, weight.zeros))
    D = torch.zeros_like(G)
    sweep_groups(codes, scales, zeros, D, H, G / (2 * curvature), bits=bits, sweeps=SWEEPS, positive=positive)
    slope, bend = (G * D).sum(dtype=torch.float64), (curvature * (D * (H @ D)).sum(0)).sum(dtype=torch.float64)
    changed = codes.t().contiguous() if sorted_inputs else torch.empty_like(weight.codes).index_copy_(
        1, order, codes.t())
    return Step(weight._replace(codes=changed, scales=scales.t().contiguous()), float(slope), float(bend))
