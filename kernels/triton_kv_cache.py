"""Device functions of the decode attention: rotary positions, appending to the KV cache, and reading it by tiles.

The numbers of a head are kept as two halves, "low" and "high", because tensor cores take what one 16-bit load yields:

* float16 and bfloat16: the first and the second half of the head.
* int8: the even and the odd numbers. Two neighbouring codes are read as one 16-bit word, since asynchronous copies and
  operands of tensor cores need at least 16 bits per thread and element. Read as bytes, the loop has 5.5 instructions
  per number, as words 3.5 (Triton 3.9, sm_90).
"""

import triton
import triton.language as tl

from .triton_unpack import unpack

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds a float32 to a whole number, ties to even
SIGNS = tl.constexpr(-32640)  # 0x8080: with both sign bits flipped, codes -128..127 are stored as 0..255
CODE_ZERO = tl.constexpr(128.0)
INT8_MAX = tl.constexpr(127.0)
SMALLEST_SCALE = tl.constexpr(6e-8)  # as in engine/kv_cache.py: not 0 in float16


@triton.jit
def load_rotated(head, d, valid, rotation, position, D: tl.constexpr):
    """Load numbers d of a head and rotate them by the angles of a position.

    Args:
        head: pointers to the first number of a head, broadcast against d.
        d: indices 0 .. D - 1 of any shape.
        rotation: (positions, D) float32, D / 2 cosines, then D / 2 sines; None for no rotation.
    Returns:
        float32; 0 where not valid.
    """
    x = tl.load(head + d, mask=valid, other=0.0).to(tl.float32)
    if rotation is None:
        return x
    else:
        HALF: tl.constexpr = D // 2
        partner = tl.load(head + (d + HALF) % D, mask=valid, other=0.0).to(tl.float32)
        table = rotation + position * D + d % HALF
        cos, sin = tl.load(table), tl.load(table + HALF)
        return x * cos + partner * tl.where(d < HALF, -sin, sin)


@triton.jit
def append(low, high, cache, scale_at, j, HALF: tl.constexpr):
    """Store one position of one head, both halves (HP,) float32.

    Args:
        cache: pointer to the first number (for int8 the first 16-bit word) of the position.
        scale_at: pointer to its float16 scale; None unless the cache is int8.
    Returns:
        Both halves as later steps will read them, float32.
    """
    if scale_at is None:
        low, high = low.to(cache.dtype.element_ty), high.to(cache.dtype.element_ty)
        tl.store(cache + j, low, mask=j < HALF)
        tl.store(cache + HALF + j, high, mask=j < HALF)
        return low.to(tl.float32), high.to(tl.float32)
    else:
        largest = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 0)
        scale = tl.maximum(tl.div_rn(largest, INT8_MAX), SMALLEST_SCALE).to(tl.float16)
        tl.store(scale_at, scale)
        scale = scale.to(tl.float32)
        low, high = _code(low, scale), _code(high, scale)
        words = (low.to(tl.int32) & 255) | (high.to(tl.int32) << 8)
        tl.store(cache + j, words.to(tl.int16), mask=j < HALF)
        return low * scale, high * scale


@triton.jit
def _code(x, scale):
    """Whole numbers -127 .. 127 in float32."""
    rounded = tl.div_rn(x, tl.zeros_like(x) + scale) + ROUND - ROUND
    return tl.minimum(tl.maximum(rounded, -INT8_MAX), INT8_MAX)


@triton.jit
def load_tile(at, valid, HALF: tl.constexpr, INT8: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Load both halves (positions, HP) in DTYPE, 0 where not valid; int8 codes are not yet scaled."""
    if INT8:
        words = tl.load(at, mask=valid, other=0)
        return unpack(words ^ SIGNS, tl.full((1, 1), CODE_ZERO, tl.float32), 8, DTYPE, ASM)
    else:
        return (tl.load(at, mask=valid, other=0.0).to(DTYPE), tl.load(at + HALF, mask=valid, other=0.0).to(DTYPE))


@triton.jit
def load_scales(key_scales, value_scales, start, stop, STEP: tl.constexpr):
    """Scales of keys and of values of positions start .. start + STEP, 0 from `stop` on."""
    t = start + tl.arange(0, STEP)
    return (tl.load(key_scales + t, mask=t < stop, other=0.0), tl.load(value_scales + t, mask=t < stop, other=0.0))
