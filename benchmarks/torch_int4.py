"""torch's own 4-bit matmul for CPUs, in bfloat16, for comparison.

The op computes ``sum_k x[k] * ((code - 8) * scale + shift)`` with one (scale, shift) pair per group of neighbouring
inputs, so any zero point is a shift of ``scale * (8 - zero)``. Rows of an act-order weight are sorted by group once,
and x is gathered in that order. Scales and shifts are rounded to bfloat16; sums are in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.kernels.layout import CanonicalWeight, longest_run
from gptq_belle.kernels.reference import unpack

COLUMNS = 16  # N must be a multiple


class Int4Weight(NamedTuple):
    """A weight in the op's layout; K inputs, N outputs, `run` neighbouring inputs share a scale."""

    packed: Tensor  # (N, K / 2) uint8, opaque
    scale_and_shift: Tensor  # (K / run, N, 2) bfloat16
    order: Tensor | None  # (K,) int32: the inputs sorted by group; None if they are sorted already
    run: int

    @property
    def in_features(self) -> int:
        """K."""
        return self.packed.shape[1] * 2

    @property
    def out_features(self) -> int:
        """N."""
        return self.packed.shape[0]


def is_supported(weight: CanonicalWeight) -> bool:
    """Whether the op supports a weight: 4 bits, N a multiple of 16, groups of whole runs of inputs."""
    return (weight.bits == 4 and weight.out_features % COLUMNS == 0
            and longest_run(weight.g_idx.sort().values) > 0)


def prepare(weight: CanonicalWeight) -> Int4Weight:
    """Repack a weight on the CPU; `is_supported` holds."""
    groups, order = weight.g_idx.sort(stable=True)
    run = longest_run(groups)
    codes = unpack(weight.qweight, weight.bits)
    in_order = bool((order[1:] > order[:-1]).all())
    if not in_order:
        codes = codes[order]
    zeros = unpack(weight.qzeros.t(), weight.bits).t().float() + weight.zero_offset
    scales = weight.scales.float()
    pairs = torch.stack((scales, scales * (8 - zeros)), dim=-1)[groups[::run]].to(torch.bfloat16)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.t().contiguous(), 1)
    return Int4Weight(packed, pairs.contiguous(), None if in_order else order.int(), run)


def quant_matmul(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times the weight (K, N), plus bias (N,), in x's dtype; activations are rounded to bfloat16.

    In other dtypes the op takes a scalar path that is 30 times slower.
    """
    rows = x.reshape(-1, weight.in_features).to(torch.bfloat16)
    if weight.order is not None:
        rows = rows.index_select(1, weight.order)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), weight.packed, weight.run, weight.scale_and_shift)
    if bias is not None:
        y += bias.to(y.dtype)
    return y.to(x.dtype).view(*x.shape[:-1], weight.out_features)


class Int4Linear(torch.nn.Module):
    """A linear layer on the op: x (..., K) to (..., N), in x's dtype."""

    def __init__(self, weight: CanonicalWeight, bias: Tensor | None) -> None:
        super().__init__()
        self._weight, self._bias = prepare(weight), bias

    def forward(self, x: Tensor) -> Tensor:
        """The product plus bias."""
        return quant_matmul(x, self._weight, self._bias)
