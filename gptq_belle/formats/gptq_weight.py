"""A quantized linear: as codes (QuantizedWeight), and packed in the GPTQ format (PackedWeight)."""

from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.formats.packing import pack_rows, unpack_rows
from gptq_belle.formats.zero_points import V1, stored_zeros, true_zeros

ROWS_AT_A_TIME = 256  # limits the temporary memory of dequantizing


class QuantizedWeight(NamedTuple):
    """Result of the solver: ``W[n, k] = scales[n, g_idx[k]] * (codes[n, k] - zeros[n, g_idx[k]])``."""

    codes: Tensor  # (N, K) uint8
    scales: Tensor  # (N, G) float32, exactly representable in float16
    zeros: Tensor  # (N, G) int32
    g_idx: Tensor  # (K,) int32, the group of each input


class PackedWeight(NamedTuple):
    """Tensors of one linear in a checkpoint."""

    qweight: Tensor  # (K * bits / 32, N) int32
    qzeros: Tensor  # (G, N * bits / 32) int32
    scales: Tensor  # (G, N) float16
    g_idx: Tensor  # (K,) int32


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor contains neither NaN nor infinity. Unlike isfinite().all(), this allocates no memory."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def dequantize(w: QuantizedWeight, out: Tensor | None = None) -> Tensor:
    """Dequantize to a weight (N, K) float32, in `out` if it is given."""
    out = torch.empty(w.codes.shape, dtype=torch.float32, device=w.codes.device) if out is None else out
    groups = w.g_idx.long()
    for rows in torch.arange(w.codes.shape[0], device=w.codes.device).split(ROWS_AT_A_TIME):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        torch.mul(w.codes[part].float().sub_(w.zeros[part][:, groups]), w.scales[part].float()[:, groups],
                  out=out[part])
    return out


def pack(w: QuantizedWeight, bits: int, checkpoint_format: str = V1) -> PackedWeight:
    """Pack a quantized linear into 32-bit words.

    Args:
        w: codes (N, K), scales and zeros (N, G), g_idx (K,).
        bits: 2, 3, 4 or 8.
        checkpoint_format: "gptq" or "gptq_v2".
    Raises:
        InputError: the sizes do not fill whole words, or the format cannot represent a zero point.
    """
    zeros = stored_zeros(w.zeros, bits, checkpoint_format)
    return PackedWeight(
        qweight=pack_rows(w.codes.t(), bits),
        qzeros=pack_rows(zeros, bits).t().contiguous(),
        scales=w.scales.t().to(torch.float16).contiguous(),
        g_idx=w.g_idx.to(torch.int32),
    )


def unpack(p: PackedWeight, bits: int, checkpoint_format: str = V1) -> QuantizedWeight:
    """Unpack a linear: the exact inverse of `pack`."""
    return QuantizedWeight(
        codes=unpack_rows(p.qweight, bits).t().contiguous(),
        scales=p.scales.t().float().contiguous(),
        zeros=true_zeros(unpack_rows(p.qzeros.t(), bits), checkpoint_format).contiguous(),
        g_idx=p.g_idx.to(torch.int32),
    )
