"""Expand some outputs of the weight into a scratch for cuBLAS, which is fastest with very many rows."""

import triton
import triton.language as tl

from .triton_unpack import unpack, zero_points


@triton.jit
def dequant_kernel(
    words,  # (K / BLOCK, N', BLOCK * BITS / 16) int16, N' = N padded to 128
    scales,  # (K / RUN, N')
    zeros,  # (K / RUN, N') float16; read only if ZERO < 0
    out,  # (outputs, K) float16, bfloat16 or float32: the weight of outputs start, start + 1, ...
    start,  # a multiple of BN
    N,
    K,  # a multiple of BLOCK
    BITS: tl.constexpr,  # 4 or 8
    RUN: tl.constexpr,  # inputs that share a scale: 32, 64 or 128
    BLOCK: tl.constexpr,  # triton_layout.block_inputs(BITS, RUN)
    ZERO: tl.constexpr,  # the zero point of all weights, or -1 if they are read from zeros
    BN: tl.constexpr,  # outputs of a program; the first axis of the grid covers them, the second the blocks of K
    ASM: tl.constexpr,
):
    """The weight, computed in float32 and rounded once to out's dtype; equal to `reference.dequantize` to the bit."""
    SLICES: tl.constexpr = 16 // BITS
    STRIDE: tl.constexpr = BLOCK // SLICES  # words of a column in a block, and the length of a slice
    RUNS: tl.constexpr = BLOCK // RUN
    columns = tl.cdiv(N, 128) * 128
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    n = start + row
    block = tl.program_id(1)
    i = tl.arange(0, STRIDE)
    w = tl.load(words + block * columns * STRIDE + n[:, None] * STRIDE + i[None, :])
    out_at = out + row.to(tl.int64)[:, None] * K + block * BLOCK + i[None, :]
    for run in tl.static_range(RUNS):
        at = (block * RUNS + run) * columns + n
        scale = tl.load(scales + at).to(tl.float32)[:, None]
        zero = zero_points(zeros, at, ZERO)[:, None]
        slices = unpack(w, zero, BITS, tl.float16, ASM)
        for place in tl.static_range(run * SLICES // RUNS, (run + 1) * SLICES // RUNS):
            value = slices[place].to(tl.float32) * scale
            tl.store(out_at + place * STRIDE, value.to(out.dtype.element_ty))
