"""Self-test of `doctor`: products of every kernel that this machine can run, compared with float64; two seconds."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.common.devices import threads
from gptq_belle.common.timers import seconds
from gptq_belle.errors import one_line
from gptq_belle.formats.gptq_weight import PackedWeight, dequantize, unpack
from gptq_belle.kernels import cpu_layout, cpu_matmul, dispatch, reference, triton_matmul
from gptq_belle.kernels.layout import CanonicalWeight, checked_weight
from gptq_belle.kernels.native_library import NativeLibrary, load_library

INPUTS, OUTPUTS, GROUP = 256, 160, 128
ROWS = (1, 5, 32)  # one token, a batch with an incomplete tile, a chunk of a prompt
# Allowed errors relative to the norm of the result: about three times the errors seen in tests.
EXACT, BYTE, HALF, FLOAT = 2e-4, 3e-2, 1e-2, 1e-5
Matmul = Callable[[Tensor], Tensor]


class KernelCheck(NamedTuple):
    """Check of one kernel on one kind of weight."""

    kernel: str
    case: str
    error: float  # the largest over ROWS, relative to the norm of the result
    allowed: float  # the largest error that passes
    seconds: float
    why_not: str | None  # message of an exception

    @property
    def passed(self) -> bool:
        """Whether the error is at most `allowed`; NaN does not pass."""
        return self.why_not is None and self.error <= self.allowed


def self_test(devices: Sequence[torch.device]) -> list[KernelCheck]:
    """Run every kernel of some devices on small random weights: asymmetric zero points, scales of both signs."""
    with threads(1):  # on a busy machine, several threads take thirty times as long
        checks = (_check_cpu() if device.type == "cpu" else _check_cuda(device) for device in devices)
        return [check for each in checks for check in each]


def _check_cpu() -> Iterator[KernelCheck]:
    found = load_library()
    for bits in (4, 8, 3, 2):
        packed = _random_weight(bits)
        words = checked_weight(*packed, bits, 0)
        if isinstance(found, NativeLibrary):
            for isa, (precision, allowed) in product(found.usable_isas, (("exact", EXACT), ("fast", BYTE))):
                yield _check(f"native {isa}", f"{bits} bit {precision}", packed, bits, allowed,
                             partial(_native_matmul, words, precision, isa))
        for name, multiply in (("groupwise", reference.groupwise_matmul), ("reference", reference.quant_matmul)):
            yield _check(name, f"{bits} bit", packed, bits, FLOAT, partial(_torch_matmul, words, multiply))


def _check_cuda(device: torch.device) -> Iterator[KernelCheck]:
    kernel = "triton" if triton_matmul.unavailable_reason(device) is None else "dequantize+matmul"
    for bits in (4, 8, 3, 2):
        packed = _random_weight(bits)
        for dtype, allowed in ((torch.float16, HALF), (torch.float32, FLOAT)):
            yield _check(kernel, f"{bits} bit {str(dtype).removeprefix('torch.')}", packed, bits, allowed,
                         partial(_dispatched_matmul, packed, bits, device, dtype))


def _native_matmul(words: CanonicalWeight, precision: str, isa: str) -> Matmul:
    weight = cpu_layout.prepare(words, precision)
    return lambda x: cpu_matmul.quant_matmul(x, weight, isa=isa)


def _torch_matmul(words: CanonicalWeight, multiply: Callable[[Tensor, CanonicalWeight], Tensor]) -> Matmul:
    return lambda x: multiply(x, words)


def _dispatched_matmul(packed: PackedWeight, bits: int, device: torch.device, dtype: torch.dtype) -> Matmul:
    weight = dispatch.prepare_tensors(*packed, bits, 0, device=device, dtype=dtype)

    def multiply(x: Tensor) -> Tensor:
        with reference.full_float32():
            return dispatch.quant_matmul(x.to(device, dtype), weight).cpu()

    return multiply


def _random_weight(bits: int) -> PackedWeight:
    """A packed weight of random words, hence with random codes and zero points."""
    draw = torch.Generator().manual_seed(bits)

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=draw)

    scales = torch.randn(INPUTS // GROUP, OUTPUTS, generator=draw).half()
    return PackedWeight(words(INPUTS * bits // 32, OUTPUTS), words(INPUTS // GROUP, OUTPUTS * bits // 32), scales,
                        torch.arange(INPUTS, dtype=torch.int32) // GROUP)


def _check(kernel: str, case: str, packed: PackedWeight, bits: int, allowed: float,
           make: Callable[[], Matmul]) -> KernelCheck:
    """Prepare the weight and multiply; an exception is a failed check."""
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
    except Exception as error:  # a kernel that cannot run fails the check
        return KernelCheck(kernel, case, float("nan"), allowed, 0.0, one_line(error))
    return KernelCheck(kernel, case, max(errors, key=lambda e: (e != e, e)), allowed, taken, None)
