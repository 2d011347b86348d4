"""Activation order: the order in which GPTQ quantizes the inputs of a layer, and which inputs form a group.

The activation of input k is H_kk, the mean of x_k^2. Two settings follow it, the most active input first:

- ``act_order`` (``desc_act`` on disk): groups are formed of consecutive inputs in this order, so readers need g_idx.
- the technique ``static_order``: groups are formed of neighbouring inputs, so that g_idx is trivial, and only the
  solver follows the order (options act_order and static_groups of the original GPTQ).

Everywhere an order is a permutation (K,) int64 of input indices, or None for the layer's own order.
"""

import torch
from torch import Tensor

from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.hessian import nonzero_diagonal


def activation_order(hessian: Tensor, config: QuantConfig) -> Tensor | None:
    """Decide the order in which inputs are quantized; equally active inputs keep their order.

    Args:
        hessian: (K, K), the mean of x x^T.
        config: act_order, and static_order of its techniques.
    """
    if not config.act_order and not config.techniques.static_order:
        return None
    return torch.argsort(nonzero_diagonal(hessian), descending=True, stable=True)


def group_and_solve_order(order: Tensor | None, config: QuantConfig) -> tuple[Tensor | None, Tensor | None]:
    """Split `activation_order` into the order in which groups are formed, and the solver's order on top of it."""
    return (order, None) if config.act_order else (None, order)


def permuted(tensor: Tensor, order: Tensor | None, dim: int = 0) -> Tensor:
    """The tensor with dimension `dim` (0 or 1) in the given order; the tensor itself, not a copy, where that is None.
    """
    if order is None:
        return tensor
    return tensor[order] if dim == 0 else tensor[:, order]


def unpermuted(tensor: Tensor, order: Tensor | None, dim: int = 0) -> Tensor:
    """The inverse of `permuted`: the tensor with dimension `dim` in the layer's own order."""
    return tensor if order is None else torch.empty_like(tensor).index_copy_(dim, order, tensor)


def group_indices(inputs: int, group_size: int, order: Tensor | None, device: torch.device) -> Tensor:
    """g_idx (K,) int64: the group of each input, where groups are formed in the given order."""
    return unpermuted(torch.arange(inputs, device=device) // group_size, order)
