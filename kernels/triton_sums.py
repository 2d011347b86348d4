"""The main loops of products with few rows of x: float32 sums of x @ W over a range of blocks of K.

The weight is the first operand of the dot ("transposed"): unpacked values stay in the registers from which the tensor
cores read, and 8 rows of x take the narrowest instruction. The sum over a run of inputs is multiplied by the run's
scale once, in float32.

Arguments of both functions:

    x: (M, K) float16 or bfloat16, contiguous; inputs in the order of the places of the layout
    words: (K / BLOCK, N', BLOCK * BITS / 16) int16, N' = N padded to 128
    scales: (K / RUN, N')
    zeros: (K / RUN, N') float16; read only if ZERO is -1, otherwise ZERO is the zero point of all weights
    n: (BN,) outputs; m: (BM,) rows of x, those from M on count as 0
    first, last: the first block of K, and the one after the last
    BLOCK: triton_layout.block_inputs(BITS, RUN)
"""

import triton
import triton.language as tl

from .triton_unpack import load_runs, unpack, zero_points

# The first thread requests $2 bytes at $1, both multiples of 16, for the L2 cache. Nothing waits for them.
PREFETCH = tl.constexpr("""{
.reg .pred first;
.reg .b32 thread;
mov.u32 thread, %tid.x;
setp.eq.u32 first, thread, 0;
@first cp.async.bulk.prefetch.L2.global [$1], $2;
mov.b32 $0, 0;
}""")


@triton.jit
def prefetch(words, tile, N, first, last, BITS: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr,
             BLOCKS: tl.constexpr):
    """Request the words of BLOCKS blocks of BN outputs for the L2 cache; sm_90 and newer.

    With programmatic dependent launch a program does so before it waits for the kernel before it, which writes x and no
    weights.
    """
    STRIDE: tl.constexpr = BLOCK * BITS // 16
    columns = tl.cdiv(N, 128) * 128
    for i in tl.static_range(BLOCKS):
        at = words + (tl.minimum(first + i, last - 1) * columns + tile * BN) * STRIDE
        tl.inline_asm_elementwise(PREFETCH, "=r,l,r", [at.to(tl.int64), BN * STRIDE * 2], dtype=tl.int32,
                                  is_pure=False, pack=1)


@triton.jit
def block_sums(x, words, scales, zeros, n, m, M, N, K, first, last, BITS: tl.constexpr, RUN: tl.constexpr,
               BLOCK: tl.constexpr, ZERO: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
               ASM: tl.constexpr):
    """Sums (BN, BM) float32; all warps process the same BK inputs (BLOCK or BLOCK / 2) at a time."""
    SLICES: tl.constexpr = 16 // BITS
    STRIDE: tl.constexpr = BLOCK // SLICES  # words of a column in a block, and the length of a slice
    WIDTH: tl.constexpr = BK // SLICES  # words of a column in a step
    STEPS: tl.constexpr = BLOCK // BK
    RUNS: tl.constexpr = BLOCK // RUN
    columns = tl.cdiv(N, 128) * 128
    i = tl.arange(0, WIDTH)
    live = m[None, :] < M
    x_at = x + m[None, :] * K + i[:, None]
    words_at = words + n[:, None] * STRIDE + i[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    scales_at = scales + n
    ahead = load_runs(scales_at + first * RUNS * columns, columns, RUNS)
    for step in range(first * STEPS, last * STEPS):
        block = step // STEPS
        # Scales are too narrow to be copied asynchronously, so they are loaded one step before they are needed.
        scale = ahead
        following = tl.minimum((step + 1) // STEPS, last - 1)
        ahead = load_runs(scales_at + following * RUNS * columns, columns, RUNS)
        part = step % STEPS * WIDTH
        w = tl.load(words_at + block * columns * STRIDE + part, eviction_policy="evict_first")
        for run in tl.static_range(RUNS):
            row = (block * RUNS + run) * columns + n
            zero = zero_points(zeros, row, ZERO)[:, None]
            slices = unpack(w, zero, BITS, x.dtype.element_ty, ASM)
            total = tl.zeros((BN, BM), tl.float32)
            for place in tl.static_range(run * SLICES // RUNS, (run + 1) * SLICES // RUNS):
                rows = tl.load(x_at + block * BLOCK + place * STRIDE + part, mask=live, other=0.0)
                total = tl.dot(slices[place], rows, total)
            acc += total * scale[run].to(tl.float32)[:, None]
    return acc


@triton.jit
def warp_sums(x, words, scales, zeros, n, m, M, N, K, first, last, BITS: tl.constexpr, RUN: tl.constexpr,
              BLOCK: tl.constexpr, ZERO: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, K_WARPS: tl.constexpr,
              ASM: tl.constexpr):
    """`block_sums`, K_WARPS blocks at a time, each by other warps, whose sums are added at the end.

    A dot with three axes distributes the warps along the first one. K is then shared within a program, without a
    workspace, and such a dot is never compiled to WGMMA, which takes 3.1 instead of 2.0 instructions per weight here.
    """
    SLICES: tl.constexpr = 16 // BITS
    STRIDE: tl.constexpr = BLOCK // SLICES
    RUNS: tl.constexpr = BLOCK // RUN
    columns = tl.cdiv(N, 128) * 128
    i, warp = tl.arange(0, STRIDE), tl.arange(0, K_WARPS)
    x_at = x + m[None, None, :] * K + i[None, :, None]
    words_at = words + n[None, :, None] * STRIDE + i[None, None, :]
    scales_at = scales + n[None, :]
    acc = tl.zeros((K_WARPS, BN, BM), tl.float32)
    ahead = load_runs(scales_at + (tl.minimum(first + warp, last - 1) * RUNS * columns)[:, None], columns, RUNS)
    for start in range(first, last, K_WARPS):
        live = (start + warp < last)[:, None, None] & (m < M)[None, None, :]  # x is 0 after the last block
        block = tl.minimum(start + warp, last - 1)
        scale = ahead
        following = tl.minimum(start + K_WARPS + warp, last - 1)
        ahead = load_runs(scales_at + (following * RUNS * columns)[:, None], columns, RUNS)
        w = tl.load(words_at + (block * columns * STRIDE)[:, None, None], eviction_policy="evict_first")
        for run in tl.static_range(RUNS):
            row = (block * RUNS + run)[:, None] * columns + n[None, :]
            slices = unpack(w, zero_points(zeros, row, ZERO)[:, :, None], BITS, x.dtype.element_ty, ASM)
            total = tl.zeros((K_WARPS, BN, BM), tl.float32)
            for place in tl.static_range(run * SLICES // RUNS, (run + 1) * SLICES // RUNS):
                rows = tl.load(x_at + (block * BLOCK)[:, None, None] + place * STRIDE, mask=live, other=0.0)
                total = tl.dot(slices[place], rows, total)
            acc += total * scale[run].to(tl.float32)[:, :, None]
    return tl.sum(acc, 0)
