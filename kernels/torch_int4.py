"""torch's own 4-bit matmul for CPUs: fast for bfloat16 activations, with group size and N as its checks allow.

The op computes ``sum_k x[k] * ((code - 8) * scale + shift)`` with one (scale, shift) pair a group of neighbouring
inputs, so any zero point is a shift of ``scale * (8 - zero)``. Rows of an act-order weight are sorted by group once,
and x is gathered in that order. Scales and shifts are rounded to bfloat16 (relative error at most 2**-9, as much as
the rounding of x itself costs); sums are in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import CanonicalWeight
from .reference import unpack

GROUP_SIZES = (256, 128, 64, 32)  # what the op takes, best first
COLUMNS = 16  # N must be a multiple


class Int4Weight(NamedTuple):
    """A weight in the op's own layout; K inputs, N outputs, runs of `group_size` inputs share a scale."""

    packed: Tensor  # (N, K / 2) uint8, opaque
    scale_and_shift: Tensor  # (K / group_size, N, 2) bfloat16
    order: Tensor | None  # (K,) int32: the input that stands at each place; None where they stand in order
    group_size: int

    @property
    def in_features(self) -> int:
        """K."""
        return self.packed.shape[1] * 2

    @property
    def out_features(self) -> int:
        """N."""
        return self.packed.shape[0]


def refusal(bits: int, g_idx: Tensor, out_features: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the op does not serve this case, or None where it does; arguments as in `dispatch.choose`."""
    if device.type != "cpu":
        return f"torch's int4 kernel here is for CPUs, not {device.type}"
    if dtype != torch.bfloat16:
        return f"torch's int4 kernel is slow for {dtype}: choose torch.bfloat16"
    if bits != 4:
        return f"torch's int4 kernel takes 4 bits, not {bits}"
    if out_features % COLUMNS:
        return f"torch's int4 kernel takes outputs in multiples of {COLUMNS}, not {out_features}"
    if group_run(g_idx) is None:
        return f"torch's int4 kernel takes groups that are multiples of {GROUP_SIZES[-1]} inputs"
    return None


def group_run(g_idx: Tensor) -> int | None:
    """The longest run of GROUP_SIZES into which the inputs, sorted by group, fall without mixing groups."""
    groups = g_idx.sort().values
    for size in GROUP_SIZES:
        if groups.numel() % size == 0 and bool((groups.view(-1, size) == groups.view(-1, size)[:, :1]).all()):
            return size
    return None


def prepare(weight: CanonicalWeight) -> Int4Weight:
    """Repack a weight on the CPU that `refusal` lets through."""
    groups, order = weight.g_idx.sort(stable=True)
    size = group_run(weight.g_idx)
    assert size is not None
    codes = unpack(weight.qweight, weight.bits)[order]
    zeros = unpack(weight.qzeros.t(), weight.bits).t().float() + weight.zero_offset
    scales = weight.scales.float()
    pairs = torch.stack((scales, scales * (8 - zeros)), dim=-1)[groups[::size]].to(torch.bfloat16)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.t().contiguous(), 1)
    in_order = bool((order[1:] > order[:-1]).all())
    return Int4Weight(packed, pairs.contiguous(), None if in_order else order.int(), size)


def quant_matmul(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times the weight (K, N), plus bias (N,), in x's dtype; any but bfloat16 takes the op's slow path."""
    rows = x.reshape(-1, weight.in_features)
    if weight.order is not None:
        rows = rows.index_select(1, weight.order)
    pairs = weight.scale_and_shift.to(x.dtype)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), weight.packed, weight.group_size, pairs)
    if bias is not None:
        y += bias.to(y.dtype)
    return y.view(*x.shape[:-1], weight.out_features)
