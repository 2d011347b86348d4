"""What a Triton kernel becomes on a GPU that is not here: compiled ahead of time, and its machine code read.

Registers and stack come from `cuobjdump -res-usage`, instructions from `cuobjdump -sass`; both tools are in Triton's
wheel. What cannot be seen this way: time, bank conflicts, races, launch overhead.
"""

import inspect
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
WARP = 32
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);")
_TARGET = re.compile(r"\b0x([0-9a-f]+)")
_WGMMA = re.compile(r"\.(\d+)x(\d+)x(\d+)\.")


class Instruction(NamedTuple):
    """One line of machine code."""

    address: int
    name: str  # with its modifiers, "LDGSTS.E.BYPASS.128"
    operands: str

    @property
    def kind(self) -> str:
        """The name without modifiers, but for copies to shared memory, which keep their width: "LDGSTS.128"."""
        first, *modifiers = self.name.split(".")
        return f"LDGSTS.{modifiers[-1] if modifiers[-1] in ('64', '128') else '32'}" if first == "LDGSTS" else first


class MachineCode(NamedTuple):
    """What the compiler made of a kernel."""

    registers: int  # a thread
    stack: int  # bytes of a thread's stack: anything above 0 is registers that did not fit
    local: int  # likewise
    shared: int  # bytes a program
    loop: Counter[str]  # instructions of the main loop by kind; empty where no loop multiplies matrices
    products: int  # multiplications in one turn of the loop, by all warps together


def compile_kernel(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], arch: int,
                   options: Mapping[str, Any]) -> MachineCode:
    """Compile for a compute capability, with no GPU needed.

    Args:
        kernel: of triton.jit.
        types: Triton's type of every argument that is no constant: "*fp16", "i32". Pointers are taken to be aligned,
            and integers that the kernel may be specialized for to be multiples of 16, as they are in every model;
            without that, loads come out narrow.
        constants: the constexpr arguments.
        arch: 86 for 8.6.
        options: num_warps, num_stages, enable_fp_fusion.
    Raises:
        whatever Triton and ptxas raise.
    """
    names = list(inspect.signature(kernel.fn).parameters)
    specialized = [i for i, parameter in enumerate(kernel.params) if not parameter.do_not_specialize]
    source = ASTSource(
        fn=kernel, signature={name: types.get(name, "constexpr") for name in names}, constexprs=dict(constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in specialized if names[i] in types})
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, WARP), options=dict(options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (subprocess.run([TOOL, flag, file.name], check=True, capture_output=True, text=True).stdout
                       for flag in ("-res-usage", "-sass"))
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    loop = main_loop(instructions(sass))
    return MachineCode(used["REG"], used["STACK"], used["LOCAL"], compiled.metadata.shared,
                       Counter(one.kind for one in loop), products(loop, options["num_warps"]))


def instructions(sass: str) -> list[Instruction]:
    """The instructions that `cuobjdump -sass` prints."""
    return [Instruction(int(address, 16), name, operands) for address, name, operands in _INSTRUCTION.findall(sass)]


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The longest stretch from a branch back to its target that multiplies matrices; empty where there is none."""
    best: list[Instruction] = []
    for branch in code:
        target = _TARGET.search(branch.operands) if branch.name.startswith("BRA") else None
        if target is None or int(target.group(1), 16) >= branch.address:
            continue
        loop = [one for one in code if int(target.group(1), 16) <= one.address <= branch.address]
        if len(loop) > len(best) and products(loop, 1):
            best = loop
    return best


def products(code: list[Instruction], warps: int) -> int:
    """Multiplications that instructions do when `warps` warps run them.

    HMMA.16816 takes 16 x 8 x 16 a warp; HGMMA.64x8x16 says its size, which four warps do together.
    """
    total = 0
    for one in code:
        if one.kind == "HMMA":
            total += {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8}[one.name.split(".")[1]] * warps
        elif one.kind == "HGMMA" and (size := _WGMMA.search(one.name)):
            total += int(size.group(1)) * int(size.group(2)) * int(size.group(3)) * max(1, warps // 4)
    return total
