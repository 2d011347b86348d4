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
from gptq_belle.quantization.solver import HessianFactor, factorize
from gptq_belle.quantization.stage_hessians import StageHessians

EXPONENT = 0.3


def fold_channel_scales(block: nn.Module, norm: str, stage: tuple[str, ...], inputs: StageHessians,
                        factor: HessianFactor, config: QuantConfig) -> tuple[StageHessians, HessianFactor]:
    """Fold channel scales into a norm and the linears that read its output, if that lowers the estimated error.

    New parameters replace the block's. A bias of the norm is rounded to float16, by up to 2^-11 of itself.

    Args:
        block: the block, whose linears of this stage are not quantized yet.
        norm: path of the norm in the block; nothing but the stage may read its output.
        stage: the linears.
        inputs: statistics of their inputs; cross is overwritten.
        factor: result of `factorize` for their Hessian.
        config: the linears' settings.
    Returns:
        The statistics of the inputs divided by s and the factor of their Hessian, or the arguments unchanged.
    """
    scales = candidate_scales(inputs.hessian, block.get_parameter(f"{norm}.weight").detach())
    inverse = torch.outer(1 / scales, 1 / scales)
    hessian = inputs.hessian * inverse
    folded = factorize(hessian, config)
    weights = [block.get_parameter(f"{name}.weight").detach() for name in stage]
    before = sum(_rounding_error(weight, factor, config) for weight in weights)
    after = sum(_rounding_error(weight * scales, folded, config) for weight in weights)
    if after >= before:
        return inputs, factor
    for name, parameter in list(block.get_submodule(norm).named_parameters()):
        assign(block, f"{norm}.{name}", (parameter.detach() / scales).to(torch.float16).float())
    for name, weight in zip(stage, weights, strict=True):
        assign(block, f"{name}.weight", weight * scales)
    cross = None if inputs.cross is None else inputs.cross.mul_(inverse)
    held_out = [(x / scales, f / scales) for x, f in inputs.held_out]
    return StageHessians(hessian, cross, held_out, scales), folded


def candidate_scales(hessian: Tensor, norm: Tensor) -> Tensor:
    """The scales s (K,) for inputs with a Hessian (K, K).

    The norm's new weight is rounded to float16, as it is stored, and s is the ratio of its old weight `norm` (K,) and
    the new one, so that the function changes by the rounding of float32 only.
    """
    wanted = nonzero_diagonal(hessian) ** (EXPONENT / 2)
    rounded = (norm * (wanted.log().mean().exp() / wanted)).to(torch.float16).float()
    usable = (rounded != 0) & rounded.isfinite()
    return torch.where(usable, norm / rounded, 1.0)


def _rounding_error(weight: Tensor, factor: HessianFactor, config: QuantConfig) -> float:
    """Sum of `remaining_error`_k (w_k - q_k)^2 over a weight (N, K) rounded to the best grids of its groups."""
    importance = unpermuted(remaining_error(factor.Hinv), factor.order)
    group = weight.shape[1] if config.group_size == -1 else config.group_size
    lost = 0.0
    for start in range(0, weight.shape[1], group):
        part = weight[:, start : start + group].t().contiguous()
        share = importance[start : start + group].contiguous()
        scales, zeros = grid.searched_grid(part, share, config.bits, config.sym, positive=config.positive_scales)
        rounded = grid.to_codes(part, scales, zeros, config.bits).sub_(zeros).mul_(scales)
        lost += float(share @ rounded.sub_(part).square_().sum(1))
    return lost
