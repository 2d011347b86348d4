"""GPTQ: round a layer's weights one input at a time, and let the inputs not yet rounded make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323,
Algorithm 1, in its names: W, H, Hinv (its upper Cholesky factor), Err, i1, i2. Inside, W is kept transposed, (K, N):
a step touches one input, and its N weights are then contiguous.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.checkpoint.packing import ROWS_AT_A_TIME, QuantizedWeight, all_finite, dequantize
from gptq_belle.config import QuantConfig
from gptq_belle.errors import InputError, UsageError
from gptq_belle.kernels import triton_matmul
from gptq_belle.quantization.grid import check_storable, min_max_grid, to_codes
from gptq_belle.quantization.hessian import inverse_factor, live_diagonal
from gptq_belle.quantization.threads import threads

BLOCK = 128  # inputs a lazy block (GPTQ, section 3.3, step 2); every grouped size divides it
INNER = 32  # inputs a lazy block inside of that, so that a step touches what the cache holds; divides every group size
COLUMNS_AT_A_TIME = 512


class Solution(NamedTuple):
    """A quantized layer and what it cost."""

    weight: QuantizedWeight
    error: float  # squared error of the layer's output as a share of the output's square
    damp: float  # the damping that made the Hessian positive definite; 0 where there was none


class Factor(NamedTuple):
    """What layers that see the same inputs share: the factor of the inverse Hessian, and the order of solving."""

    upper: Tensor  # (K, K), Hinv in the order of solving
    damp: float
    order: Tensor | None  # (K,) int64; None for the layer's own


def factorize(hessian: Tensor, config: QuantConfig) -> Factor:
    """The part of the work that depends on the inputs only.

    Args:
        hessian: (K, K) float32 or float64, the mean of x x^T.
        config: damp, act_order.
    Raises:
        InputError: NaN or infinity, or a Hessian that no allowed damping makes positive definite.
    """
    _check_finite(Hessian=hessian)
    order = torch.argsort(live_diagonal(hessian), descending=True, stable=True) if config.act_order else None
    return Factor(*inverse_factor(hessian, config.damp, order), order)


def gptq(weight: Tensor, hessian: Tensor, config: QuantConfig, factor: Factor | None = None) -> Solution:
    """Quantize a layer against the inputs that its Hessian has seen.

    Args:
        weight: (N, K) float32 or float64, which is also the dtype of the arithmetic.
        hessian: (K, K), the mean of x x^T; its scale does not matter.
        config: bits, group_size, sym, act_order, damp.
        factor: of the same Hessian and config, where it is known already.
    Returns:
        The solution; its error is tr(D H D^T) / tr(W H W^T) with D = W - Q and H undamped.
    Raises:
        InputError: NaN or infinity in an argument, or a Hessian that no allowed damping makes positive definite.
        UsageError: group_size does not divide K.
    """
    group = _group_size(weight, config)
    _check_finite(weight=weight)
    Hinv, damp, order = factorize(hessian.to(weight.dtype), config) if factor is None else factor
    W = weight.t().clone(memory_format=torch.contiguous_format) if order is None else weight.t()[order].contiguous()
    dead = hessian.diagonal() == 0
    W[dead if order is None else dead[order]] = 0
    codes, scales, zeros = _solve(W, Hinv, group, config)
    del W
    quantized = _finish(codes, scales, zeros, group, order)
    return Solution(quantized, _output_error(weight, quantized, hessian), damp)


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
    quantized = _finish(codes.to(torch.uint8), scales, zeros, group, None)
    return Solution(quantized, _output_error(weight, quantized, None), 0.0)


def _solve(W: Tensor, Hinv: Tensor, group: int, config: QuantConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 on W (K, N), which is used up: codes (K, N) uint8, scales and zeros (G, N)."""
    K, N = W.shape
    whole = group == K
    codes = torch.empty(K, N, dtype=torch.uint8, device=W.device)
    scales = W.new_empty(K // group, N)
    zeros = torch.empty_like(scales)
    if whole:
        scales[0], zeros[0] = min_max_grid(W, config.bits, config.sym)
    solve_block = _block_solver(W)
    for i1 in range(0, K, BLOCK):
        i2 = min(i1 + BLOCK, K)
        Err = torch.empty_like(W[i1:i2])
        groups = slice(None) if whole else slice(i1 // group, i2 // group)
        solve_block(W[i1:i2], Hinv[i1:i2, i1:i2], codes[i1:i2], Err, scales[groups], zeros[groups],
                    group=0 if whole else group, bits=config.bits, sym=config.sym)
        W[i2:].addmm_(Hinv[i1:i2, i2:].t(), Err, alpha=-1)
    check_storable(scales)
    return codes, scales, zeros


def _block_solver(W: Tensor) -> Callable[..., None]:
    """What walks through a block: one kernel where Triton serves, else torch, a few operations a step."""
    if not W.is_cuda or W.dtype != torch.float32 or triton_matmul.unavailable(W.device):
        return _solve_block
    from gptq_belle.kernels import triton_gptq

    return triton_gptq.solve_block


def _solve_block(W: Tensor, Hinv: Tensor, codes: Tensor, Err: Tensor, scales: Tensor, zeros: Tensor, *, group: int,
                 bits: int, sym: bool) -> None:
    """The inner loop on the block's inputs W (B, N), which are used up; arguments as of `triton_gptq.solve_block`."""
    for j1 in range(0, len(W), INNER):
        j2 = min(j1 + INNER, len(W))
        with threads(1):  # steps of microseconds: others would spend longer waiting for each other
            for i in range(j1, j2):
                own = i // group if group else 0
                if group and i % group == 0:
                    scales[own], zeros[own] = min_max_grid(W[i : i + group], bits, sym)
                scale, zero = scales[own], zeros[own]
                code = to_codes(W[i], scale, zero, bits)
                codes[i] = code
                torch.sub(W[i], (code - zero).mul_(scale), out=Err[i]).div_(Hinv[i, i])
                W[i + 1 : j2].addr_(Hinv[i, i + 1 : j2], Err[i], alpha=-1)
        W[j2:].addmm_(Hinv[j1:j2, j2:].t(), Err[j1:j2], alpha=-1)


def _finish(codes: Tensor, scales: Tensor, zeros: Tensor, group: int, order: Tensor | None) -> QuantizedWeight:
    """Back from (K, N) in order of solving to (N, K) in the layer's own order."""
    g_idx = torch.arange(codes.shape[0], device=codes.device) // group
    if order is not None:
        position = torch.argsort(order)
        codes, g_idx = codes[position], g_idx[position]
    return QuantizedWeight(
        codes=codes.t().contiguous(), scales=scales.t().float().contiguous(),
        zeros=zeros.t().to(torch.int32).contiguous(), g_idx=g_idx.to(torch.int32))


def _output_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor | None) -> float:
    """tr(D H D^T) / tr(W H W^T), D = W - Q; H = I where there is none. Summed over some rows at a time."""
    if hessian is not None:
        hessian = hessian.to(weight.dtype)
    whole = lost = 0.0
    for start in range(0, weight.shape[0], ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        codes, scales, zeros = (tensor[part] for tensor in quantized[:3])
        lost += _energy(weight[part] - dequantize(QuantizedWeight(codes, scales, zeros, quantized.g_idx)), hessian)
        whole += _energy(weight[part], hessian)
    return max(0.0, lost) / whole if whole > 0 else 0.0


def _energy(matrix: Tensor, hessian: Tensor | None) -> float:
    """tr(M H M^T), of whose two equal triangles one is computed."""
    if hessian is None:
        return float(torch.sum(matrix * matrix, dtype=torch.float64))
    total, K = 0.0, matrix.shape[1]
    for k1 in range(0, K, COLUMNS_AT_A_TIME):
        k2 = min(k1 + COLUMNS_AT_A_TIME, K)
        image = (matrix[:, k1:k2] @ hessian[k1:k2, k1:]).mul_(matrix[:, k1:])
        total += 2 * float(image.sum(dtype=torch.float64)) - float(image[:, : k2 - k1].sum(dtype=torch.float64))
    return total


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
