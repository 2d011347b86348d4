"""Compile Triton kernels ahead of time for a GPU that need not be present, and analyse their machine code.

Registers and stack come from `cuobjdump -res-usage`, instructions from `cuobjdump -sass`; both are part of Triton's
wheel. Time, bank conflicts, races and launch overhead cannot be seen this way.
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
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")  # instructions that multiply matrices: of a warp, of four, of a program on 10.0
_WGMMA = re.compile(r"\.(\d+)x(\d+)x(\d+)\.")


class Instruction(NamedTuple):
    """One line of machine code."""

    address: int
    name: str  # with its modifiers, "LDGSTS.E.BYPASS.128"
    operands: str

    @property
    def kind(self) -> str:
        """The name without modifiers; copies to shared memory keep their width: "LDGSTS.128"."""
        first, *modifiers = self.name.split(".")
        return f"LDGSTS.{modifiers[-1] if modifiers[-1] in ('64', '128') else '32'}" if first == "LDGSTS" else first


class Turn(NamedTuple):
    """What a program does in one iteration of its main loop."""

    numbers: int  # weights, or numbers of the KV cache, that it reads
    products: int  # multiplications of the matrix instructions, padding included
    warps: int


class MachineCode(NamedTuple):
    """Resource usage and instructions of a compiled kernel."""

    registers: int  # per thread
    stack: int  # bytes of stack per thread: above 0, registers spilled
    local: int  # bytes of local memory per thread: above 0, registers spilled
    shared: int  # bytes per program
    loop: Counter[str]  # main-loop instructions by kind; empty if no loop multiplies matrices
    products: int  # multiplications of all warps in one iteration of the loop; 0 if no instruction states its size
    unordered_tickets: int = 0  # see `unordered_tickets`

    def per_number(self, turn: Turn) -> float | None:
        """Instructions of the main loop per thread and number that it reads; None if that is unknown."""
        if not self.products:
            return None
        iterations = self.products / turn.products  # more than one if the loop is unrolled
        return sum(self.loop.values()) / iterations / (turn.numbers / (WARP * turn.warps))

    @property
    def matrix_instructions(self) -> int:
        """How many instructions of the loop multiply matrices."""
        return sum(self.loop[kind] for kind in MATRIX)


def compile_kernel(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], arch: int,
                   options: Mapping[str, Any]) -> MachineCode:
    """Compile a kernel for a compute capability; no GPU is needed.

    Args:
        kernel: a function decorated with triton.jit.
        types: Triton's type of every argument that is not a constant: "*fp16", "i32". Pointers are assumed to be
            aligned, and integers that the kernel may be specialized for to be multiples of 16, as in every model;
            otherwise the compiler emits narrow loads.
        constants: the constexpr arguments.
        arch: 86 for 8.6.
        options: num_warps, num_stages, enable_fp_fusion.
    Raises:
        Exception: errors of Triton and ptxas propagate.
    """
    names = list(inspect.signature(kernel.fn).parameters)
    specialized = [i for i, parameter in enumerate(kernel.params)
                   if not parameter.do_not_specialize and types.get(names[i]) not in (None, "fp32")]
    source = ASTSource(
        fn=kernel, signature={name: types.get(name, "constexpr") for name in names}, constexprs=dict(constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in specialized})
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, WARP), options=dict(options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (subprocess.run([TOOL, flag, file.name], check=True, capture_output=True, text=True).stdout
                       for flag in ("-res-usage", "-sass"))
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    code = instructions(sass)
    loop = main_loop(code)
    return MachineCode(used["REG"], used["STACK"], used["LOCAL"], compiled.metadata.shared,
                       Counter(one.kind for one in loop), products(loop, options["num_warps"]), unordered_tickets(code))


def instructions(sass: str) -> list[Instruction]:
    """The instructions that `cuobjdump -sass` prints."""
    return [Instruction(int(address, 16), name, operands) for address, name, operands in _INSTRUCTION.findall(sass)]


def unordered_tickets(code: list[Instruction]) -> int:
    """Number of tickets (atomic additions) that do not order the memory of a program's threads.

    Before the ticket all threads must have stored (BAR) and the stores be visible to the device (MEMBAR); after it, the
    first-level cache must be emptied (CCTL.IVALL) before all threads load what others have stored (BAR).
    """
    names = [one.name for one in code
             if one.kind in ("BAR", "MEMBAR", "ATOMG", "CCTL") and one.name != "MEMBAR.ALL.CTA"]
    tickets = [at for at, name in enumerate(names) if name.startswith("ATOMG") and ".ADD." in name]
    around = ([*names[max(0, at - 2) : at], *names[at + 1 : at + 3]] for at in tickets)
    return sum([name.rsplit(".", 1)[-1] if "BAR.SYNC" not in name else "BAR" for name in four] !=
               ["BAR", "GPU", "IVALL", "BAR"] for four in around)


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The longest loop (from a backward branch to its target) that multiplies matrices; empty if there is none."""
    best: list[Instruction] = []
    for branch in code:
        target = _TARGET.search(branch.operands) if branch.name.startswith("BRA") else None
        if target is None or int(target.group(1), 16) >= branch.address:
            continue
        loop = [one for one in code if int(target.group(1), 16) <= one.address <= branch.address]
        if len(loop) > len(best) and any(one.kind in MATRIX for one in loop):
            best = loop
    return best


def products(code: list[Instruction], warps: int) -> int:
    """Number of multiplications of these instructions when `warps` warps run them.

    HMMA.16816 is 16 x 8 x 16 per warp; HGMMA.64x8x16 has its size in its name, and four warps share it.
    """
    total = 0
    for one in code:
        if one.kind == "HMMA":
            total += {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8}[one.name.split(".")[1]] * warps
        elif one.kind == "HGMMA" and (size := _WGMMA.search(one.name)):
            total += int(size.group(1)) * int(size.group(2)) * int(size.group(3)) * max(1, warps // 4)
    return total
