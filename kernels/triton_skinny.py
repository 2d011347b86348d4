"""The kernel for few rows, M up to 64, whose time is determined by reading the weight.

    out = activation(norm(x) @ W + bias) + residual

K may be split among programs. Each writes its float32 sums to a workspace, and the program that finishes last adds
those of all, in the order of the parts: the same input gives the same output, to the bit, whichever program is the
last. It sets the tile's ticket back to 0, so nothing has to be cleared between launches or replays of a graph.

The norm before the product and the one after it are folded in as `triton_norm` describes.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_norm import apply_norm, store_for_norm
from .triton_sums import block_sums, prefetch, warp_sums
from .triton_unpack import part_of_blocks


@triton.jit(do_not_specialize=["M"])
def skinny_kernel(
    x,  # (M, K) float16 or bfloat16, contiguous; inputs in the order of the places of the layout
    words,  # (K / BLOCK, N', BLOCK * BITS / 16) int16, N' = N padded to 128
    scales,  # (K / RUN, N')
    zeros,  # (K / RUN, N') float16; read only if ZERO < 0
    bias,  # (N,), or None
    residual,  # (M, N) in out's dtype, or None; may be out
    out,  # (M, out_row) of any floating dtype
    out_places,  # (outputs,) int32: the column of each output in out; None: the same one
    sums,  # (parts, M, N) float32 workspace, contents undefined; None if K is not split
    tickets,  # (tiles,) int32, all 0 before and after; None if K is not split
    moments,  # of the norm before: see triton_norm; None without one
    gamma_product,
    eps,
    next_gamma,  # of the norm after: see triton_norm; None without one
    next_places,
    next_x,
    next_moments,
    M,
    N,
    K,  # a multiple of BLOCK
    out_row,
    next_row,
    BITS: tl.constexpr,  # 4 or 8
    RUN: tl.constexpr,  # inputs that share a scale: 32, 64 or 128
    BLOCK: tl.constexpr,  # triton_layout.block_inputs(BITS, RUN)
    ZERO: tl.constexpr,  # the zero point of all weights, or -1 if they are read from zeros
    ACTIVATION: tl.constexpr,  # "none", "gelu", or "silu_mul", which halves the number of outputs
    WIDTH: tl.constexpr,  # of the norm before: columns of the stream, and of a tile of its moments
    TILE: tl.constexpr,
    BM: tl.constexpr,  # rows of x of a program: 8, 16, 32 or 64
    BN: tl.constexpr,  # outputs of a program: 32, 64 or 128
    BK: tl.constexpr,  # inputs of a step: BLOCK or BLOCK / 2; only if K_WARPS is 1
    K_WARPS: tl.constexpr,  # blocks of K processed at a time by different warps; 1: all warps process the same one
    SPLIT: tl.constexpr,  # whether K is split among the programs of the third axis
    ASM: tl.constexpr,
    PDL: tl.constexpr,  # programmatic dependent launch, for compute capability 9.0 and newer
):
    """One tile of BM x BN per program, or a part of its sums."""
    tile = tl.program_id(0)
    n = tile * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part, parts = tl.program_id(2), tl.num_programs(2)
    first, last = part_of_blocks(K // BLOCK, part, parts)
    if PDL:
        gdc_launch_dependents()
        prefetch(words, tile, N, first, last, BITS, BLOCK, BN, 4 if K_WARPS < 4 else K_WARPS)
        gdc_wait()
    if K_WARPS == 1:
        acc = block_sums(x, words, scales, zeros, n, m, M, N, K, first, last, BITS, RUN, BLOCK, ZERO, BM, BN, BK, ASM)
    else:
        acc = warp_sums(x, words, scales, zeros, n, m, M, N, K, first, last, BITS, RUN, BLOCK, ZERO, BM, BN, K_WARPS,
                        ASM)
    live = (m[None, :] < M) & (n[:, None] < N)
    if not SPLIT:
        _finish(acc, live, n, m, tile, bias, residual, out, out_places, moments, gamma_product, eps, next_gamma,
                next_places, next_x, next_moments, M, N, out_row, next_row, ACTIVATION, WIDTH, TILE, BM, BN)
    else:
        at = m[None, :] * N + n[:, None]
        tl.store(sums + part * M * N + at, acc, mask=live)
        tl.debug_barrier()  # all threads have stored before one of them takes the ticket
        ticket = tickets + tl.program_id(1) * tl.num_programs(0) + tile
        if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == parts - 1:
            total = _added_parts(sums + at, live, M * N, parts, BM, BN)
            _finish(total, live, n, m, tile, bias, residual, out, out_places, moments, gamma_product, eps, next_gamma,
                    next_places, next_x, next_moments, M, N, out_row, next_row, ACTIVATION, WIDTH, TILE, BM, BN)
            tl.store(ticket, 0)


@triton.jit
def _added_parts(at, live, stride, parts, BM: tl.constexpr, BN: tl.constexpr):
    """The sum (BN, BM) over all parts in their order; read from the L2 cache, where other programs have stored."""
    TOGETHER: tl.constexpr = 4 if BM < 16 else 2  # loads in flight; more of them spill with many rows
    total = tl.zeros((BN, BM), tl.float32)
    for some in range(0, parts, TOGETHER):
        for more in tl.static_range(TOGETHER):
            valid = live & (tl.full((BN, 1), some + more, tl.int32) < parts)
            total += tl.load(at + (some + more) * stride, mask=valid, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _finish(acc, live, n, m, tile, bias, residual, out, out_places, moments, gamma_product, eps, next_gamma,
            next_places, next_x, next_moments, M, N, out_row, next_row, ACTIVATION: tl.constexpr, WIDTH: tl.constexpr,
            TILE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Everything after the sums acc (BN, BM)."""
    acc = apply_norm(acc, moments, gamma_product, eps, n, m, M, N, WIDTH, TILE)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION == "silu_mul":
        # Of 16 rows the first 8 are gates of the others (`interleave_gates`): one thread holds both.
        pairs = tl.permute(tl.reshape(acc, (BN // 16, 2, 8, BM)), (0, 2, 3, 1))
        gate, up = tl.split(pairs)
        value = tl.reshape(gate * tl.sigmoid(gate) * up, (BN // 2, BM))
        n = tile * (BN // 2) + tl.arange(0, BN // 2)
        _store(value, (m[None, :] < M) & (n[:, None] < N // 2), n, m, N // 2, out, out_places, out_row)
    else:
        if ACTIVATION == "gelu":  # x / 2 (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
            acc *= tl.sigmoid(1.5957691216057308 * (acc + 0.044715 * acc * acc * acc))
        if residual is not None:
            acc += tl.load(residual + m[None, :] * N + n[:, None], mask=live, other=0.0).to(tl.float32)
        _store(acc, live, n, m, N, out, out_places, out_row)
        if next_x is not None:
            store_for_norm(acc.to(out.dtype.element_ty), live, n, m, tile, tl.num_programs(0), next_gamma, next_places,
                           next_x, next_moments, M, N, next_row, BN)


@triton.jit
def _store(value, live, n, m, outputs, out, places, row):
    at = n
    if places is not None:
        at = tl.load(places + n, mask=n < outputs, other=0)
    tl.store(out + m[None, :] * row + at[:, None], value.to(out.dtype.element_ty), mask=live)
