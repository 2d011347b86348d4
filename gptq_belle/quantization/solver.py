"""GPTQ: round a layer's weights one input at a time, and let the inputs not yet rounded compensate for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323,
Algorithm 1, with its names: W, H, Hinv (its upper Cholesky factor), Err, i1, i2. Inside, W is transposed to (K, N): a
step works on one input, whose N weights are then contiguous.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.common.devices import threads
from gptq_belle.errors import InputError
from gptq_belle.formats.gptq_weight import QuantizedWeight, all_finite
from gptq_belle.quantization import grid
from gptq_belle.quantization.activation_order import (
    activation_order,
    group_and_solve_order,
    group_indices,
    permuted,
    unpermuted,
)
from gptq_belle.quantization.config import AUTO, QuantConfig
from gptq_belle.quantization.grid import check_storable, min_max_grid, searched_grid, to_codes
from gptq_belle.quantization.group_sizes import fitting_group_sizes, group_size_error
from gptq_belle.quantization.hessian import inverse_cholesky, nonzero_diagonal, output_error, remaining_error
from gptq_belle.quantization.refine import refine

BLOCK = 128  # inputs per lazy block (GPTQ, section 3.3, step 2); a multiple of every group size
INNER = 32  # inputs per inner lazy block, so that a step stays in the cache; divides every group size


class Solution(NamedTuple):
    """A quantized layer and its error."""

    weight: QuantizedWeight
    error: float  # squared error of the layer's output, relative to the squared output
    damp: float  # the damping that made the Hessian positive definite; 0 without a Hessian


class HessianFactor(NamedTuple):
    """The factor of the inverse Hessian, which layers with the same inputs share."""

    Hinv: Tensor  # (K, K), upper Cholesky factor of the inverse, its inputs in `order`
    damp: float
    order: Tensor | None  # (K,) int64, see `activation_order`


def factorize(hessian: Tensor, config: QuantConfig) -> HessianFactor:
    """Factorize the inverse Hessian, its inputs in activation order.

    Args:
        hessian: (K, K) float32 or float64, the mean of x x^T.
        config: damp, act_order, and static_order of its techniques.
    Raises:
        InputError: NaN or infinity, or a Hessian that no allowed damping makes positive definite.
    """
    _check_finite(Hessian=hessian)
    order = activation_order(hessian, config)
    return HessianFactor(*inverse_cholesky(hessian, config.damp, order), order)


def gptq(weight: Tensor, hessian: Tensor, config: QuantConfig, factor: HessianFactor | None = None) -> Solution:
    """Quantize a layer against the Hessian of its inputs.

    Args:
        weight: (N, K) float32 or float64, which is also the dtype of the arithmetic.
        hessian: (K, K), the mean of x x^T; its scale does not matter.
        config: bits, group_size, sym, act_order, damp, positive_scales, and the techniques of its preset.
        factor: result of `factorize` for this Hessian and config, if it is known.
    Returns:
        The solution; its error is tr(D H D^T) / tr(W H W^T) with D = W - Q and H undamped.
    Raises:
        InputError: NaN or infinity in an argument, or a Hessian that no allowed damping makes positive definite.
        UsageError: group_size does not divide K.
    """
    factor = factorize(hessian.to(weight.dtype), config) if factor is None else factor
    *_, quantized = candidate_weights(weight, hessian, config, factor).values()
    return Solution(quantized, output_error(weight, quantized, hessian), factor.damp)


def candidate_weights(weight: Tensor, hessian: Tensor, config: QuantConfig,
                      factor: HessianFactor) -> dict[str, QuantizedWeight]:
    """Solve a layer: the candidate "gptq", and "refined" where the preset refines it.

    With the technique static_order all grids are computed from the original weights before solving, because the solver
    reaches the inputs of a group at different times.

    Args, Raises: as `gptq`.
    """
    group, techniques = _group_size(weight, config), config.techniques
    _check_finite(weight=weight)
    Hinv, _, order = factor
    group_order, solve_order = group_and_solve_order(order, config)
    W = _transposed(weight, hessian, group_order)
    grids = None
    if techniques.search or techniques.static_order:
        grids = _static_grids(W, unpermuted(remaining_error(Hinv), solve_order), group, config)
    codes, scales, zeros = _solve(W.clone() if solve_order is None else permuted(W, solve_order), Hinv, group, config,
                                  grids, solve_order)
    candidates = {"gptq": _quantized_weight(codes, scales, zeros, group, group_order)}
    if techniques.sweeps:
        H = permuted(permuted(hessian.to(W.dtype), group_order), group_order, dim=1)
        refine(codes, scales, zeros, W, H, bits=config.bits, sweeps=techniques.sweeps,
               ridge=factor.damp * float(nonzero_diagonal(H).mean()), positive=config.positive_scales or not config.sym)
        candidates["refined"] = _quantized_weight(codes, scales, zeros, group, group_order)
    return candidates


def round_to_nearest(weight: Tensor, config: QuantConfig) -> Solution:
    """Quantize a layer without a Hessian; the error is relative to the weights (H = I).

    Args, Raises: as `gptq`.
    """
    group = _group_size(weight, config)
    _check_finite(weight=weight)
    W = weight.t()
    scales, zeros = _min_max_grids(W, group, config)
    codes = torch.cat([to_codes(part, scale, zero, config.bits)
                       for part, scale, zero in zip(W.split(group), scales, zeros, strict=True)])
    quantized = _quantized_weight(codes.to(torch.uint8), scales, zeros, group, None)
    return Solution(quantized, output_error(weight, quantized, None), 0.0)


def _static_grids(W: Tensor, importance: Tensor, group: int, config: QuantConfig) -> tuple[Tensor, Tensor]:
    """Scales and zeros (G, N) from the original weights W (K, N), searched if the preset has that technique."""
    if not config.techniques.search:
        return _min_max_grids(W, group, config)
    return _stacked([searched_grid(part, weights, config.bits, config.sym, positive=config.positive_scales)
                     for part, weights in zip(W.split(group), importance.split(group), strict=True)])


def _min_max_grids(W: Tensor, group: int, config: QuantConfig) -> tuple[Tensor, Tensor]:
    return _stacked([min_max_grid(part, config.bits, config.sym) for part in W.split(group)])


def _stacked(grids: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    scales, zeros = (torch.stack(rows) for rows in zip(*grids, strict=True))
    return scales, zeros


def _solve(W: Tensor, Hinv: Tensor, group: int, config: QuantConfig, grids: tuple[Tensor, Tensor] | None = None,
           order: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Run Algorithm 1 on W (K, N), which is overwritten; returns codes (K, N) uint8, scales and zeros (G, N).

    Without `grids`, each is computed from its group's weights when the group is reached. W has its inputs in `order`;
    codes are returned in the order of the groups.
    """
    K, N = W.shape
    whole = group == K
    codes = torch.empty(K, N, dtype=torch.uint8, device=W.device)
    if grids is None and whole:
        grids = _min_max_grids(W, group, config)
    scales, zeros = grids or (W.new_empty(K // group, N), W.new_empty(K // group, N))
    group_of_input = permuted(torch.arange(K, device=W.device), order) // group
    fused = grid.fused_kernels(W)
    solve_block = fused.solve_block if fused else _solve_block
    for i1 in range(0, K, BLOCK):
        i2 = min(i1 + BLOCK, K)
        Err = torch.empty_like(W[i1:i2])
        groups = (slice(i1 // group, i2 // group) if grids is None else
                  group_of_input[:1] if whole else group_of_input[i1:i2])
        solve_block(W[i1:i2], Hinv[i1:i2, i1:i2], codes[i1:i2], Err, scales[groups], zeros[groups],
                    group=group if grids is None else 0, bits=config.bits, sym=config.sym)
        W[i2:].addmm_(Hinv[i1:i2, i2:].t(), Err, alpha=-1)
    check_storable(scales)
    return unpermuted(codes, order), scales, zeros


def _solve_block(W: Tensor, Hinv: Tensor, codes: Tensor, Err: Tensor, scales: Tensor, zeros: Tensor, *, group: int,
                 bits: int, sym: bool) -> None:
    """Solve the inputs of a block W (B, N), which is overwritten; arguments as `triton_gptq.solve_block`."""
    if not group:
        scales, zeros = scales.expand_as(W), zeros.expand_as(W)
    for j1 in range(0, len(W), INNER):
        j2 = min(j1 + INNER, len(W))
        with threads(1):  # each operation takes microseconds: more threads would mostly wait for each other
            for i in range(j1, j2):
                g = i // group if group else i
                if group and i % group == 0:
                    scales[g], zeros[g] = min_max_grid(W[i : i + group], bits, sym)
                scale, zero = scales[g], zeros[g]
                code = to_codes(W[i], scale, zero, bits)
                codes[i] = code
                torch.sub(W[i], (code - zero).mul_(scale), out=Err[i]).div_(Hinv[i, i])
                W[i + 1 : j2].addr_(Hinv[i, i + 1 : j2], Err[i], alpha=-1)
        W[j2:].addmm_(Hinv[j1:j2, j2:].t(), Err[j1:j2], alpha=-1)


def _transposed(weight: Tensor, hessian: Tensor, order: Tensor | None) -> Tensor:
    """A contiguous copy W (K, N) of a weight (N, K), its inputs in the given order, never active inputs set to 0."""
    W = permuted(weight.t(), order)
    W = W.clone(memory_format=torch.contiguous_format) if order is None else W.contiguous()
    W[permuted(hessian.diagonal() == 0, order)] = 0
    return W


def _quantized_weight(codes: Tensor, scales: Tensor, zeros: Tensor, group: int,
                      order: Tensor | None) -> QuantizedWeight:
    """Convert codes (K, N), their inputs in `order`, and scales and zeros (G, N) to the layer's order and layout."""
    g_idx = group_indices(len(codes), group, order, codes.device)
    return QuantizedWeight(
        codes=unpermuted(codes, order).t().contiguous(),
        scales=scales.t().float().clone(memory_format=torch.contiguous_format),
        zeros=zeros.t().to(torch.int32).contiguous(), g_idx=g_idx.to(torch.int32))


def _group_size(weight: Tensor, config: QuantConfig) -> int:
    K = weight.shape[1]
    fitting = fitting_group_sizes([K])
    group = fitting[0] if config.group_size == AUTO else config.group_size
    if group not in fitting:
        raise group_size_error(group, K, "the layer", fitting)
    return K if group == -1 else group


def _check_finite(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise InputError(f"the {name} holds NaN or infinity", "The source or the calibration is damaged.")
