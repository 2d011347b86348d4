"""Norms of the residual stream, split between the kernel that writes the stream and the product that follows the norm.

The kernel that writes a tile of the stream x also writes x * gamma, where the next product reads its inputs, and the
tile's moments. The product multiplies x * gamma, merges the moments of all tiles and corrects its sums:

    RMS norm:    norm(x) @ W = r * ((x * gamma) @ W)
    layer norm:  norm(x) @ W = r * ((x * gamma) @ W - mean(x) * (gamma @ W)) + beta @ W

with r = 1 / sqrt(mean(x^2) + eps) or 1 / sqrt(variance(x) + eps). gamma @ W is computed at loading, and beta @ W is
part of the bias. So a norm adds nothing to the main loop of the product, where it took 27 % (gamma) to 82 % (all of it)
more instructions.

Moments are (2, tiles, M) float32: for each tile of TILE columns, the last of which may be narrower, the sum and the sum
of squared differences from the tile's mean. They are merged as in Chan, Golub and LeVeque (1979), without a difference
of large squares.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class FoldedNorm(NamedTuple):
    """What a product needs to know about the norm of its input."""

    moments: Tensor  # (2, tiles, M) float32 of the stream
    gamma_product: Tensor | None  # gamma @ W (N,) float32 of a layer norm; None for an RMS norm
    eps: float
    width: int  # columns of the stream
    tile: int  # columns of one tile of the moments


class NextNorm(NamedTuple):
    """What a kernel that writes the stream writes for the norm that follows."""

    gamma: Tensor  # (width,)
    places: Tensor | None  # (width,) int32: the column of x of each column of the stream; None: the same one
    x: Tensor  # (M, K'): the stream times gamma
    moments: Tensor  # (2, tiles, M) float32, written


@triton.jit
def merged_moments(moments, m, M, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Mean and variance (BM,) float32 of rows m of the stream.

    Tiles are merged some at a time, because with 32 rows and more all of them spill. Differences are those from the
    mean of the first tile, so that none of large squares remains.
    """
    TILES: tl.constexpr = (WIDTH + TILE - 1) // TILE
    ALL: tl.constexpr = triton.next_power_of_2(TILES)
    MOST: tl.constexpr = 2048 if m.shape[0] < 32 else 1024  # with 2048, up to 64 bytes spill with 3.5.1 and 3.6
    TOGETHER: tl.constexpr = ALL if ALL * m.shape[0] <= MOST else MOST // m.shape[0]
    first = tl.load(moments + m, mask=m < M, other=0.0) / min(WIDTH, TILE)
    shift, squares = tl.zeros_like(first), tl.zeros_like(first)
    for start in range(0, TILES, TOGETHER):
        tile = start + tl.arange(0, TOGETHER)[:, None]
        live = (tile < TILES) & (m[None, :] < M)
        at = moments + tile * M + m[None, :]
        count = tl.maximum(tl.minimum(WIDTH - tile * TILE, TILE), 1).to(tl.float32)
        difference = tl.where(live, tl.load(at, mask=live, other=0.0) / count - first[None, :], 0.0)
        shift += tl.sum(count * difference, 0)
        squares += tl.sum(tl.load(at + TILES * M, mask=live, other=0.0) + count * difference * difference, 0)
    shift /= WIDTH
    return first + shift, squares / WIDTH - shift * shift


@triton.jit
def apply_norm(acc, moments, gamma_product, eps, n, m, M, N, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Sums (BN, BM) of (x * gamma) @ W to those of norm(x) @ W, without beta @ W; no change if moments is None."""
    if moments is None:
        return acc
    else:
        mean, variance = merged_moments(moments, m, M, WIDTH, TILE)
        if gamma_product is None:
            return acc * tl.rsqrt(variance + mean * mean + eps)[None, :]
        else:
            acc -= mean[None, :] * tl.load(gamma_product + n, mask=n < N, other=0.0)[:, None]
            return acc * tl.rsqrt(variance + eps)[None, :]


@triton.jit
def store_for_norm(value, inside, n, m, tile, tiles, gamma, places, x, moments, M, N, row, BN: tl.constexpr):
    """Write a tile (BN, BM) of the stream, in the stream's dtype, times gamma to x (M, row), and the tile's moments."""
    exact = value.to(tl.float32)
    scaled = exact * tl.load(gamma + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = n
    if places is not None:
        at = tl.load(places + n, mask=n < N, other=0)
    tl.store(x + m[None, :] * row + at[:, None], scaled.to(x.dtype.element_ty), mask=inside)
    count = tl.minimum(N - tile * BN, BN).to(tl.float32)
    total = tl.sum(tl.where(inside, exact, 0.0), 0)
    difference = tl.where(inside, exact - (total / count)[None, :], 0.0)
    at_tile = moments + tile * M + m
    tl.store(at_tile, total, mask=m < M)
    tl.store(at_tile + tiles * M, tl.sum(difference * difference, 0), mask=m < M)
