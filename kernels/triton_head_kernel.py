"""The last launch of a decode step: the final norm, the lm_head, and the next token by greedy decoding.

The next token is written where the next step reads it, and the lengths are advanced, so that step follows step without
the host. Each program computes the logits of TILE tokens. The largest logit of all is found by an atomic maximum of
(logit, -token): the order in which programs finish does not matter, and of equal logits the first wins. The last
program of a tile of rows writes the tokens.

If tokens are sampled (`triton_sampling`), the programs write instead the logits after repetition penalty and
temperature, and for each tile their maximum and the sum of exp(logit - maximum).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_norm import apply_norm
from .triton_sums import block_sums, prefetch


@triton.jit(do_not_specialize=["M"])
def head_kernel(
    x,  # (M, K) float16 or bfloat16, the stream times gamma
    words,  # as in triton_skinny, or if BITS is 16 the dense matrix (N, K)
    scales,
    zeros,
    bias,  # (N,), or None
    moments,  # as in triton_norm
    gamma_product,
    eps,
    logits,  # (M, N) float32, written
    tokens,  # (M,) int32, written where lengths are not -1
    lengths,  # (M,) int32, advanced by 1 where they are not -1
    tickets,  # (tiles of rows,) int32, all 0 between launches
    best,  # (M,) int64, all 0 between launches
    temperatures,  # fields of SamplingState, or None for greedy decoding
    penalties,
    seen,
    adjusted,
    maxima,
    M,
    N,
    K,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
    ZERO: tl.constexpr,
    WIDTH: tl.constexpr,  # of the stream
    MOMENTS_TILE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles of rows, tiles of tokens): programs that read the same weights follow one another."""
    tile = tl.program_id(1)
    n, m = tile * BN + tl.arange(0, BN), tl.program_id(0) * BM + tl.arange(0, BM)
    if PDL:
        gdc_launch_dependents()
        if BITS != 16:
            prefetch(words, tile, N, 0, K // BLOCK, BITS, BLOCK, BN, 4)
        gdc_wait()
    if BITS == 16:
        acc = _dense_sums(x, words, n, m, M, N, K, BM, BN, BK)
    else:
        acc = block_sums(x, words, scales, zeros, n, m, M, N, K, 0, K // BLOCK, BITS, RUN, BLOCK, ZERO, BM, BN, BK,
                         ASM)
    acc = apply_norm(acc, moments, gamma_product, eps, n, m, M, N, WIDTH, MOMENTS_TILE)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    live = (n[:, None] < N) & (m[None, :] < M)
    at = m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(logits + at, acc, mask=live)
    if temperatures is None:
        _greedy(acc, live, n, m, tokens, lengths, tickets, best, M, N)
    else:
        penalty = tl.load(penalties + m, mask=m < M, other=1.0)[None, :]
        temperature = tl.load(temperatures + m, mask=m < M, other=0.0)[None, :]
        temperature = tl.zeros_like(acc) + tl.where(temperature > 0, temperature, 1.0)
        repeated = tl.load(seen + at, mask=live & (penalty != 1.0), other=0) != 0
        penalized = tl.where(acc > 0, tl.div_rn(acc, tl.zeros_like(acc) + penalty), acc * penalty)
        acc = tl.div_rn(tl.where(repeated, penalized, acc), temperature) + 0.0  # no -0, which is sorted after 0
        tl.store(adjusted + at, acc, mask=live)
        acc = tl.where(live, acc, -float("inf"))
        top = tl.max(acc, 0)
        tl.store(maxima + tile * M + m, top, mask=m < M)
        tl.store(maxima + (tl.num_programs(1) + tile) * M + m, tl.sum(tl.exp(acc - top[None, :]), 0), mask=m < M)


@triton.jit
def _dense_sums(x, table, n, m, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Sums (BN, BM) float32 of x @ table.T; the table may be float16 or bfloat16."""
    k = tl.arange(0, BK)
    acc = tl.zeros((BN, BM), tl.float32)
    at = table + n[:, None].to(tl.int64) * K + k[None, :]
    x_at = x + m[None, :] * K + k[:, None]
    for start in range(0, K, BK):
        w = tl.load(at + start, mask=(n[:, None] < N) & (k[None, :] < K - start), other=0.0,
                    eviction_policy="evict_first")
        rows = tl.load(x_at + start, mask=(m[None, :] < M) & (k[:, None] < K - start), other=0.0)
        acc = tl.dot(w.to(x.dtype.element_ty), rows, acc)
    return acc


@triton.jit
def _greedy(acc, live, n, m, tokens, lengths, tickets, best, M, N):
    """Merge the largest logit of this tile, and as the last program write the next token of each active row."""
    bits = acc.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the logits
    key = ((ordered.to(tl.int64) + 2**31) << 31) | (2**31 - 1 - n[:, None])  # at least 0; 0 is below any finite logit
    tl.atomic_max(best + m, tl.max(tl.where(live, key, 0), 0), mask=m < M, sem="relaxed", scope="gpu")
    tl.debug_barrier()  # all threads have merged before one of them takes the ticket
    ticket = tickets + tl.program_id(0)
    if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1:
        found = tl.atomic_xchg(best + m, tl.zeros_like(m).to(tl.int64), mask=m < M, sem="relaxed", scope="gpu")
        token = tl.minimum((2**31 - 1 - (found & (2**31 - 1))).to(tl.int32), N - 1)  # whatever the logits are
        length = tl.load(lengths + m, mask=m < M, other=-1)
        active = (m < M) & (length >= 0)
        tl.store(tokens + m, token, mask=active)
        tl.store(lengths + m, length + 1, mask=active)
        tl.store(ticket, 0)
