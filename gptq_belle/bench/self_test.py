"""Two seconds of products with every kernel that this machine could take, each held against float64 arithmetic."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.common.timers import seconds
from gptq_belle.formats.gptq_weight import PackedWeight, dequantize, unpack
from gptq_belle.kernels import cpu_layout, cpu_matmul, dispatch, reference, triton_matmul
from gptq_belle.kernels.layout import CanonicalWeight, checked_weight
from gptq_belle.kernels.native_library import NativeLibrary, load_library

INPUTS, OUTPUTS, GROUP = 256, 160, 128
ROWS = (1, 5, 32)  # one token, a batch (its last tile is not full), a piece of a prompt
# Errors allowed, as a share of the result's norm: some three times what tests see.
EXACT, BYTE, HALF, FLOAT = 2e-4, 3e-2, 1e-2, 1e-5
Product = Callable[[Tensor], Tensor]


class Check(NamedTuple):
    """One kernel on one kind of weight; the error is the largest over ROWS, as a share of the result's norm."""

    kernel: str
    case: str
    error: float
    allowed: float
    seconds: float
    why_not: str | None  # what it raised, where it did

    @property
    def passed(self) -> bool:
        """Whether it multiplies rightly; an error that is no number does not pass."""
        return self.why_not is None and self.error <= self.allowed


def self_test(kinds: Sequence[str]) -> list[Check]:
    """Run every kernel of "cpu" or "cuda" on small random weights: asymmetric zero points, scales of both signs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # beside other programs, threads that wait for each other take thirty times as long
    try:
        return [check for kind in kinds for check in (_on_cpu() if kind == "cpu" else _on_cuda())]
    finally:
        torch.set_num_threads(threads)


def _on_cpu() -> Iterator[Check]:
    found = load_library()
    for bits in (4, 8, 3, 2):
        packed = _random(bits)
        words = checked_weight(*packed, bits, 0)
        if isinstance(found, NativeLibrary):
            for isa, (precision, allowed) in product(found.usable_isas, (("exact", EXACT), ("fast", BYTE))):
                yield _check(f"native {isa}", f"{bits} bit {precision}", packed, bits, allowed,
                             partial(_native, words, precision, isa))
        for name, multiply in (("groupwise", reference.groupwise_matmul), ("reference", reference.quant_matmul)):
            yield _check(name, f"{bits} bit", packed, bits, FLOAT, partial(_plain, words, multiply))


def _on_cuda() -> Iterator[Check]:
    device = torch.device("cuda", 0)
    kernel = "triton" if triton_matmul.unavailable_reason(device) is None else "dequantize+matmul"
    for bits in (4, 8, 3, 2):
        packed = _random(bits)
        for dtype, allowed in ((torch.float16, HALF), (torch.float32, 1e-3)):  # TF32 may be switched on
            yield _check(kernel, f"{bits} bit {str(dtype).removeprefix('torch.')}", packed, bits, allowed,
                         partial(_dispatched, packed, bits, device, dtype))


def _native(words: CanonicalWeight, precision: str, isa: str) -> Product:
    weight = cpu_layout.prepare(words, precision)
    return lambda x: cpu_matmul.quant_matmul(x, weight, isa=isa)


def _plain(words: CanonicalWeight, multiply: Callable[[Tensor, CanonicalWeight], Tensor]) -> Product:
    return lambda x: multiply(x, words)


def _dispatched(packed: PackedWeight, bits: int, device: torch.device, dtype: torch.dtype) -> Product:
    weight = dispatch.prepare_tensors(*packed, bits, 0, device=device, dtype=dtype)
    return lambda x: dispatch.quant_matmul(x.to(device, dtype), weight).cpu()


def _random(bits: int) -> PackedWeight:
    """A linear whose words are drawn at random, so that zero points are, too."""
    draw = torch.Generator().manual_seed(bits)

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=draw)

    scales = torch.randn(INPUTS // GROUP, OUTPUTS, generator=draw).half()
    return PackedWeight(words(INPUTS * bits // 32, OUTPUTS), words(INPUTS // GROUP, OUTPUTS * bits // 32), scales,
                        torch.arange(INPUTS, dtype=torch.int32) // GROUP)


def _check(kernel: str, case: str, packed: PackedWeight, bits: int, allowed: float,
           make: Callable[[], Product]) -> Check:
    """Lay out and multiply; whatever is raised is a check that was not passed."""
    errors: list[float] = []

    def run() -> None:
        multiply = make()
        weight = dequantize(unpack(packed, bits, "gptq_v2")).double()
        for rows in ROWS:
            x = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(rows))
            expected = x.double() @ weight.t()
            errors.append(float((multiply(x).double() - expected).norm() / expected.norm()))

    try:
        taken = seconds(run)
    except Exception as error:  # a kernel that cannot even run is what this looks for
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return Check(kernel, case, float("nan"), allowed, 0.0, reason)
    return Check(kernel, case, max(errors, key=lambda e: (e != e, e)), allowed, taken, None)
