"""Targets of the full-precision model: a layer makes up for what the quantized layers before it have spoiled."""

import torch
from torch import Tensor

from gptq_belle.quantization.solver import Factor


def full_targets(weight: Tensor, cross: Tensor, factor: Factor, alpha: float) -> Tensor:
    """The weight whose output on the quantized model's inputs comes closest to the full-precision model's.

    With X the layer's inputs in the quantized model and F in the full-precision one, ||Q X - W F||^2 is, but for what
    no Q changes, ||(Q - T) X||^2 with T = W + W (F - X) X^T (X X^T)^-1. That is the objective of GPTAQ (arXiv
    2504.02692, equation 6), solved for all inputs at once and before GPTQ instead of along with it. Because (F - X) X^T
    is known from a sample only, T goes the share alpha of the way.

    Args:
        weight: (N, K), W.
        cross: (K, K), the mean of (f - x) x^T.
        factor: of the Hessian, the mean of x x^T; damped.
        alpha: 0 .. 1.
    Returns:
        (N, K), T.
    """
    moved = weight @ cross
    if factor.order is not None:
        moved = moved[:, factor.order]
    moved = (moved @ factor.upper.t()) @ factor.upper
    if factor.order is not None:
        moved = torch.empty_like(moved).index_copy_(1, factor.order, moved)
    return torch.add(weight, moved, alpha=alpha)
