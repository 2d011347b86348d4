"""Unpack words of codes to operands of the tensor cores: code - zero, exactly, in float16 or bfloat16.

A code in the mantissa of a power of two is that power plus the code: one `lop3` masks and merges the two codes of a
32-bit register, and one subtraction removes the power and the zero point. Nothing is converted or rounded. The assembly
processes two neighbouring words (one register) at a time. Pure Triton does the same for the interpreter and for other
makers' GPUs, with half as many instructions again.

Functions return from every branch of an if, because Triton would also compile the code after it.

Operands of the assembly: $0.. are the results in the order of the slices, then come the words, then the values to
subtract, negated where they are added.
"""

import triton
import triton.language as tl

# float16: 0x6400 is 1024, whose mantissa counts ones. Codes that are four bits higher count 16 times as much.
# Arguments: words, 1024 + zero, -(64 + zero).
UNPACK4_FLOAT16 = tl.constexpr("""{
.reg .b32 high, low0, low1, up0, up1, sixteenth;
mov.b32 sixteenth, 0x2c002c00;
shr.b32 high, $4, 8;
lop3.b32 low0, $4, 0x000f000f, 0x64006400, 0xEA;
lop3.b32 up0, $4, 0x00f000f0, 0x64006400, 0xEA;
lop3.b32 low1, high, 0x000f000f, 0x64006400, 0xEA;
lop3.b32 up1, high, 0x00f000f0, 0x64006400, 0xEA;
sub.f16x2 $0, low0, $5;
fma.rn.f16x2 $1, up0, sixteenth, $6;
sub.f16x2 $2, low1, $5;
fma.rn.f16x2 $3, up1, sixteenth, $6;
}""")

# Arguments: words, 1024 + zero.
UNPACK8_FLOAT16 = tl.constexpr("""{
.reg .b32 high, code0, code1;
shr.b32 high, $2, 8;
lop3.b32 code0, $2, 0x00ff00ff, 0x64006400, 0xEA;
lop3.b32 code1, high, 0x00ff00ff, 0x64006400, 0xEA;
sub.f16x2 $0, code0, $3;
sub.f16x2 $1, code1, $3;
}""")

# bfloat16: 0x4300 is 128, whose mantissa of 7 bits holds a 4-bit code in its lowest bits only: each code is shifted
# there. `sub.bf16x2` needs sm_90, so 1 * x - (128 + zero) is computed. Arguments: words, -(128 + zero).
UNPACK4_BFLOAT16 = tl.constexpr("""{
.reg .b32 word1, word2, word3, code0, code1, code2, code3, one;
mov.b32 one, 0x3f803f80;
shr.b32 word1, $4, 4;
shr.b32 word2, $4, 8;
shr.b32 word3, $4, 12;
lop3.b32 code0, $4, 0x000f000f, 0x43004300, 0xEA;
lop3.b32 code1, word1, 0x000f000f, 0x43004300, 0xEA;
lop3.b32 code2, word2, 0x000f000f, 0x43004300, 0xEA;
lop3.b32 code3, word3, 0x000f000f, 0x43004300, 0xEA;
fma.rn.bf16x2 $0, code0, one, $5;
fma.rn.bf16x2 $1, code1, one, $5;
fma.rn.bf16x2 $2, code2, one, $5;
fma.rn.bf16x2 $3, code3, one, $5;
}""")

# 8 bits do not fit into 7: each byte goes into the mantissa of 2**23 in float32. The difference, at most 256 in size,
# is exact in bfloat16. Arguments: words, then 2**23 + zero for the first word and for the second.
UNPACK8_BFLOAT16 = tl.constexpr("""{
.reg .b32 magic, byte0, byte1, byte2, byte3;
.reg .f32 code0, code1, code2, code3;
mov.b32 magic, 0x4b000000;
prmt.b32 byte0, $2, magic, 0x7440;
prmt.b32 byte1, $2, magic, 0x7441;
prmt.b32 byte2, $2, magic, 0x7442;
prmt.b32 byte3, $2, magic, 0x7443;
mov.b32 code0, byte0;
mov.b32 code1, byte1;
mov.b32 code2, byte2;
mov.b32 code3, byte3;
sub.f32 code0, code0, $3;
sub.f32 code1, code1, $3;
sub.f32 code2, code2, $4;
sub.f32 code3, code3, $4;
cvt.rn.bf16x2.f32 $0, code2, code0;
cvt.rn.bf16x2.f32 $1, code3, code1;
}""")


@triton.jit
def unpack(words, zero, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """code - zero of words (rows, S) int16: a tuple of 16 / BITS slices (rows, S) of DTYPE.

    Args:
        zero: (rows, 1) float32, the zero points. With BITS 4 they are at most 16, with 8 at most 256.
        DTYPE: tl.float16 or tl.bfloat16.
        ASM: whether to use the assembly, for NVIDIA's GPUs of compute capability 8.0 or newer.
    """
    if ASM:
        if DTYPE == tl.float16:
            return _float16_asm(words, zero, BITS)
        else:
            return _bfloat16_asm(words, zero, BITS)
    else:
        return _pure(words, zero, BITS, DTYPE)


@triton.jit
def zero_points(zeros, at, ZERO: tl.constexpr):
    """Zero points (rows,) float32: ZERO for all, or if it is -1 those at offsets `at` (rows,) from zeros."""
    if ZERO >= 0:
        return tl.full(at.shape, ZERO, tl.float32)
    else:
        return tl.load(zeros + at).to(tl.float32)


@triton.jit
def part_of_blocks(blocks, part, PARTS: tl.constexpr):
    """The first block of a part of K, and the one after its last; parts differ by at most one block.

    No part is empty as long as there are at most as many parts as blocks, so each may load its first scales early.
    """
    return blocks * part // PARTS, blocks * (part + 1) // PARTS


@triton.jit
def load_runs(at, columns, RUNS: tl.constexpr):
    """A tuple of RUNS rows of a matrix with `columns` columns, the first at pointers `at`."""
    if RUNS == 1:
        return (tl.load(at),)
    elif RUNS == 2:
        return tl.load(at), tl.load(at + columns)
    else:
        return tl.load(at), tl.load(at + columns), tl.load(at + 2 * columns), tl.load(at + 3 * columns)


@triton.jit
def _float16_asm(words, zero, BITS: tl.constexpr):
    low = (1024 + zero).to(tl.float16)
    if BITS == 8:
        return tl.inline_asm_elementwise(UNPACK8_FLOAT16, "=r,=r,r,r", [words, low],
                                         dtype=(tl.float16, tl.float16), is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(UNPACK4_FLOAT16, "=r,=r,=r,=r,r,r,r",
                                         [words, low, (-64 - zero).to(tl.float16)],
                                         dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2)


@triton.jit
def _bfloat16_asm(words, zero, BITS: tl.constexpr):
    if BITS == 8:
        return tl.inline_asm_elementwise(UNPACK8_BFLOAT16, "=r,=r,r,f,f", [words, 8388608 + zero],
                                         dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(UNPACK4_BFLOAT16, "=r,=r,=r,=r,r,r", [words, (-128 - zero).to(tl.bfloat16)],
                                         dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True,
                                         pack=2)


@triton.jit
def _pure(words, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    low = words.to(tl.uint16, bitcast=True)
    high = low >> 8
    if BITS == 8:
        return _code8(low, zero, DTYPE), _code8(high, zero, DTYPE)
    elif DTYPE == tl.float16:
        return _low4(low, zero), _up4(low, zero), _low4(high, zero), _up4(high, zero)
    else:
        return _bfloat4(low, zero), _bfloat4(low >> 4, zero), _bfloat4(high, zero), _bfloat4(high >> 4, zero)


@triton.jit
def _low4(words, zero):
    return ((words & 0x000F) | 0x6400).to(tl.float16, bitcast=True) - (1024 + zero).to(tl.float16)


@triton.jit
def _up4(words, zero):
    sixteenth = tl.full((), 0.0625, tl.float16)
    return ((words & 0x00F0) | 0x6400).to(tl.float16, bitcast=True) * sixteenth - (64 + zero).to(tl.float16)


@triton.jit
def _bfloat4(words, zero):
    return ((words & 0x000F) | 0x4300).to(tl.bfloat16, bitcast=True) - (128 + zero).to(tl.bfloat16)


@triton.jit
def _code8(words, zero, DTYPE: tl.constexpr):
    if DTYPE == tl.float16:
        return ((words & 0x00FF) | 0x6400).to(tl.float16, bitcast=True) - (1024 + zero).to(tl.float16)
    else:
        magic = ((words & 0x00FF).to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)
        return (magic - (8388608 + zero)).to(tl.bfloat16)
