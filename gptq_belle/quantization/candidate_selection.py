"""Choose among several solutions of a layer by their error on held-out rows."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.formats.gptq_weight import ROWS_AT_A_TIME, QuantizedWeight, dequantize
from gptq_belle.quantization.activation_order import permuted, unpermuted
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.hessian import output_error, rows_of
from gptq_belle.quantization.solver import HessianFactor, Solution, candidate_weights
from gptq_belle.quantization.stage_hessians import StageHessians

OWN, FULL = "own", "full"  # target: the layer's output on its own inputs, or its output in the full-precision model


class ChosenSolution(NamedTuple):
    """The chosen solution of a layer, and the errors of all candidates."""

    solution: Solution
    won: str  # name of the candidate, such as "own gptq" or "full refined"; "" for rounding to nearest
    held_out: dict[str, float]  # `held_out_error` by candidate; empty without held-out rows


def best_solution(weight: Tensor, hessians: StageHessians, factor: HessianFactor,
                  config: QuantConfig) -> ChosenSolution:
    """Quantize a layer with the techniques of the preset, and choose the candidate that is best on held-out rows.

    Without held-out rows the last candidate is chosen, which uses all techniques.

    Args:
        weight: (N, K) float32.
        hessians: statistics of the layer's inputs.
        factor: result of `factorize` for their Hessian.
        config: the layer's settings.
    Raises:
        InputError, UsageError: as `gptq`.
    """
    best, won, errors = None, "", {}
    for name, candidate in _candidates(weight, hessians, factor, config):
        if hessians.held_out:
            errors[name] = held_out_error(candidate, weight, hessians.held_out)
            if won and errors[name] >= errors[won]:
                continue
        best, won = candidate, name
    assert best is not None
    return ChosenSolution(Solution(best, output_error(weight, best, hessians.hessian), factor.damp), won, errors)


def full_precision_target(weight: Tensor, cross: Tensor, factor: HessianFactor, alpha: float) -> Tensor:
    """The weight whose output on the quantized model's inputs is closest to the full-precision model's output.

    With X the layer's inputs in the quantized model and F in the full-precision model, ||Q X - W F||^2 equals, up to a
    constant, ||(Q - T) X||^2 with T = W + W (F - X) X^T (X X^T)^-1. That is the objective of GPTAQ (arXiv 2504.02692,
    equation 6), solved for all inputs at once before GPTQ instead of during it. (F - X) X^T is estimated from a sample,
    so only alpha times the change is applied.

    Args:
        weight: (N, K), W.
        cross: (K, K), the mean of (f - x) x^T.
        factor: result of `factorize` for the mean of x x^T.
        alpha: share of the change, 0 .. 1.
    Returns:
        T (N, K).
    """
    change = permuted(weight @ cross, factor.order, dim=1)
    change = unpermuted((change @ factor.Hinv.t()) @ factor.Hinv, factor.order, dim=1)
    return torch.add(weight, change, alpha=alpha)


def held_out_error(quantized: QuantizedWeight, weight: Tensor, held_out: Sequence[tuple[Tensor, Tensor]]) -> float:
    """||Q X - W F||^2 / ||W F||^2: the distance of a layer's output from the full-precision model's output.

    Args:
        quantized: Q (N, K).
        weight: W (N, K).
        held_out: the layer's inputs X (tokens, K) in the quantized model and F (tokens, K) in the full-precision model.
    """
    total = lost = 0.0
    for start in range(0, weight.shape[0], ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        rows = dequantize(rows_of(quantized, part))
        for x, full in held_out:
            target = full @ weight[part].t()
            lost += float(torch.sum((x @ rows.t()).sub_(target).square_(), dtype=torch.float64))
            total += float(torch.sum(target.square_(), dtype=torch.float64))
    return lost / total if total > 0 else 0.0


def _candidates(weight: Tensor, hessians: StageHessians, factor: HessianFactor,
                config: QuantConfig) -> Iterator[tuple[str, QuantizedWeight]]:
    """Name and solution of each candidate; the last one uses all techniques of the preset."""
    targets = [OWN]
    # at the first linear both models have equal inputs
    if config.techniques.alpha and hessians.cross is not None and bool(hessians.cross.any()):
        targets = [OWN, FULL] if hessians.held_out else [FULL]
    for kind in targets:
        target = weight
        if kind == FULL and hessians.cross is not None:
            target = full_precision_target(weight, hessians.cross, factor, config.techniques.alpha)
        for name, candidate in candidate_weights(target, hessians.hessian, config, factor).items():
            yield f"{kind} {name}", candidate
