"""GPTQ: round a layer's weights one input at a time, and let the inputs not yet rounded make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323,
Algorithm 1, in its names: W, H, Hinv (its upper Cholesky factor), Err, i1, i2. Inside, W is kept transposed, (K, N):
a step touches one input, and its N weights are then contiguous.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.common.devices import threads
from gptq_belle.errors import InputError, UsageError
from gptq_belle.formats.gptq_weight import QuantizedWeight, all_finite
from gptq_belle.quantization import grid
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.grid import check_storable, min_max_grid, searched_grid, to_codes
from gptq_belle.quantization.hessian import inverse_cholesky, nonzero_diagonal, remaining_error
from gptq_belle.quantization.output_error import output_error
from gptq_belle.quantization.refine import refine

BLOCK = 128  # inputs a lazy block (GPTQ, section 3.3, step 2); every grouped size divides it
INNER = 32  # inputs a lazy block inside of that, so that a step touches what the cache holds; divides every group size


class Solution(NamedTuple):
    """A quantized layer and what it cost."""

    weight: QuantizedWeight
    error: float  # squared error of the layer's output as a share of the output's square
    damp: float  # the damping that made the Hessian positive definite; 0 where there was none


class HessianFactor(NamedTuple):
    """What layers that see the same inputs share: the factor of the inverse Hessian, and the order of solving."""

    Hinv: Tensor  # (K, K), upper Cholesky factor of the inverse Hessian, in the order of solving
    damp: float
    order: Tensor | None  # (K,) int64; None for the layer's own


def factorize(hessian: Tensor, config: QuantConfig) -> HessianFactor:
    """The part of the work that depends on the inputs only.

    Args:
        hessian: (K, K) float32 or float64, the mean of x x^T.
        config: damp, act_order, and its recipe's order.
    Raises:
        InputError: NaN or infinity, or a Hessian that no allowed damping makes positive definite.
    """
    _check_finite(Hessian=hessian)
    by_activity = config.act_order or config.techniques.static_order
    order = torch.argsort(nonzero_diagonal(hessian), descending=True, stable=True) if by_activity else None
    return HessianFactor(*inverse_cholesky(hessian, config.damp, order), order)


def gptq(weight: Tensor, hessian: Tensor, config: QuantConfig, factor: HessianFactor | None = None) -> Solution:
    """Quantize a layer against the inputs that its Hessian has seen.

    Args:
        weight: (N, K) float32 or float64, which is also the dtype of the arithmetic.
        hessian: (K, K), the mean of x x^T; its scale does not matter.
        config: bits, group_size, sym, act_order, damp, positive_scales, and what its recipe says.
        factor: of the same Hessian and config, where it is known already.
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
    """What GPTQ makes of a layer, under "gptq", and what the recipe's sweeps make of that, under "refined".

    Static groups (GPTQ's own code, option static_groups): grids come of the weights as they are, so that the order of
    solving need not be that of the groups, and the most active inputs come first without a g_idx to follow at run time.

    Args, Raises: as `gptq`.
    """
    group, techniques = _group_size(weight, config), config.techniques
    _check_finite(weight=weight)
    Hinv, _, order = factor
    grouped, solving = (order, None) if config.act_order else (None, order)  # the order in which groups lie together
    W = _transposed(weight, hessian, grouped)
    grids = None
    if techniques.search or techniques.static_order:
        grids = static_grids(W, remaining_error(Hinv, solving), group, config)
    codes, scales, zeros = _solve(W.clone() if solving is None else W[solving], Hinv, group, config, grids, solving)
    found = {"gptq": _quantized_weight(codes, scales, zeros, group, grouped)}
    if techniques.sweeps:
        H = hessian.to(W.dtype) if grouped is None else hessian.to(W.dtype)[grouped][:, grouped]
        refine(codes, scales, zeros, W, H, bits=config.bits, sweeps=techniques.sweeps,
               positive=config.positive_scales or not config.sym)
        found["refined"] = _quantized_weight(codes, scales, zeros, group, grouped)
    return found


def round_to_nearest(weight: Tensor, config: QuantConfig) -> Solution:
    """Quantize a layer without looking at its inputs; the error is relative to the weights (H = I).

    Args, Raises: as `gptq`.
    """
    group = _group_size(weight, config)
    _check_finite(weight=weight)
    W = weight.t()
    grids = [min_max_grid(part, config.bits, config.sym) for part in W.split(group)]
    codes = torch.cat([to_codes(part, *grid, config.bits) for part, grid in zip(W.split(group), grids, strict=True)])
    scales, zeros = (torch.stack(rows) for rows in zip(*grids, strict=True))
    quantized = _quantized_weight(codes.to(torch.uint8), scales, zeros, group, None)
    return Solution(quantized, output_error(weight, quantized, None), 0.0)


def static_grids(W: Tensor, importance: Tensor, group: int, config: QuantConfig) -> tuple[Tensor, Tensor]:
    """Scales and zeros (G, N) of the weights W (K, N) as they are, searched for where the recipe says so."""
    if config.techniques.search:
        grids = [searched_grid(part, matters, config.bits, config.sym, positive=config.positive_scales)
                 for part, matters in zip(W.split(group), importance.split(group), strict=True)]
    else:
        grids = [min_max_grid(part, config.bits, config.sym) for part in W.split(group)]
    scales, zeros = (torch.stack(rows) for rows in zip(*grids, strict=True))
    return scales, zeros


def _solve(W: Tensor, Hinv: Tensor, group: int, config: QuantConfig, grids: tuple[Tensor, Tensor] | None = None,
           order: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 on W (K, N), which is used up: codes (K, N) uint8, scales and zeros (G, N).

    Where there are no grids yet, each is that of its group's weights by the time it is reached. Codes come back from
    `order` to the order of the groups.
    """
    K, N = W.shape
    whole = group == K
    codes = torch.empty(K, N, dtype=torch.uint8, device=W.device)
    if grids is None and whole:
        grids = static_grids(W, W.new_ones(K), group, config)  # its recipe has no search, else there were some
    scales, zeros = grids or (W.new_empty(K // group, N), W.new_empty(K // group, N))
    owner = (torch.arange(K, device=W.device) if order is None else order) // group
    found = grid.kernels(W)
    solve_block = found.solve_block if found else _solve_block
    for i1 in range(0, K, BLOCK):
        i2 = min(i1 + BLOCK, K)
        Err = torch.empty_like(W[i1:i2])
        own = slice(i1 // group, i2 // group) if grids is None else owner[:1] if whole else owner[i1:i2]
        solve_block(W[i1:i2], Hinv[i1:i2, i1:i2], codes[i1:i2], Err, scales[own], zeros[own],
                    group=group if grids is None else 0, bits=config.bits, sym=config.sym)
        W[i2:].addmm_(Hinv[i1:i2, i2:].t(), Err, alpha=-1)
    check_storable(scales)
    return codes if order is None else torch.empty_like(codes).index_copy_(0, order, codes), scales, zeros


def _solve_block(W: Tensor, Hinv: Tensor, codes: Tensor, Err: Tensor, scales: Tensor, zeros: Tensor, *, group: int,
                 bits: int, sym: bool) -> None:
    """The inner loop on the block's inputs W (B, N), which are used up; arguments as of `triton_gptq.solve_block`."""
    if not group:
        scales, zeros = scales.expand_as(W), zeros.expand_as(W)
    for j1 in range(0, len(W), INNER):
        j2 = min(j1 + INNER, len(W))
        with threads(1):  # steps of microseconds: others would spend longer waiting for each other
            for i in range(j1, j2):
                own = i // group if group else i
                if group and i % group == 0:
                    scales[own], zeros[own] = min_max_grid(W[i : i + group], bits, sym)
                scale, zero = scales[own], zeros[own]
                code = to_codes(W[i], scale, zero, bits)
                codes[i] = code
                torch.sub(W[i], (code - zero).mul_(scale), out=Err[i]).div_(Hinv[i, i])
                W[i + 1 : j2].addr_(Hinv[i, i + 1 : j2], Err[i], alpha=-1)
        W[j2:].addmm_(Hinv[j1:j2, j2:].t(), Err[j1:j2], alpha=-1)


def _transposed(weight: Tensor, hessian: Tensor, order: Tensor | None) -> Tensor:
    """(K, N) of (N, K), in another order where one is given; inputs that were never active are left out of account."""
    W = weight.t().clone(memory_format=torch.contiguous_format) if order is None else weight.t()[order].contiguous()
    W[_permuted(hessian.diagonal() == 0, order)] = 0
    return W


def _permuted(vector: Tensor, order: Tensor | None) -> Tensor:
    return vector if order is None else vector[order]


def _quantized_weight(codes: Tensor, scales: Tensor, zeros: Tensor, group: int,
                      order: Tensor | None) -> QuantizedWeight:
    """Back from (K, N) in order of the groups to (N, K) in the layer's own order."""
    g_idx = torch.arange(codes.shape[0], device=codes.device) // group
    if order is not None:
        position = torch.argsort(order)
        codes, g_idx = codes[position], g_idx[position]
    return QuantizedWeight(
        codes=codes.t().contiguous(), scales=scales.t().float().clone(memory_format=torch.contiguous_format),
        zeros=zeros.t().to(torch.int32).contiguous(), g_idx=g_idx.to(torch.int32))


def _group_size(weight: Tensor, config: QuantConfig) -> int:
    K = weight.shape[1]
    group = K if config.group_size == -1 else config.group_size
    if K % group:
        raise UsageError(f"group size {group} does not divide the layer's {K} inputs",
                         "Choose 32, 64, 128 or -1 (one group for the whole row), such that it does.")
    return group


def _check_finite(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise InputError(f"the {name} holds NaN or infinity", "The source or the calibration is damaged.")
