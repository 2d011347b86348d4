"""Several solutions of one layer, of which rows that none of them has seen choose one."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from gptq_belle.checkpoint.packing import QuantizedWeight
from gptq_belle.config import QuantConfig
from gptq_belle.quantization.loss import held_out_error, output_error
from gptq_belle.quantization.moments import Moments
from gptq_belle.quantization.solver import Factor, Solution, solutions
from gptq_belle.quantization.targets import full_targets

OWN, FULL = "own", "full"  # whose outputs are aimed at: the layer's on its inputs as they are, or the full model's


class Choice(NamedTuple):
    """The solution that was taken, and how it came about."""

    solution: Solution
    won: str  # whose outputs it aims at, and "gptq" or "refined"
    held_out: dict[str, float]  # by candidate, its `held_out_error`; empty where no rows were held out


def best_of(weight: Tensor, moments: Moments, factor: Factor, config: QuantConfig) -> Choice:
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
        if moments.held:
            errors[name] = held_out_error(candidate, weight, moments.held)
            if won and errors[name] >= errors[won]:
                continue
        chosen, won = candidate, name
    assert chosen is not None
    return Choice(Solution(chosen, output_error(weight, chosen, moments.hessian), factor.damp), won, errors)


def _candidates(weight: Tensor, moments: Moments, factor: Factor,
                config: QuantConfig) -> Iterator[tuple[str, QuantizedWeight]]:
    """Name and solution; the last one is the recipe's."""
    aims = [OWN]
    if moments.cross is not None and bool(moments.cross.any()):  # in front of the first linear, both models agree
        aims = [OWN, FULL] if moments.held else [FULL]
    for aim in aims:
        target = weight
        if aim == FULL and moments.cross is not None:
            target = full_targets(weight, moments.cross, factor, config.recipe.alpha)
        for name, found in solutions(target, moments.hessian, config, factor).items():
            yield f"{aim} {name}", found
