"""The kernel for few rows, M up to 64, whose time is determined by reading the weight.

The weight is the first operand of the dot ("transposed"): unpacked values stay in the registers from which the tensor
cores read, and 8 rows of x take the narrowest instruction. The sum over a run of inputs is multiplied by the run's
scale once, in float32. K may be split among programs: each writes its float32 sums to its part of a workspace, and
`triton_reduce.reduce_kernel` adds the parts in a fixed order, so the same input gives the same output, to the bit.
"""

import triton
import triton.language as tl

from .triton_unpack import load_runs, part_of_blocks, unpack, zero_points


@triton.jit(do_not_specialize=["M"])
def skinny_kernel(
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
    BM: tl.constexpr,  # rows of x of a program: 8, 16, 32 or 64
    BN: tl.constexpr,  # outputs of a program: 32, 64 or 128
    BK: tl.constexpr,  # inputs of a step: BLOCK or BLOCK / 2
    SPLIT_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """out = x @ W + bias, one tile of BM x BN per program; the sums of each run are multiplied by its scale."""
    SLICES: tl.constexpr = 16 // BITS
    STRIDE: tl.constexpr = BLOCK // SLICES  # words of a column in a block, and the length of a slice
    WIDTH: tl.constexpr = BK // SLICES  # words of a column in a step
    STEPS: tl.constexpr = BLOCK // BK
    RUNS: tl.constexpr = BLOCK // RUN
    columns = tl.cdiv(N, 128) * 128
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    i = tl.arange(0, WIDTH)
    live = m[None, :] < M
    x_at = x + m[None, :] * K + i[:, None]
    words_at = words + n[:, None] * STRIDE + i[None, :]
    first, last = part_of_blocks(K // BLOCK, split, SPLIT_K)
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
    if HAS_BIAS and SPLIT_K == 1:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    out_at = out + (split * M + m[None, :]) * N + n[:, None]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=live & (n[:, None] < N))
