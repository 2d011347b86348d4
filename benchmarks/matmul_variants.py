"""Variants that bench_matmul.py compares: our kernels, torch's int4 op, dense matrices, and a plain read."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch_int4
from torch import Tensor

from gptq_belle.bench.bandwidth import MIB
from gptq_belle.kernels import cpu_layout, cpu_matmul
from gptq_belle.kernels.cpu_layout import CpuWeight
from gptq_belle.kernels.cpu_matmul import CpuMatmul

GROUP = 128
ROTATED = 1024 * MIB  # bytes of weight copies per variant: twice the largest cache of the machines used
MOST_COPIES = 64
PORTION = 64 * MIB  # bytes of one plain read
READ, OURS = "plain read", "4 bit exact"

Multiply = Callable[[Tensor], Tensor]


class MatmulVariant(NamedTuple):
    """One variant: copies of a weight as functions of x (M, K), and the bytes of one copy."""

    copies: list[Multiply]
    bytes: int


def native(inputs: int, outputs: int, bits: int, copies: int, precision: str) -> MatmulVariant:
    """Random symmetric weights with groups of 128 in the layout of our CPU kernels."""
    groups, blocks = math.ceil(inputs / GROUP), math.ceil(outputs / cpu_layout.OUTPUT_MULTIPLE) * 2
    zero = 2 ** (bits - 1)

    def weight() -> CpuWeight:
        codes = cpu_layout.empty_codes(blocks, groups, GROUP * bits // 32).random_()
        scales = (torch.rand(blocks, groups, cpu_layout.BLOCK) * 0.01).half()
        g_idx = torch.arange(inputs, dtype=torch.int32) // GROUP
        return CpuWeight(codes, scales, None, None, g_idx, inputs, outputs, GROUP, bits, zero,
                         cpu_layout.ACTIVATION_PARTS[precision], bits, groups, 1)

    weights = [weight() for _ in range(copies)]
    return MatmulVariant([CpuMatmul(weight) for weight in weights], weights[0].codes.nbytes + weights[0].scales.nbytes)


def int4_of_torch(inputs: int, outputs: int, copies: int) -> MatmulVariant:
    """torch's int4 op on bfloat16 activations."""
    def weight() -> torch_int4.Int4Weight:
        codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return torch_int4.Int4Weight(packed, torch.rand(inputs // GROUP, outputs, 2).bfloat16(), None, GROUP)

    first = weight()
    weights = [first, *(first._replace(packed=first.packed.clone()) for _ in range(copies - 1))]
    return MatmulVariant([lambda x, w=w: torch_int4.quant_matmul(x, w) for w in weights],  # type: ignore[misc]
                   first.packed.nbytes + first.scale_and_shift.nbytes)


def dense(inputs: int, outputs: int, dtype: torch.dtype, copies: int) -> MatmulVariant:
    """The dequantized weight in a dense product (oneDNN or MKL)."""
    first = torch.empty(outputs, inputs, dtype=dtype).uniform_(-1, 1)
    weights = [first, *(first.clone() for _ in range(copies - 1))]
    return MatmulVariant([lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights],  # type: ignore[misc]
                   first.nbytes)


def plain_read() -> MatmulVariant:
    """A plain read of the parts of a buffer."""
    buffer = cpu_layout.empty_codes(1, 1, ROTATED // 64).flatten().random_()
    parts = buffer.split(PORTION)
    return MatmulVariant([lambda x, part=part: torch.tensor(cpu_matmul.read_memory(part)) for part in parts], PORTION)  # type: ignore[misc]


def copies_of(size: float) -> int:
    """Number of copies of `size` bytes that fill ROTATED bytes."""
    return max(2, min(MOST_COPIES, math.ceil(ROTATED / size)))


def activations(name: str, rows: int, inputs: int) -> Tensor:
    """Activations for a variant: bfloat16 if it computes in bfloat16, otherwise float32."""
    x = torch.randn(rows, inputs)
    return x.bfloat16() if "bfloat16" in name or "int4" in name else x


def variants_of(inputs: int, outputs: int) -> Iterator[dict[str, MatmulVariant]]:
    """Yield all variants of one shape in sets that fit into memory; each set includes our 4-bit product."""
    weights = inputs * outputs
    packed, full = copies_of(weights / 2), copies_of(weights * 2)
    exact, read = native(inputs, outputs, 4, packed, "exact"), plain_read()
    fast = native(inputs, outputs, 4, packed, "fast")
    yield {READ: read, OURS: exact, "4 bit fast": fast,
           "8 bit exact": native(inputs, outputs, 8, copies_of(weights), "exact"),
           "torch int4": int4_of_torch(inputs, outputs, packed),
           "dense bfloat16": dense(inputs, outputs, torch.bfloat16, full)}
    if weights < 2**28:
        yield {READ: read, OURS: exact, "dense float32": dense(inputs, outputs, torch.float32, copies_of(weights * 4))}
