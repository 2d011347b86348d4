"""Several solutions of one layer, compared on held-out rows; one of them aims at the full-precision model's outputs."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.formats.gptq_weight import QuantizedWeight
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.output_error import held_out_error, output_error
from gptq_belle.quantization.solver import HessianFactor, Solution, candidate_weights
from gptq_belle.quantization.stage_hessians import StageHessians


def full_precision_target(weight: Tensor, cross: Tensor, factor: HessianFactor, alpha: float) -> Tensor:
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
    moved = (moved @ factor.Hinv.t()) @ factor.Hinv
    if factor.order is not None:
        moved = torch.empty_like(moved).index_copy_(1, factor.order, moved)
    return torch.add(weight, moved, alpha=alpha)


OWN, FULL = "own", "full"  # whose outputs are aimed at: the layer's on its inputs as they are, or the full model's


class ChosenSolution(NamedTuple):
    """The solution that was taken, and how it came about."""

    solution: Solution
    won: str  # whose outputs it aims at, and "gptq" or "refined"
    held_out: dict[str, float]  # by candidate, its `held_out_error`; empty where no rows were held out


def best_solution(weight: Tensor, moments: StageHessians, factor: HessianFactor, config: QuantConfig) -> ChosenSolution:
    """Quantize a layer in the ways that the recipe knows, and keep what does best on the rows that are held out.

    Where none are, the recipe's last word is taken unseen.

    Args:
        weight: (N, K) float32.
        moments: of the layer's inputs.
        factor: of their Hessian.
        config: the settings.
    Raises:
        InputError, UsageError: as `gptq`.
    """
    chosen, won, errors = None, "", {}
    for name, candidate in _candidates(weight, moments, factor, config):
        if moments.held_out:
            errors[name] = held_out_error(candidate, weight, moments.held_out)
            if won and errors[name] >= errors[won]:
                continue
        chosen, won = candidate, name
    assert chosen is not None
    return ChosenSolution(Solution(chosen, output_error(weight, chosen, moments.hessian), factor.damp), won, errors)


def _candidates(weight: Tensor, moments: StageHessians, factor: HessianFactor,
                config: QuantConfig) -> Iterator[tuple[str, QuantizedWeight]]:
    """Name and solution; the last one is the recipe's."""
    aims = [OWN]
    if moments.cross is not None and bool(moments.cross.any()):  # in front of the first linear, both models agree
        aims = [OWN, FULL] if moments.held_out else [FULL]
    for aim in aims:
        target = weight
        if aim == FULL and moments.cross is not None:
            target = full_precision_target(weight, moments.cross, factor, config.techniques.alpha)
        for name, found in candidate_weights(target, moments.hessian, config, factor).items():
            yield f"{aim} {name}", found
