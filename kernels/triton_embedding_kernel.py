"""The first launch of a decode step: token ids to the residual stream, and what the first norm needs of it.

Embeddings are read from the packed matrix that the lm_head shares, or from a dense table. BLOOM normalizes them.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def embedding_kernel(
    tokens,  # (M,) int32
    words,  # (WIDTH / BLOCK, columns, BLOCK * BITS / 16) int16, or if BITS is 16 the table (columns, WIDTH)
    scales,  # (WIDTH / RUN, columns); None for a table
    zeros,  # (WIDTH / RUN, columns) float16, or None if ZERO is the zero point of all
    norm_weight,  # (WIDTH,), or None without a norm of the embeddings
    norm_bias,  # (WIDTH,)
    eps,
    out,  # (M, WIDTH), the stream, written; Triton reserves the name "stream"
    gamma,  # (WIDTH,): the fields of NextNorm
    places,  # (WIDTH,) int32, or None
    x,  # (M, row)
    moments,  # (2, tiles, M) float32
    columns,
    row,
    BITS: tl.constexpr,  # 4, 8, or 16 for a table
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
    ZERO: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per row."""
    TILES: tl.constexpr = (WIDTH + TILE - 1) // TILE
    m, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    tile = tl.arange(0, triton.next_power_of_2(TILES))
    at = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    live = at < WIDTH
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.load(tokens + m).to(tl.int64)
    value = _look_up(words, scales, zeros, token, at, live, columns, BITS, RUN, BLOCK, ZERO, WIDTH)
    if norm_weight is not None:
        value = value.to(out.dtype.element_ty).to(tl.float32)
        difference = tl.where(live, value - tl.sum(value) / WIDTH, 0.0)
        factor = tl.rsqrt(tl.sum(difference * difference) / WIDTH + eps)
        value = difference * factor * tl.load(norm_weight + at, mask=live, other=0.0).to(tl.float32)
        value += tl.load(norm_bias + at, mask=live, other=0.0).to(tl.float32)
    rounded = value.to(out.dtype.element_ty)
    tl.store(out + m * WIDTH + at, rounded, mask=live)
    exact = rounded.to(tl.float32)
    to = at
    if places is not None:
        to = tl.load(places + at, mask=live, other=0)
    scaled = exact * tl.load(gamma + at, mask=live, other=0.0).to(tl.float32)
    tl.store(x + m * row + to, scaled.to(x.dtype.element_ty), mask=live)
    total = tl.sum(exact, 1)
    count = tl.maximum(tl.minimum(WIDTH - tile * TILE, TILE), 1).to(tl.float32)
    difference = tl.where(live, exact - (total / count)[:, None], 0.0)
    tl.store(moments + tile * rows + m, total, mask=tile < TILES)
    tl.store(moments + (TILES + tile) * rows + m, tl.sum(difference * difference, 1), mask=tile < TILES)


@triton.jit
def _look_up(words, scales, zeros, token, at, live, columns, BITS: tl.constexpr, RUN: tl.constexpr,
             BLOCK: tl.constexpr, ZERO: tl.constexpr, WIDTH: tl.constexpr):
    """Columns `at` of the embedding of a token, float32, 0 where not live."""
    if BITS == 16:
        return tl.load(words + token * WIDTH + at, mask=live, other=0.0).to(tl.float32)
    else:
        STRIDE: tl.constexpr = BLOCK * BITS // 16  # words of a block, and the length of a slice of its codes
        within = at % BLOCK
        word = tl.load(words + (at // BLOCK * columns + token) * STRIDE + within % STRIDE, mask=live, other=0)
        code = (word.to(tl.int32) >> within // STRIDE * BITS) & (2**BITS - 1)
        group = at // RUN * columns + token
        zero = ZERO
        if zeros is not None:
            zero = tl.load(zeros + group, mask=live, other=0.0).to(tl.float32)
        return (code.to(tl.float32) - zero) * tl.load(scales + group, mask=live, other=0.0).to(tl.float32)
