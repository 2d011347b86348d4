"""The PTX that the unpacking assembly is written in, executed by NumPy on many threads at a time.

Every register is an array of 32 bits, an element a thread. Semantics follow the PTX ISA manual, chapter "Instruction
Set"; an instruction, a modifier or an operand that is not known here is refused.
"""

import re

import numpy as np
import triton.language as tl
from bfloat16_interpreter import floats, rounded
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_STATEMENT = re.compile(r"^([a-z0-9.]+)\s+(.*)$")


def lop3(a, b, c, table):
    """Any function of three bits: bit 4 a + 2 b + c of `table` is its value."""
    result = np.zeros_like(a)
    for place in range(8):
        if int(table[0]) >> place & 1:
            result |= (a if place & 4 else ~a) & (b if place & 2 else ~b) & (c if place & 1 else ~c)
    return result


def shr(a, amount):
    """Logical; amounts above 31 leave nothing."""
    return np.where(amount > 31, 0, a >> np.minimum(amount, 31)).astype(np.uint32)


def prmt(a, b, selector):
    """Each nibble of the selector names a byte of b:a; its top bit, which repeats the byte's sign, is not used here."""
    both = np.stack([source >> shift & 0xFF for source in (a, b) for shift in (0, 8, 16, 24)])
    chosen = [selector >> shift & 0xF for shift in (0, 4, 8, 12)]
    assert all((one < 8).all() for one in chosen)
    return sum(np.take_along_axis(both, one[None].astype(np.int64), 0)[0] << 8 * place
               for place, one in enumerate(chosen)).astype(np.uint32)


def halves(bits):
    """Lower and upper 16 bits of registers, (2, ...)."""
    return np.stack([bits & 0xFFFF, bits >> 16]).astype(np.uint16)


def joined(parts):
    """Registers of their lower and upper halves."""
    low, high = parts.astype(np.uint32)
    return low | high << 16


def half_floats(bits):
    return halves(bits).view(np.float16)


def sub_f16x2(a, b):
    return joined((half_floats(a) - half_floats(b)).view(np.uint16))


def fma_f16x2(a, b, c):
    """A product of two 11-bit numbers is exact in float64; so is the sum, but for very unequal sizes."""
    a, b, c = (half_floats(one).astype(np.float64) for one in (a, b, c))
    return joined((a * b + c).astype(np.float16).view(np.uint16))


def fma_bf16x2(a, b, c):
    """The sum has to be exact in float32, so that it is rounded once: asserted."""
    a, b, c = (floats(halves(one)).astype(np.float64) for one in (a, b, c))
    total = a * b + c
    assert (total.astype(np.float32) == total).all()
    return joined(rounded(total.astype(np.float32)))


def sub_f32(a, b):
    return (a.view(np.float32) - b.view(np.float32)).view(np.uint32)


def cvt_bf16x2(high, low):
    """The first operand goes to the upper half."""
    return joined(np.stack([rounded(one.view(np.float32)) for one in (low, high)]))


INSTRUCTIONS = {
    "mov.b32": lambda a: a.copy(), "shr.b32": shr, "lop3.b32": lop3, "prmt.b32": prmt, "sub.f16x2": sub_f16x2,
    "fma.rn.f16x2": fma_f16x2, "fma.rn.bf16x2": fma_bf16x2, "sub.f32": sub_f32, "cvt.rn.bf16x2.f32": cvt_bf16x2,
}


def execute(assembly, outputs, inputs):
    """Run assembly as written in an inline_asm: $0.. are outputs, then inputs.

    Args:
        assembly: statements in braces.
        outputs: how many.
        inputs: uint32 arrays of one shape.
    Returns:
        outputs as uint32 arrays; one that was never written is missed loudly.
    """
    registers = {f"${outputs + place}": value for place, value in enumerate(inputs)}
    declared = set()
    for statement in assembly.strip().removeprefix("{").removesuffix("}").split(";"):
        if not (line := statement.strip()):
            continue
        if line.startswith(".reg"):
            declared |= {name.strip() for name in line.split(None, 2)[2].split(",")}
            continue
        name, operands = _STATEMENT.match(line).groups()
        target, *sources = (operand.strip() for operand in operands.split(","))
        assert target in declared or target in {f"${place}" for place in range(outputs)}, f"{target} is not declared"
        values = [registers[one] if one in registers else np.full_like(inputs[0], int(one, 0)) for one in sources]
        registers[target] = INSTRUCTIONS[name](*(value.ravel() for value in values)).reshape(inputs[0].shape)
    return [registers[f"${place}"] for place in range(outputs)]


class _Results:
    def __init__(self, handles):
        self.handles = handles

    def get_result(self, place):
        return self.handles[place]


def create_inline_asm(self, assembly, constraints, values, types, is_pure, pack):
    """What Triton's interpreter lacks, for arguments and results of 16 and 32 bits and two elements a thread.

    Neighbouring elements of 16 bits share a register, the first in the lower half; those of 32 bits follow each other.
    """
    assert pack == 2
    wanted = constraints.split(",")
    inputs = [register for value in values for register in _registers(value.data)]
    assert wanted == ["=r"] * len(types) + ["f" if register.dtype == np.float32 else "r" for register in inputs]
    found = execute(assembly, len(types), [np.ascontiguousarray(register).view(np.uint32) for register in inputs])
    shape = values[0].data.shape
    results = [halves(bits).T.reshape(shape) for bits in found]
    return _Results([TensorHandle(result if kind.scalar == tl.bfloat16 else result.view(np.float16), kind.scalar)
                     for result, kind in zip(results, types, strict=True)])


def _registers(data):
    pairs = np.ascontiguousarray(data).reshape(-1, 2)
    if data.dtype.itemsize == 2:
        return [joined(pairs.view(np.uint16).T)]
    assert data.dtype == np.float32
    return [pairs[:, 0], pairs[:, 1]]


def teach():
    """Let Triton's interpreter run inline assembly."""
    InterpreterBuilder.create_inline_asm = create_inline_asm
