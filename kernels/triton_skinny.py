"""Few rows: M up to 64, where reading the weight is what takes the time.

The weight is the first operand of the dot ("transposed"): what was unpacked stays in the registers where the tensor
cores want it, and 8 rows of x cost the narrowest instruction there is. Sums within a run of inputs meet the run's scale
in float32, once. K may be split among programs: each writes its float32 sums to a workspace of its own, which
`triton_reduce.reduce_kernel` adds in a fixed order: the same input gives the same output, to the bit.
"""

import triton
import triton.language as tl

from .triton_unpack import load_runs, part_of_blocks, unpack, zero_points


@triton.jit(do_not_specialize=["M"])
def skinny_kernel(
    x,  # (M, K) float16 or bfloat16, contiguous; inputs at their places
    words,  # (K / BLOCK, N', BLOCK * BITS / 16) int16, N' = N padded to 128
    scales,  # (K / RUN, N')
    zeros,  # (K / RUN, N') float16; not read where ZERO >= 0
    bias,  # (N,); not read unless HAS_BIAS
    out,  # (M, N) of any floating dtype where SPLIT_K is 1, else float32 (SPLIT_K, M, N)
    M,
    N,
    K,  # a multiple of BLOCK
    BITS: tl.constexpr,  # 4 or 8
    RUN: tl.constexpr,  # inputs that share a scale: 32, 64 or 128
    BLOCK: tl.constexpr,  # triton_layout.block_inputs(BITS, RUN)
    ZERO: tl.constexpr,  # the zero point of all, or -1: read them
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,  # rows of x of a program: 8, 16, 32 or 64
    BN: tl.constexpr,  # outputs of a program: 64 or 128
    BK: tl.constexpr,  # inputs of a step: BLOCK or BLOCK / 2
    SPLIT_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """out = x @ W + bias for few rows, a tile of BM x BN a program, scales put on the sums of each run."""
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
        # Scales are too narrow to be copied asynchronously: they are loaded a step before they are needed.
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
