"""The inner loops of quantization on a GPU: 128 steps of GPTQ or of coordinate descent in one Triton kernel.

Frantar et al., arXiv 2210.17323, Algorithm 1, the inner loop; `quantization/refine.py` for coordinate descent. Outputs
are independent of each other: a program holds the weights of some outputs in the block, or their residuals, in
registers. Operations and their order are those of the solver in torch. No multiplication is fused with an addition, so
every float32 operation rounds as in NumPy, and a block has the same result, to the bit, on every device. (torch's
`addr_` fuses in most positions but not in all: there the last bit may differ, and very rarely a code.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_config import check_offsets

BLOCK = 128  # most inputs of a block
OUTPUTS = 32  # of a program: one for each thread of a warp
# Four warps share the inputs, 32 per thread. With one warp no sum would cross warps, but ptxas spills for sm_120.
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


@triton.jit
def _rounded(x):
    """The nearest integer, halves to even, for |x| < 2**21; larger ones are clamped, still far from any code."""
    away: tl.constexpr = 12582912.0  # 1.5 * 2**23 leaves no bits for a fraction
    return (tl.minimum(tl.maximum(x, -2097152.0), 2097152.0) + away) - away


@triton.jit
def _grid(low, high, LEVELS: tl.constexpr, SYM: tl.constexpr):
    """Scales and zero points of groups with the range low <= 0 to high >= 0, computed as in min_max_grid."""
    levels = tl.full(low.shape, LEVELS, tl.float32)
    span = tl.maximum(-low, high) * 2 if SYM else high - low
    scale = tl.math.div_rn(span, levels)
    scale = scale.to(tl.float16).to(tl.float32)  # what the file will hold
    scale = tl.where(scale < 1e-7, 1.0, scale)  # a group of zeros
    if SYM:
        zero = tl.full(low.shape, (LEVELS + 1) // 2, tl.float32)
    else:
        zero = tl.minimum(tl.maximum(_rounded(tl.math.div_rn(-low, scale)), 0.0), levels)
    return scale, zero


@triton.jit(do_not_specialize=["inputs", "own"])
def gptq_block(weight, factor, codes, errors, scales, zeros, inputs, N, stride, own, GROUP: tl.constexpr,
               LEVELS: tl.constexpr, SYM: tl.constexpr, BLOCK: tl.constexpr, OUTPUTS: tl.constexpr):
    """Codes and errors of a block; tensors as in `solve_block`. With GROUP = 0 scales and zeros are read, and the rows
    of consecutive inputs are `own` values apart."""
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, BLOCK)
    live = n < N
    w = tl.load(weight + row[:, None] * N + n[None, :], mask=(row[:, None] < inputs) & live[None, :], other=0.0)
    STEP: tl.constexpr = GROUP if GROUP else BLOCK
    for first in range(0, inputs, STEP):
        if GROUP:
            group = tl.where((row[:, None] >= first) & (row[:, None] < first + GROUP), w, 0.0)
            low, high = tl.minimum(tl.min(group, 0), 0.0), tl.maximum(tl.max(group, 0), 0.0)
            scale, zero = _grid(low, high, LEVELS, SYM)
            tl.store(scales + first // GROUP * N + n, scale, mask=live)
            tl.store(zeros + first // GROUP * N + n, zero, mask=live)
        for i in range(first, min(first + STEP, inputs)):
            if GROUP == 0:
                scale = tl.load(scales + i * own + n, mask=live, other=1.0)
                zero = tl.load(zeros + i * own + n, mask=live, other=0.0)
            column = tl.sum(tl.where(row[:, None] == i, w, 0.0), 0)
            code = tl.minimum(tl.maximum(_rounded(tl.math.div_rn(column, scale)) + zero, 0.0), LEVELS * 1.0)
            tl.store(codes + i * N + n, code.to(tl.uint8), mask=live)
            pivot = tl.load(factor + i * stride + i)
            error = tl.math.div_rn(column - (code - zero) * scale, tl.zeros_like(column) + pivot)
            tl.store(errors + i * N + n, error, mask=live)
            coefficient = tl.load(factor + i * stride + row, mask=row < inputs, other=0.0)  # 0 before the pivot
            w -= coefficient[:, None] * error[None, :]


def solve_block(W: Tensor, Hinv: Tensor, codes: Tensor, Err: Tensor, scales: Tensor, zeros: Tensor, *, group: int,
                bits: int, sym: bool) -> None:
    """Round the inputs of one block in order, each compensating the errors of those before it.

    Args:
        W: (B, N) float32, contiguous: the block's weights, inputs first, B <= 128. Not changed.
        Hinv: (B, B) float32: the block's part of the factor, zero below its diagonal.
        codes: (B, N) uint8, contiguous. Written.
        Err: (B, N) float32, contiguous: the error of each input that later blocks compensate. Written.
        scales, zeros: (B / group, N) float32, contiguous. Written; a scale that float16 cannot hold comes out
            infinite, and the codes after it are then worthless. With `group` 0 they are read: (B, N), one row per
            input, or (1, N) for all inputs.
        group: inputs per group, 32, 64 or 128; 0 if scales and zeros are given.
        bits: bits per code.
        sym: as for min_max_grid.
    """
    inputs, outputs = W.shape
    check_offsets(W=W.numel())
    factor, own = Hinv.contiguous(), outputs if len(scales) > 1 else 0
    with torch.cuda.device_of(W):
        gptq_block[(triton.cdiv(outputs, OUTPUTS),)](
            W, factor, codes, Err, scales, zeros, inputs, outputs, factor.stride(0), own, GROUP=group,
            LEVELS=2**bits - 1, SYM=sym, BLOCK=BLOCK, OUTPUTS=OUTPUTS, **OPTIONS)


@triton.jit(do_not_specialize=["inputs"])
def descent_block(codes, residual, scales, zeros, hessian, diagonal, inputs, N, stride, LEVELS: tl.constexpr,
                  BLOCK: tl.constexpr, OUTPUTS: tl.constexpr):
    """Codes after one sweep; tensors as in `descend`."""
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, BLOCK)
    live = n < N
    rest = tl.load(residual + row[:, None] * N + n[None, :], mask=(row[:, None] < inputs) & live[None, :], other=0.0)
    scale = tl.load(scales + n, mask=live, other=1.0)
    zero = tl.load(zeros + n, mask=live, other=0.0)
    for i in range(0, inputs):
        code = tl.load(codes + i * N + n, mask=live, other=0.0)
        slope = tl.sum(tl.where(row[:, None] == i, rest, 0.0), 0)
        wanted = _rounded(code - tl.math.div_rn(slope, scale * tl.load(diagonal + i)))
        found = tl.minimum(tl.maximum(wanted, -zero), LEVELS - zero)
        tl.store(codes + i * N + n, found, mask=live)
        own = tl.load(hessian + i * stride + row, mask=row < inputs, other=0.0)
        rest += own[:, None] * ((found - code) * scale)[None, :]


def descend(code: Tensor, scale: Tensor, zero: Tensor, residual: Tensor, block: Tensor, diagonal: Tensor,
            bits: int) -> None:
    """One sweep of coordinate descent over at most 128 inputs of a group; arguments as in `refine.descend`.

    Args:
        code: (g, N) float32, contiguous, g <= 128. Changed.
        residual: (g, N) float32, contiguous. Not changed.
        block: (g, g) float32, symmetric.
    """
    inputs, outputs = code.shape
    check_offsets(code=code.numel())
    block = block if block.stride(1) == 1 else block.contiguous()
    with torch.cuda.device_of(code):
        descent_block[(triton.cdiv(outputs, OUTPUTS),)](
            code, residual, scale, zero, block, diagonal, inputs, outputs, block.stride(0), LEVELS=2**bits - 1,
            BLOCK=BLOCK, OUTPUTS=OUTPUTS, **OPTIONS)
