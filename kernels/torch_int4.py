"""torch's own 4-bit matmul for CPUs, in bfloat16: where the native kernels are missing, the best there is.

The op computes ``sum_k x[k] * ((code - 8) * scale + shift)`` with one (scale, shift) pair a group of neighbouring
inputs, so any zero point is a shift of ``scale * (8 - zero)``. Rows of an act-order weight are sorted by group once,
and x is gathered in that order. Scales and shifts are rounded to bfloat16 (relative error at most 2**-9, as much as
the rounding of x itself costs); sums are in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import RUNS, CanonicalWeight, longest_run
from .reference import unpack

COLUMNS = 16  # N must be a multiple; the group size must be one of layout.RUNS


class Int4Weight(NamedTuple):
    """A weight in the op's own layout; K inputs, N outputs, `run` inputs share a scale."""

    packed: Tensor  # (N, K / 2) uint8, opaque
    scale_and_shift: Tensor  # (K / run, N, 2) bfloat16
    order: Tensor | None  # (K,) int32: the input that stands at each place; None where they stand in order
    run: int

    @property
    def in_features(self) -> int:
        """K."""
        return self.packed.shape[1] * 2

    @property
    def out_features(self) -> int:
        """N."""
        return self.packed.shape[0]


def unsupported_reason(bits: int, g_idx: Tensor, out_features: int, device: torch.device, dtype: torch.dtype,
                       precision: str = "exact") -> str | None:
    """Why the op does not serve this case, or None where it does; arguments as in `dispatch.choose_kernel`."""
    if device.type != "cpu":
        return f"torch's int4 kernel here is for CPUs, not {device.type}"
    if dtype != torch.bfloat16 and precision != "fast":
        return f"torch's int4 kernel computes in bfloat16: choose it, or precision fast, instead of {dtype}"
    if bits != 4:
        return f"torch's int4 kernel takes 4 bits, not {bits}"
    if out_features % COLUMNS:
        return f"torch's int4 kernel takes outputs in multiples of {COLUMNS}, not {out_features}"
    if not longest_run(g_idx.sort().values):
        return f"torch's int4 kernel takes groups that are multiples of {RUNS[-1]} inputs"
    return None


def prepare(weight: CanonicalWeight) -> Int4Weight:
    """Repack a weight on the CPU that `unsupported_reason` lets through."""
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
