"""Run one Triton kernel in the interpreter on tensors that end, or begin, at memory which must not be accessed.

    TRITON_INTERPRET=1 python guard_pages.py skinny

Every tensor that the kernel is given, the launcher's buffers included, is followed by a page without access rights, or
preceded by one. A kernel that reads or writes past a tensor ends this process with SIGSEGV, so `test_triton_bounds.py`
runs it as a child process. Each case is printed before it runs.
"""

import ctypes
import faulthandler
import itertools
import mmap
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptq_belle.bench.kernel_tuning import VARIED
from gptq_belle.kernels import triton_gptq, triton_matmul
from gptq_belle.kernels.triton_config import LaunchPlan, TileConfig
from gptq_belle.kernels.triton_launch import Workspace
from gptq_belle.kernels.triton_layout import SlicedWeight, block_inputs
from gptq_belle.kernels.triton_norm import FoldedNorm, NextNorm
from gptq_belle.kernels.triton_skinny_launch import skinny_launch, skinny_workspace

PAGE, PROT_NONE = mmap.PAGESIZE, 0
UNINITIALIZED = 0xFF  # in every byte: NaN in each floating dtype, -1 in integers
FORMATS = list(itertools.product((4, 8), (32, 64, 128), ("one", "each")))  # bits of a code, run, zero points
SPLITS = (*VARIED["SPLIT_K"], 9)  # those of the rule and the tuner, and another one that a table may name
OUTPUTS = 72  # end inside a tile, and not at the end of the 128 padded outputs
libc = ctypes.CDLL(None, use_errno=True)


def guarded(tensor, before=False):
    """A copy of a tensor whose end (with `before`, whose beginning) is the border of an inaccessible page."""
    size = -(-tensor.nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, size + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + PAGE + size):
        if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    start = PAGE if before else PAGE + size - tensor.nbytes
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    return copy.copy_(tensor)


class GuardedBuffers(TorchDispatchMode):
    """Within it, tensors that torch leaves uninitialized are guarded and filled with NaN."""

    def __init__(self, before):
        super().__init__()
        self.before = before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function not in (torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default) or not result.numel():
            return result
        result = guarded(result, self.before)
        result.view(torch.uint8).fill_(UNINITIALIZED)
        return result


def random_weight(bits, run, zero, blocks, before, outputs=OUTPUTS, missing=0):
    """A guarded weight of `blocks` blocks; the last `missing` places of an act-order one are padding."""
    block, columns = block_inputs(bits, run), -(-outputs // 128) * 128
    places = blocks * block
    words = torch.randint(-(2**15), 2**15, (blocks, columns, block * bits // 16), dtype=torch.int16)
    scales = torch.rand(places // run, columns).half()
    zeros = None if zero == "one" else guarded(torch.randint(0, 2**bits + 1, scales.shape).half(), before)
    order = None
    if missing:
        order = guarded(torch.cat([torch.randperm(places - missing), torch.full((missing,), -1)]).int(), before)
    return SlicedWeight(guarded(words, before), guarded(scales, before), zeros, order, torch.empty(0), places - missing,
                        outputs, run, bits, 2 ** (bits - 1) if zero == "one" else -1, bits, 0, 0)


def multiply(plan, rows, bits, run, zero, blocks, before, missing=0, dtype=torch.float16):
    """One product by a plan (None: the one that is chosen for it), all its tensors guarded."""
    weight = random_weight(bits, run, zero, blocks, before, missing=missing)
    x = guarded(torch.randn(rows, weight.in_features).to(dtype), before)
    bias = guarded(torch.randn(OUTPUTS).half(), before) if rows % 2 else None
    with GuardedBuffers(before):
        y = triton_matmul.quant_matmul(x, weight, bias, plan)
    assert y.isfinite().all(), "uninitialized memory was read"


def skinny():
    """The kernel for few rows: every split with every format, every number of rows, every tile."""
    for number, (parts, (bits, run, zero)) in enumerate(itertools.product(SPLITS[:7], FORMATS)):
        plan = LaunchPlan("skinny", TileConfig(8, 64, 128, parts, 4, 4))
        yield multiply, plan, 1 + number % 8, bits, run, zero, 5, number % 7 == 0
    for parts in SPLITS[::2]:
        yield multiply, LaunchPlan("skinny", TileConfig(8, 128, 64, parts, 4, 4)), 3, 4, 128, "each", 17, False
        yield multiply, LaunchPlan("skinny", TileConfig(8, 32, 128, parts, 4, 4, 4)), 3, 8, 64, "each", 6, parts == 3
    tiles = itertools.cycle(itertools.product((32, 64, 128), (64, 128)))
    for rows, (bn, bk) in zip(range(1, 65), tiles, strict=False):
        rows_of_tile = next(bm for bm in (8, 16, 32, 64) if rows <= bm)
        plan = LaunchPlan("skinny", TileConfig(rows_of_tile, bn, bk, 2, 4, 4)) if rows % 3 else None
        yield multiply, plan, rows, *FORMATS[rows % len(FORMATS)], 3, rows % 5 == 0


def folded(bits, run, activation, rows, config, before):
    """A product with a norm before it, an activation or residual, and a norm after it; everything is guarded."""
    weight = random_weight(bits, run, "each", 5, before, 80)

    def tensor(*shape, dtype=torch.float32):
        return guarded(torch.rand(shape).to(dtype), before)

    norm = FoldedNorm(tensor(2, 3, rows), None if activation == "silu_mul" else tensor(80), 1e-5, 80, 32)
    outputs = 40 if activation == "silu_mul" else 80
    places = guarded(torch.randperm(outputs).int(), before)
    out, following = tensor(rows, outputs, dtype=torch.float16), None
    if activation == "none":
        following = NextNorm(tensor(80), places, tensor(rows, 80, dtype=torch.float16),
                             tensor(2, -(-80 // config.BN), rows))
    sums, tickets = skinny_workspace(rows, 80, config)
    workspace = Workspace(tensor(sums), guarded(torch.zeros(tickets, dtype=torch.int32), before)) if sums else None
    skinny_launch(tensor(rows, weight.places, dtype=torch.float16), weight, out, config, workspace, bias=tensor(80),
                  residual=out if activation == "none" else None, activation=activation, places=places, norm=norm,
                  next_norm=following)()
    assert not out.isnan().any(), "uninitialized memory was read"


def epilogue():
    """The kernel for few rows with all that a decode step folds into it."""
    configs = (TileConfig(8, 64, 128, 3, 2, 4), TileConfig(8, 32, 128, 1, 4, 4, 4), TileConfig(8, 32, 128, 2, 4, 4, 2))
    for before, activation, config in itertools.product((False, True), ("none", "gelu", "silu_mul"), configs):
        yield folded, 8 if before else 4, 32, activation, 3, config, before


def gemm():
    """The kernel for many rows: every format and split, every tile."""
    for number, (bits, run, zero) in enumerate(FORMATS):
        plan = LaunchPlan("gemm", TileConfig(64, 64, 128, SPLITS[number % len(SPLITS)], 8, 3))
        yield multiply, plan, 60 + number, bits, run, zero, 5, number % 7 == 0
    for bm, bn, bk in itertools.product((64, 128), (64, 128), (64, 128)):
        yield multiply, LaunchPlan("gemm", TileConfig(bm, bn, bk, 2, 8, 3)), bm + 1, 4, 128, "each", 3, bk == 64
    yield multiply, None, 65, 4, 64, "each", 9, False


def reduce():
    """The sum over the parts of a split K, with a bias and without."""
    for rows, parts in itertools.product((1, 2), SPLITS[::3]):
        yield multiply, LaunchPlan("gemm", TileConfig(64, 64, 128, parts, 8, 3)), rows, 8, 32, "one", 16, rows == 2


def place(rows, missing, before):
    """Activations at the places of an act-order weight whose last places are padding."""
    weight = random_weight(4, 32, "one", 9, before, missing=missing)
    x = guarded(torch.randn(rows, weight.in_features).half(), before)
    with GuardedBuffers(before):
        arranged = x.new_empty(rows, weight.places)
        triton_matmul.arrange_launch(x, weight, arranged)()
        assert arranged.isfinite().all()


def arrange():
    """Activations in the order of an act-order weight."""
    for before, rows, missing in itertools.product((False, True), (1, 2, 9), (1, 32, 100)):
        yield place, rows, missing, before


def expand(bits, run, zero, dtype, outputs, start, before):
    """The weight of outputs start, start + 1, ... in a guarded tensor."""
    weight = random_weight(bits, run, zero, 3, before, outputs)
    out = guarded(torch.full((128, weight.places), torch.nan, dtype=dtype), before)
    triton_matmul.dequantize(weight, start, out)
    assert out.isfinite().all(), "not all of the weight was written"


def dequant():
    """Expanding the weight, on its own and as part of a product."""
    for before, kind, dtype in itertools.product((False, True), FORMATS, (torch.float16, torch.float32)):
        yield expand, *kind, dtype, 130, 128, before
    for rows in (1, 65):
        yield multiply, LaunchPlan("expand", None), rows, 4, 64, "each", 3, False
        yield multiply, None, rows, 4, 64, "each", 3, False, 0, torch.float32


def solve(inputs, outputs, group, bits, sym, before):
    """One block of GPTQ."""
    W = guarded(torch.randn(inputs, outputs), before)
    factor = guarded(torch.eye(inputs) + torch.rand(inputs, inputs).triu(1) / inputs, before)
    codes = guarded(torch.zeros(inputs, outputs, dtype=torch.uint8), before)
    errors = guarded(torch.empty_like(W), before)
    shape = (inputs // group if group else inputs if sym else 1, outputs)
    scales, zeros = guarded(torch.rand(shape) + 0.1, before), guarded(torch.zeros(shape), before)
    triton_gptq.solve_block(W, factor, codes, errors, scales, zeros, group=group, bits=bits, sym=sym)
    assert errors.isfinite().all()


def gptq():
    """The inner loop of GPTQ."""
    for (inputs, group), outputs in itertools.product(((96, 32), (64, 64), (128, 128), (77, 0)), (5, 33)):
        yield solve, inputs, outputs, group, 4, outputs == 5, False
    yield solve, 5, 32, 0, 4, False, True
    yield solve, 32, 32, 32, 4, True, True


def sweep(inputs, outputs, before):
    """One sweep of coordinate descent."""
    code, residual = (guarded(torch.zeros(inputs, outputs), before) for _ in range(2))
    scale, zero = guarded(torch.rand(outputs) + 0.1, before), guarded(torch.zeros(outputs), before)
    hessian, diagonal = guarded(torch.eye(inputs), before), guarded(torch.ones(inputs), before)
    triton_gptq.descend(code, scale, zero, residual, hessian, diagonal, 4)
    assert code.isfinite().all()


def descent():
    """Coordinate descent."""
    for before, inputs, outputs in itertools.product((False, True), (1, 77), (5, 33)):
        yield sweep, inputs, outputs, before


def overrun(before):
    """Read the element after a guarded tensor, or the one before it: SIGSEGV."""
    tensor = guarded(torch.zeros(100), before)
    print(ctypes.c_float.from_address(tensor.data_ptr() + (-4 if before else tensor.nbytes)))


CASES = {"skinny": skinny, "epilogue": epilogue, "gemm": gemm, "reduce": reduce, "arrange": arrange,
         "dequant": dequant, "gptq": gptq, "descent": descent,
         "overrun_after": lambda: [(overrun, False)], "overrun_before": lambda: [(overrun, True)]}

if __name__ == "__main__":
    faulthandler.enable()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for function, *arguments in CASES[sys.argv[1]]():
        print(function.__name__, *arguments, flush=True)
        function(*arguments)
