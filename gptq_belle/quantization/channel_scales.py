"""Channel scales: multiply columns of weights by constants that the norm before them divides out.

With s_k > 0 for each input k of the linears after a norm, columns multiplied by s and the norm's weight divided by it
leave the model's function unchanged, and inputs with larger activations are rounded more finely. As in AWQ (arXiv
2306.00978, section 3.2), s is a power of the activations' magnitude, but the exponent is fixed:

    s_k = (H_kk^(1/2))^0.3, divided by its geometric mean

GPTQ already weights errors by H; the scales change which weights share a grid. 0.45 in place of 0.3 is equal; powers of
two, which would leave norms exact, gain nothing. Scales are used where they lower the error of rounding to nearest with
each weight's error multiplied by `remaining_error`. Measured at 4 bits, that estimate and the linears' errors after
GPTQ fall and rise together: by a fifth and by 10 to 19 % in every block of the demo models, while both rise in
SmolLM2-135M, whose weights lie on a 4-bit grid from the start.
"""

import torch
from torch import Tensor, nn

from gptq_belle.checkpoint.empty_model import assign
from gptq_belle.quantization import grid
from gptq_belle.quantization.activation_order import unpermuted
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.hessian import nonzero_diagonal, remaining_error
from gptq_belle.quantization.solver import HessianFactor
from gptq_belle.quantization.stage_hessians import StageHessians

EXPONENT = 0.3


def channel_scales(block: nn.Module, norm: str, stage: tuple[str, ...], hessian: Tensor, factor: HessianFactor,
                   config: QuantConfig) -> Tensor | None:
    """The scales s (K,) of a stage's inputs, or None where they do not lower the estimated error.

    The norm's new weight is rounded to float16, as it is stored, and s is the ratio of its old and new weight, so that
    the function changes by the rounding of float32 only.

    Args:
        block: the block, whose linears of this stage are not quantized yet.
        norm: path of the norm in the block.
        stage: the linears.
        hessian: (K, K), the mean of x x^T of their inputs.
        factor: result of `factorize` for it.
        config: the linears' settings.
    """
    wanted = nonzero_diagonal(hessian) ** (EXPONENT / 2)
    wanted /= wanted.log().mean().exp()
    weight = block.get_parameter(f"{norm}.weight").detach()
    rounded = (weight / wanted).to(torch.float16).float()
    usable = (rounded != 0) & rounded.isfinite()
    scales = torch.where(usable, weight / rounded, 1.0)
    importance = unpermuted(remaining_error(factor.Hinv), factor.order, dim=0)
    weights = [block.get_parameter(f"{name}.weight").detach() for name in stage]
    before = sum(_rounding_error(weight, importance, config) for weight in weights)
    # with inputs divided by s, the inverse of the diagonal of H^-1 is divided by its square
    after = sum(_rounding_error(weight * scales, importance / scales.square(), config) for weight in weights)
    return scales if after < before else None


def fold_channel_scales(block: nn.Module, norm: str, stage: tuple[str, ...], inputs: StageHessians,
                        scales: Tensor) -> StageHessians:
    """Fold channel scales into a norm and the linears that read its output; new parameters replace the block's.

    A bias of the norm is rounded to float16 too, by up to 2^-11 of itself.

    Args:
        block, norm, stage: as for `channel_scales`. Nothing but the stage may read the norm's output.
        inputs: statistics of the stage's inputs; overwritten.
        scales: s (K,).
    Returns:
        The statistics of the inputs divided by s.
    """
    for name, parameter in list(block.get_submodule(norm).named_parameters()):
        assign(block, f"{norm}.{name}", (parameter.detach() / scales).to(torch.float16).float())
    for name in stage:
        assign(block, f"{name}.weight", block.get_parameter(f"{name}.weight").detach() * scales)
    inverse = 1 / scales
    both = torch.outer(inverse, inverse)
    cross = None if inputs.cross is None else inputs.cross.mul_(both)
    held_out = [(x * inverse, f * inverse) for x, f in inputs.held_out]
    return StageHessians(inputs.hessian.mul_(both), cross, held_out, scales)


def _rounding_error(weight: Tensor, importance: Tensor, config: QuantConfig) -> float:
    """Sum over k of importance_k (w_k - q_k)^2 for a weight (N, K) rounded to the best grids of its groups."""
    group = weight.shape[1] if config.group_size == -1 else config.group_size
    lost = 0.0
    for start in range(0, weight.shape[1], group):
        part = weight[:, start : start + group].t().contiguous()
        share = importance[start : start + group].contiguous()
        scales, zeros = grid.searched_grid(part, share, config.bits, config.sym, positive=config.positive_scales)
        rounded = grid.to_codes(part, scales, zeros, config.bits).sub_(zeros).mul_(scales)
        lost += float(share @ rounded.sub_(part).square_().sum(1))
    return lost
