"""The inner loops of quantizing on a GPU: 128 steps of GPTQ's walk or of coordinate descent in one Triton kernel.

Frantar et al., arXiv 2210.17323, Algorithm 1, the inner loop; `quantization/refine.py` for the descent. Outputs never
meet there: a program takes some, and holds their weights of the block, or their residuals, in registers. Operations and
their order are those of the solver in torch. No multiplication is fused with an addition, so that every float32
operation rounds as it does in NumPy and a block comes out the same to the bit wherever it is solved. (torch's `addr_`
fuses them in most places, and in some not: there a last bit may differ, and once in a great many codes a code.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # most inputs of a block
OUTPUTS = 32  # of a program: one for each thread of a warp
# Four warps share the inputs, 32 a thread. With one warp, which no sum would have to leave, ptxas spills for sm_120.
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


@triton.jit
def _rounded(x):
    """The nearest whole number, halves to even, for |x| < 2**21; larger ones are cut down, still far from any code."""
    away: tl.constexpr = 12582912.0  # 1.5 * 2**23 leaves no bits for a fraction
    return (tl.minimum(tl.maximum(x, -2097152.0), 2097152.0) + away) - away


@triton.jit
def _grid(low, high, LEVELS: tl.constexpr, SYM: tl.constexpr):
    """Scales and zeros of groups that reach from low <= 0 to high >= 0, as the solver's min_max_grid has them."""
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
    """Codes and errors of a block; tensors as in `solve_block`. GROUP = 0: scales and zeros are given, and `own` values
    lie between one input's and the next one's."""
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
    """Round the inputs of one block, each making up for those before it; the solver's own is the same in torch.

    Args:
        W: (B, N) float32, contiguous: the block's weights, inputs first, B <= 128. Left as they are.
        Hinv: (B, B) float32: the block's part of the factor, zero below its diagonal.
        codes: (B, N) uint8, contiguous. Written.
        Err: (B, N) float32, contiguous: what each input leaves to those behind the block. Written.
        scales, zeros: (B / group, N) float32, contiguous. Written; a scale that float16 cannot hold comes out
            infinite, and the codes behind it are then worthless. Where `group` is 0, they are read: (B, N), each
            input's own, or (1, N) for all.
        group: inputs a group, 32, 64 or 128; 0 where the grids are known already.
        bits: bits a code.
        sym: as for min_max_grid.
    """
    inputs, outputs = W.shape
    factor, own = Hinv.contiguous(), outputs if len(scales) > 1 else 0
    with torch.cuda.device_of(W):
        gptq_block[(triton.cdiv(outputs, OUTPUTS),)](
            W, factor, codes, Err, scales, zeros, inputs, outputs, factor.stride(0), own, GROUP=group,
            LEVELS=2**bits - 1, SYM=sym, BLOCK=BLOCK, OUTPUTS=OUTPUTS, **OPTIONS)


@triton.jit(do_not_specialize=["inputs"])
def descent_block(codes, residual, scales, zeros, hessian, diagonal, inputs, N, stride, LEVELS: tl.constexpr,
                  BLOCK: tl.constexpr, OUTPUTS: tl.constexpr):
    """Codes behind one sweep; tensors as in `descend`."""
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
    """One sweep of coordinate descent over at most 128 inputs of a group; arguments as of `refine.descend`.

    Args:
        code: (g, N) float32, contiguous, g <= 128. Changed.
        residual: (g, N) float32, contiguous. Left as it is.
        block: (g, g) float32, symmetric.
    """
    inputs, outputs = code.shape
    block = block if block.stride(1) == 1 else block.contiguous()
    with torch.cuda.device_of(code):
        descent_block[(triton.cdiv(outputs, OUTPUTS),)](
            code, residual, scale, zero, block, diagonal, inputs, outputs, block.stride(0), LEVELS=2**bits - 1,
            BLOCK=BLOCK, OUTPUTS=OUTPUTS, **OPTIONS)
