"""Unpacking of all possible words: the assembly, executed by NumPy, and the version in pure Triton, interpreted.

`test_triton_unpack.py` runs this file in a separate process: TRITON_INTERPRET has to be set before Triton's import.
"""

import bfloat16_interpreter
import ptx_executor
import pytest
import torch
import triton
import triton.language as tl

from gptq_belle.kernels.triton_unpack import unpack

bfloat16_interpreter.teach()
ptx_executor.teach()

WORDS = 1 << 16
ZEROS = {4: range(17), 8: (0, 1, 7, 127, 128, 129, 254, 255, 256)}  # v1 checkpoints reach 2**bits
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def unpack_kernel(words, out, ZERO: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
                  SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)[None, :]
    slices = unpack(tl.load(words + i), tl.full((1, 1), ZERO, tl.float32), BITS, DTYPE, ASM)
    for place in tl.static_range(16 // BITS):
        tl.store(out + place * SIZE + i, slices[place])


def unpacked(words, zero, bits, dtype, asm):
    out = torch.full((16 // bits, len(words)), torch.nan, dtype=dtype)
    unpack_kernel[(1,)](words, out, zero, bits, DTYPES[dtype], asm, len(words))
    return out


def expected(words, zero, bits):
    """code - zero in integer arithmetic, one row per slice."""
    unsigned = words.to(torch.int64) % WORDS
    return torch.stack([unsigned // 2 ** (bits * place) % 2**bits - zero for place in range(16 // bits)])


@pytest.mark.parametrize("asm", [True, False])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("bits", [4, 8])
def test_every_word(bits, dtype, asm):
    """In both halves of a register, in random order."""
    words = torch.randperm(WORDS, generator=torch.Generator().manual_seed(bits)).to(torch.int16)
    for order in (words, words.view(-1, 2).flip(1).reshape(-1)):
        for zero in ZEROS[bits]:
            assert torch.equal(unpacked(order, zero, bits, dtype, asm).long(), expected(order, zero, bits)), zero


def test_wrong_constant_is_noticed(monkeypatch):
    """The executor runs the text of the assembly: one wrong bit of a mask gives a wrong result."""
    from gptq_belle.kernels import triton_unpack

    broken = tl.constexpr(triton_unpack.UNPACK4_FLOAT16.value.replace("0x00f000f0", "0x00f000e0", 1))
    monkeypatch.setattr(triton_unpack, "UNPACK4_FLOAT16", broken)
    words = torch.arange(WORDS).to(torch.int16)
    assert not torch.equal(unpacked(words, 8, 4, torch.float16, True).long(), expected(words, 8, 4))


def test_invalid_ptx_is_refused():
    with pytest.raises(KeyError):
        ptx_executor.execute("{ mul.f16x2 $0, $1, $1; }", 1, [torch.zeros(1).numpy().view("uint32")])
