"""Sampling of the next tokens on the GPU, after `triton_head_kernel.head_kernel`, as engine/sampling.py defines it.

Tokens are ordered by their logit after repetition penalty and temperature, of equal ones the first comes first; top_k,
top_p and min_p keep a beginning of that order, and a random number selects by the cumulative distribution.

The CANDIDATES most likely tokens are in the CANDIDATES tiles of the lm_head with the largest maxima, and the sums of
the tiles give the exact normalizer of all tokens. If what is kept, or what the random number selects, is certainly
among the candidates, sorting these is enough. Otherwise nothing is sorted: each limit is a logit, which is found bit by
bit, with one pass over the row for each of its 32 bits.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def sampling_kernel(
    temperatures,  # fields of SamplingState
    top_ks,
    top_ps,
    min_ps,
    numbers,
    seen,
    adjusted,
    maxima,
    tokens,  # (M,) int32, written
    lengths,  # (M,) int32, advanced by 1
    V,
    room,  # of numbers
    TILES: tl.constexpr,  # tiles of the lm_head
    PADDED: tl.constexpr,  # a power of two, at least TILES and CANDIDATES
    TILE: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per row; rows with length -1 keep everything."""
    m, rows = tl.program_id(0), tl.num_programs(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    length = tl.load(lengths + m)
    if length >= 0:
        row = adjusted + m.to(tl.int64) * V
        values, ids, top, total = _candidates(row, maxima + m, rows, V, TILES, PADDED, TILE, CANDIDATES)
        i = tl.arange(0, CANDIDATES)
        token = tl.sum(tl.where(i == 0, ids, 0))
        if tl.load(temperatures + m) > 0:
            k, top_p, min_p = tl.load(top_ks + m), tl.load(top_ps + m), tl.load(min_ps + m)
            k = tl.minimum(tl.where(k > 0, k, V), V)
            u = tl.load(numbers + m * room + length, mask=length < room, other=0.0)
            weight = tl.where(i < k, tl.exp(values - top), 0.0)  # probabilities without their normalizer
            cumulative = tl.cumsum(weight, 0)
            few = k <= CANDIDATES
            mass = tl.where(few, tl.sum(weight), total)
            bound = tl.where(top_p < 1.0, top_p, float("inf")) * mass
            kept = (i < k) & ((i == 0) | (cumulative - weight < bound)) & (weight >= min_p)
            count = tl.sum(kept.to(tl.int32))
            kept_mass = tl.sum(tl.where(kept, weight, 0.0))
            complete = few | (count < CANDIDATES)  # what follows a token that is not kept is not kept either
            unlimited = (k == V) & (top_p >= 1.0) & (min_p <= 0.0)
            target = u * tl.where(complete, kept_mass, mass)
            if complete | (unlimited & (target < kept_mass)):
                place = tl.minimum(tl.sum((kept & (cumulative <= target)).to(tl.int32)), count - 1)
                token = tl.sum(tl.where(i == place, ids, 0))
            else:
                token = _sample_all(row, V, top, total, k, top_p, min_p, u, BLOCK)
        token = tl.minimum(tl.maximum(token, 0), V - 1)  # NaN has no order; the host ends such a request
        tl.store(tokens + m, token)
        tl.store(lengths + m, length + 1)
        tl.store(seen + m.to(tl.int64) * V + token, 1)


@triton.jit
def _candidates(row, maxima, rows, V, TILES: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
                CANDIDATES: tl.constexpr):
    """Logits and tokens (CANDIDATES,) of the most likely tokens in their order, the largest logit, and the normalizer.

    Of the tiles, ordered by their maximum and then by their position, no tile after the first CANDIDATES holds one of
    the first CANDIDATES tokens: each tile before it has a token that comes before all tokens of the later tile.
    """
    tile = tl.arange(0, PADDED)
    largest = tl.load(maxima + tile * rows, mask=tile < TILES, other=-float("inf"))
    sums = tl.load(maxima + (TILES + tile) * rows, mask=tile < TILES, other=0.0)
    top = tl.max(largest, 0)
    total = tl.sum(sums * tl.exp(largest - top), 0)
    tiles = _positions(_largest_keys(_keys(largest, tile), CANDIDATES))
    token = tl.reshape(tiles[:, None] * TILE + tl.arange(0, TILE)[None, :], (CANDIDATES * TILE,))
    values = tl.load(row + token, mask=token < V, other=-float("inf"))
    ids = _positions(_largest_keys(_keys(values, token), CANDIDATES))
    return tl.load(row + ids, mask=ids < V, other=-float("inf")), ids, top, total


@triton.jit
def _largest_keys(keys, COUNT: tl.constexpr):
    """The COUNT largest of some keys, which all differ, in descending order."""
    i = tl.arange(0, COUNT)
    found = tl.zeros((COUNT,), tl.int64)
    for place in range(COUNT):
        largest = tl.max(keys, 0)
        found = tl.where(i == place, largest, found)
        keys = tl.where(keys == largest, -(2**63), keys)
    return found


@triton.jit
def _ordered(values):
    """Integers of 32 bits in the order of float32 values."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _keys(values, positions):
    """Integers of 64 bits whose descending order is that of the values, of equal ones the first position first."""
    return (_ordered(values).to(tl.int64) << 31) | (2**31 - 1 - positions)


@triton.jit
def _positions(keys):
    return 2**31 - 1 - (keys & (2**31 - 1)).to(tl.int32)


@triton.jit
def _sample_all(row, V, top, total, k, top_p, min_p, u, BLOCK: tl.constexpr):
    """The token that the number u selects, where the candidates do not suffice.

    `floor` is the smallest kept logit, as an integer of `_ordered`; of equal ones the first `ties` are kept.
    """
    floor, ties = tl.full((), -(2**31), tl.int64), V
    mass = total
    if k < V:
        floor = _limit(row, V, top, 0.0, (k - 1).to(tl.float32), True, False, BLOCK)
        above, mass = _above(row, V, top, floor, 0.0, BLOCK)
        ties = k - above.to(tl.int32)
        mass += ties * _weight_of(floor, top)
    if top_p < 1.0:
        nucleus = _limit(row, V, top, 0.0, top_p * mass, False, True, BLOCK)
        _, above_mass = _above(row, V, top, nucleus, 0.0, BLOCK)
        most = tl.ceil((top_p * mass - above_mass) / _weight_of(nucleus, top))
        most = tl.minimum(tl.maximum(most, 1.0), 1e9).to(tl.int32)
        ties = tl.where(nucleus > floor, most, tl.where(nucleus == floor, tl.minimum(most, ties), ties))
        floor = tl.maximum(nucleus, floor)
    equal, _ = _find(row, V, floor, V, BLOCK)  # tokens with the logit `floor`
    _, above_mass = _above(row, V, top, floor, min_p, BLOCK)
    at_floor = _weight_of(floor, top)
    at_floor = tl.where(at_floor >= min_p, at_floor, 0.0)
    kept = above_mass + tl.minimum(ties, equal) * at_floor
    target = tl.minimum(u, 0.9999999) * kept
    value = tl.maximum(_limit(row, V, top, min_p, target, False, False, BLOCK), floor)
    _, above_mass = _above(row, V, top, value, min_p, BLOCK)
    equal, _ = _find(row, V, value, V, BLOCK)
    last = tl.where(value == floor, tl.minimum(ties, equal), equal) - 1
    rank = tl.minimum((target - above_mass) / _weight_of(value, top), 1e9).to(tl.int32)
    _, token = _find(row, V, value, tl.maximum(tl.minimum(rank, last), 0), BLOCK)
    return token


@triton.jit
def _weight_of(ordered, top):
    """exp(logit - top) of an integer of `_ordered`."""
    bits = ordered.to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.exp(bits.to(tl.float32, bitcast=True) - top)


@triton.jit
def _above(row, V, top, threshold, min_p, BLOCK: tl.constexpr):
    """Number and weight of the tokens with a larger logit than the threshold, and with a weight of at least min_p."""
    count, mass = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(row + at, mask=at < V, other=-float("inf"))
        weight = tl.exp(values - top)
        chosen = (_ordered(values).to(tl.int64) > threshold) & (weight >= min_p) & (at < V)
        count += tl.where(chosen, 1.0, 0.0)
        mass += tl.where(chosen, weight, 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _limit(row, V, top, min_p, bound, BY_COUNT: tl.constexpr, STRICT: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest logit such that the number, or weight, of the tokens above it is at most `bound`, or below it."""
    low, high = tl.full((), -(2**31), tl.int64), tl.full((), 2**31 - 1, tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        count, mass = _above(row, V, top, middle, min_p, BLOCK)
        found = count if BY_COUNT else mass
        small = found < bound if STRICT else found <= bound
        high = tl.where(small, middle, high)
        low = tl.where(small, low, middle + 1)
    return high


@triton.jit
def _find(row, V, value, rank, BLOCK: tl.constexpr):
    """The number of tokens whose logit is `value`, and the one with `rank` such tokens before it (-1: none)."""
    count, token = tl.full((), 0, tl.int32), tl.full((), -1, tl.int32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(row + at, mask=at < V, other=-float("inf"))
        equal = ((_ordered(values).to(tl.int64) == value) & (at < V)).to(tl.int32)
        before = count + tl.cumsum(equal, 0) - equal
        token = tl.maximum(token, tl.max(tl.where((equal == 1) & (before == rank), at, -1), 0))
        count += tl.sum(equal, 0)
    return count, token
