"""The kernel for many rows, M of 65 or more, whose time is determined by the tensor cores.

The weight is the first operand of the dot here too, so that every value is unpacked in registers once for all rows of a
tile and never written to shared memory. The weight is multiplied by its scale in x's dtype, as in expanding it, and the
sums over all of K are float32 accumulators. Programs are ordered so that those that run at the same time share words
and rows of x in the L2 cache.
"""

import triton
import triton.language as tl

from .triton_unpack import part_of_blocks, unpack, zero_points


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x,  # (M, K) float16 or bfloat16, contiguous; inputs in the order of the places of the layout
    words,  # (K / BLOCK, N', BLOCK * BITS / 16) int16, N' = N padded to 128
    scales,  # (K / RUN, N')
    zeros,  # (K / RUN, N') float16; read only if ZERO < 0
    bias,  # (N,); read only if HAS_BIAS
    out,  # (M, N) of any floating dtype if SPLIT_K is 1, else (SPLIT_K, M, N) float32
    M,
    N,
    K,  # a multiple of BLOCK
    BITS: tl.constexpr,  # 4 or 8
    RUN: tl.constexpr,  # inputs that share a scale: 32, 64 or 128
    BLOCK: tl.constexpr,  # triton_layout.block_inputs(BITS, RUN)
    ZERO: tl.constexpr,  # the zero point of all weights, or -1 if they are read from zeros
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,  # rows of x of a program: 64 or 128
    BN: tl.constexpr,  # outputs of a program: 32, 64 or 128
    BK: tl.constexpr,  # inputs of a step: BLOCK or BLOCK / 2
    SPLIT_K: tl.constexpr,
    SWIZZLE: tl.constexpr,  # tiles of rows that are processed together
    ASM: tl.constexpr,
):
    """out = x @ W + bias, one tile of BM x BN per program; the weight is expanded in registers step by step."""
    SLICES: tl.constexpr = 16 // BITS
    STRIDE: tl.constexpr = BLOCK // SLICES  # words of a column in a block, and the length of a slice
    WIDTH: tl.constexpr = BK // SLICES  # words of a column in a step
    STEPS: tl.constexpr = BLOCK // BK
    RUNS: tl.constexpr = BLOCK // RUN
    columns = tl.cdiv(N, 128) * 128
    tile_n, tile_m = _swizzled(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(M, BM), SWIZZLE)
    n = tile_n * BN + tl.arange(0, BN)
    m = tile_m * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    i = tl.arange(0, WIDTH)
    live = m[None, :] < M
    x_at = x + m.to(tl.int64)[None, :] * K + i[:, None]
    words_at = words + n[:, None] * STRIDE + i[None, :]
    first, last = part_of_blocks(K // BLOCK, split, SPLIT_K)
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(first * STEPS, last * STEPS):
        block = step // STEPS
        part = step % STEPS * WIDTH
        w = tl.load(words_at + block * columns * STRIDE + part)
        for run in tl.static_range(RUNS):
            row = (block * RUNS + run) * columns + n
            scale = tl.load(scales + row).to(x.dtype.element_ty)[:, None]
            zero = zero_points(zeros, row, ZERO)[:, None]
            slices = unpack(w, zero, BITS, x.dtype.element_ty, ASM)
            for place in tl.static_range(run * SLICES // RUNS, (run + 1) * SLICES // RUNS):
                rows = tl.load(x_at + block * BLOCK + place * STRIDE + part, mask=live, other=0.0)
                acc = tl.dot(slices[place] * scale, rows, acc)
    if HAS_BIAS and SPLIT_K == 1:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    out_at = out + (split * M + m[None, :]).to(tl.int64) * N + n[:, None]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=live & (n[:, None] < N))


@triton.jit
def _swizzled(program, tiles_n, tiles_m, SWIZZLE: tl.constexpr):
    """The tile of a program: SWIZZLE tiles of rows come with one tile of outputs before the next tile of outputs."""
    strip = program // (SWIZZLE * tiles_n)
    start = strip * SWIZZLE
    height = tl.minimum(tiles_m - start, SWIZZLE)
    within = program % (SWIZZLE * tiles_n)
    return within // height, start + within % height
