"""Decode attention: one new token in each of several slots of the KV cache, in one launch for all rows.

The kernel rotates queries and keys (or adds ALiBi), appends the new key and value to the cache, and attends to the
whole slot. No number of it depends on a value of the host: slots and lengths are tensors on the device, so that a CUDA
graph can replay the launch.

The positions of a slot are divided into pieces of PIECE positions, one program each. The last program of a (row, key
head) to finish, known by an atomic counter, merges the pieces in their order, so that the same input gives the same
output to the bit. A row's result depends neither on other rows, nor on the grid, nor on the capacity of the cache. The
new token is the first element of the running softmax of the last piece: no program waits for another one's append.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_kv_cache import append, load_rotated, load_scales, load_tile

LOG2E = tl.constexpr(1.4426950408889634)  # scores are powers of 2


@triton.jit
def attention_kernel(
    qkv,  # (rows, row_size) float16 or bfloat16
    keys,  # (slots, kv_heads, capacity, D) float16 or bfloat16, or (.., D / 2) int16 with two codes of int8 each
    values,  # as keys
    key_scales,  # (slots, kv_heads, capacity, 1) float16; None unless the cache is int8
    value_scales,  # as key_scales
    slots,  # (rows,) int32
    lengths,  # (rows,) int32: tokens in the slot, which is the position of the new one; -1: the row is idle
    rotation,  # (positions, D) float32, D / 2 cosines, then D / 2 sines; None for ALiBi
    slopes,  # (heads,) float32; None for rotary positions
    places,  # (heads * D,) int32, the column of `out` for each number; None: in order
    out,  # (rows, out_size) of qkv's dtype
    sums,  # (rows, kv_heads, pieces, GROUP, D + 2) float32: values, largest score, and normalizer of each piece
    tickets,  # (rows * kv_heads,) int32, all 0 between launches
    capacity,
    row_size,
    out_size,
    D: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per key head
    QUERY_STEP: tl.constexpr,  # in a row of qkv, from one query head to the next
    GROUP_STEP: tl.constexpr,  # from the queries of one key head to those of the next
    KEY_START: tl.constexpr,
    VALUE_START: tl.constexpr,
    KEY_STEP: tl.constexpr,  # from one key or value head to the next
    PIECE: tl.constexpr,
    STEP: tl.constexpr,
    QUERIES: tl.constexpr,  # GROUP padded for the matrix instructions
    AHEAD: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,  # programmatic dependent launch, sm_90 and newer
):
    """Grid (pieces, kv_heads, rows); programs whose piece begins after the row's new token end at once."""
    INT8: tl.constexpr = key_scales is not None
    HALF: tl.constexpr = D // 2
    HP: tl.constexpr = triton.next_power_of_2(HALF)
    WORDS: tl.constexpr = HALF if INT8 else D  # elements of a position in `keys`
    SCALE: tl.constexpr = LOG2E / D**0.5
    # Weights times scales of values are operands in DTYPE. This factor keeps small ones in the range of float16, and
    # the largest scale, 65504 / 127, as well.
    UNIT: tl.constexpr = 64.0 if INT8 else 1.0
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    piece, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pieces, kv_heads = tl.num_programs(0), tl.num_programs(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    length = tl.load(lengths + b)
    count = length // PIECE + 1  # pieces of this row; the last one has the new token
    # A row that its slot or this launch has no room for is treated as idle: nothing outside the cache is written.
    active = (length >= 0) & (length < capacity) & (count <= pieces)
    if active & (piece < count):
        j, g = tl.arange(0, HP), tl.arange(0, QUERIES)
        if INT8:
            low, high = 2 * j, 2 * j + 1
        else:
            low, high = j, j + HALF
        real = (j[None, :] < HALF) & (g[:, None] < GROUP)
        first = (tl.load(slots + b).to(tl.int64) * kv_heads + head) * capacity  # position 0 of the slot's head
        keys_at, values_at = keys + first * WORDS, values + first * WORDS
        row = qkv + b.to(tl.int64) * row_size
        queries = row + head * GROUP_STEP + g[:, None] * QUERY_STEP
        q_low = load_rotated(queries, low[None, :], real, rotation, length, D).to(DTYPE)
        q_high = load_rotated(queries, high[None, :], real, rotation, length, D).to(DTYPE)
        largest = tl.full((QUERIES,), -float("inf"), tl.float32)
        norm = tl.zeros((QUERIES,), tl.float32)
        acc_low, acc_high = tl.zeros((QUERIES, HP), tl.float32), tl.zeros((QUERIES, HP), tl.float32)
        if piece == count - 1:
            key, value = row + KEY_START + head * KEY_STEP, row + VALUE_START + head * KEY_STEP
            k_low, k_high = append(
                load_rotated(key, low, j < HALF, rotation, length, D),
                load_rotated(key, high, j < HALF, rotation, length, D),
                keys_at + length * WORDS, key_scales + first + length if INT8 else None, j, HALF)
            v_low, v_high = append(
                load_rotated(value, low, j < HALF, None, length, D),
                load_rotated(value, high, j < HALF, None, length, D),
                values_at + length * WORDS, value_scales + first + length if INT8 else None, j, HALF)
            largest = tl.sum(q_low.to(tl.float32) * k_low[None, :] + q_high.to(tl.float32) * k_high[None, :], 1) * SCALE
            norm += UNIT
            acc_low += UNIT * v_low[None, :]
            acc_high += UNIT * v_high[None, :]
        if slopes is not None:
            slope = tl.load(slopes + head * GROUP + g, mask=g < GROUP, other=0.0) * LOG2E
        stop = tl.minimum((piece + 1) * PIECE, length)
        if INT8:  # scales are too narrow to be copied asynchronously: they are loaded one iteration ahead
            k_scale, v_scale = load_scales(key_scales + first, value_scales + first, piece * PIECE, stop, STEP)
        for start in range(piece * PIECE, stop, STEP):
            t = start + tl.arange(0, STEP)
            at = t[:, None] * WORDS + j[None, :]
            valid = (t[:, None] < stop) & (j[None, :] < HALF)
            k_low, k_high = load_tile(keys_at + at, valid, HALF, INT8, DTYPE, ASM)
            v_low, v_high = load_tile(values_at + at, valid, HALF, INT8, DTYPE, ASM)
            score = tl.dot(q_high, tl.trans(k_high), tl.dot(q_low, tl.trans(k_low))) * SCALE
            if INT8:
                score *= k_scale.to(tl.float32)[None, :]
            if slopes is not None:
                score += slope[:, None] * (t - length).to(tl.float32)[None, :]
            score = tl.where(t[None, :] < stop, score, -float("inf"))
            higher = tl.maximum(largest, tl.max(score, 1))
            shrink = tl.exp2(largest - higher)
            p = tl.exp2(score - higher[:, None])
            norm = norm * shrink + tl.sum(p, 1) * UNIT
            if INT8:
                p *= v_scale.to(tl.float32)[None, :] * UNIT
                k_scale, v_scale = load_scales(key_scales + first, value_scales + first, start + STEP, stop, STEP)
            acc_low = tl.dot(p.to(DTYPE), v_low, acc_low * shrink[:, None])
            acc_high = tl.dot(p.to(DTYPE), v_high, acc_high * shrink[:, None])
            largest = higher
        number = head * (GROUP * D)
        out_row = out + b.to(tl.int64) * out_size
        if count == 1:
            _store(acc_low / norm[:, None], number + g[:, None] * D + low[None, :], real, places, out_row)
            _store(acc_high / norm[:, None], number + g[:, None] * D + high[None, :], real, places, out_row)
        else:
            pair = b * kv_heads + head
            start_of = sums + pair.to(tl.int64) * pieces * (GROUP * (D + 2))
            mine = start_of + (piece * GROUP + g) * (D + 2)
            tl.store(mine[:, None] + low[None, :], acc_low, mask=real)
            tl.store(mine[:, None] + high[None, :], acc_high, mask=real)
            tl.store(mine + D, largest, mask=g < GROUP)
            tl.store(mine + D + 1, norm, mask=g < GROUP)
            tl.debug_barrier()  # all threads have stored before one of them takes the ticket
            if tl.atomic_add(tickets + pair, 1, sem="acq_rel", scope="gpu") == count - 1:
                _store_merged(start_of, count, number, places, out_row, D, GROUP, AHEAD)
                tl.store(tickets + pair, 0)


@triton.jit
def _store_merged(start_of, count, number, places, out_row, D: tl.constexpr, GROUP: tl.constexpr,
                  AHEAD: tl.constexpr):
    """Merge the pieces of one (row, key head) in their order, AHEAD at a time, and store the result of each query.

    The loads bypass the first-level cache, which does not see what other multiprocessors stored.
    """
    d, i = tl.arange(0, triton.next_power_of_2(D)), tl.arange(0, AHEAD)
    for query in range(GROUP):
        largest, norm = tl.full((), -float("inf"), tl.float32), tl.full((), 0.0, tl.float32)
        acc = tl.zeros((triton.next_power_of_2(D),), tl.float32)
        for some in range(0, count, AHEAD):
            at = start_of + ((some + i) * GROUP + query) * (D + 2)
            valid = some + i < count
            there = valid[:, None] & (d[None, :] < D)
            values = tl.load(at[:, None] + d[None, :], mask=there, other=0.0, cache_modifier=".cg")
            score = tl.load(at + D, mask=valid, other=-float("inf"), cache_modifier=".cg")
            norms = tl.load(at + D + 1, mask=valid, other=0.0, cache_modifier=".cg")
            higher = tl.maximum(largest, tl.max(score, 0))
            shrink, weight = tl.exp2(largest - higher), tl.exp2(score - higher)
            norm = norm * shrink + tl.sum(weight * norms, 0)
            acc = acc * shrink + tl.sum(weight[:, None] * values, 0)
            largest = higher
        _store(acc / norm, number + query * D + d, d < D, places, out_row)


@triton.jit
def _store(value, number, real, places, out_row):
    at = number
    if places is not None:
        at = tl.load(places + number, mask=real, other=0)
    tl.store(out_row + at, value.to(out_row.dtype.element_ty), mask=real)
