"""A quantized linear: as the solver returns it, and packed as the GPTQ format stores it."""

from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.formats.packing import pack_rows, unpack_rows
from gptq_belle.formats.zero_points import V1, stored_zeros, true_zeros

ROWS_AT_A_TIME = 256  # bounds what expanding a weight takes beside it


class QuantizedWeight(NamedTuple):
    """What the solver returns: ``W[n, k] = scales[n, g_idx[k]] * (codes[n, k] - zeros[n, g_idx[k]])``."""

    codes: Tensor  # (N, K) uint8
    scales: Tensor  # (N, G) float32 that float16 holds exactly
    zeros: Tensor  # (N, G) int32
    g_idx: Tensor  # (K,) int32, the group of each input


class PackedWeight(NamedTuple):
    """What the disk holds for one linear."""

    qweight: Tensor  # (K * bits / 32, N) int32
    qzeros: Tensor  # (G, N * bits / 32) int32
    scales: Tensor  # (G, N) float16
    g_idx: Tensor  # (K,) int32


def all_finite(tensor: Tensor) -> bool:
    """True where a tensor holds neither NaN nor infinity; unlike isfinite().all(), it takes no memory."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def dequantize(w: QuantizedWeight, out: Tensor | None = None) -> Tensor:
    """The weight (N, K) float32 that the codes stand for, in `out` where it is given; some rows at a time."""
    out = torch.empty(w.codes.shape, dtype=torch.float32, device=w.codes.device) if out is None else out
    groups = w.g_idx.long()
    for rows in torch.arange(w.codes.shape[0], device=w.codes.device).split(ROWS_AT_A_TIME):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        torch.mul(w.codes[part].float().sub_(w.zeros[part][:, groups]), w.scales[part].float()[:, groups],
                  out=out[part])
    return out


def pack(w: QuantizedWeight, bits: int, checkpoint_format: str = V1) -> PackedWeight:
    """Codes to words.

    Args:
        w: codes (N, K), scales and zeros (N, G), g_idx (K,).
        bits: 2, 3, 4 or 8.
        checkpoint_format: "gptq" or "gptq_v2".
    Raises:
        InputError: sizes that do not fill whole words; zero points that the format cannot hold.
    """
    zeros = stored_zeros(w.zeros, bits, checkpoint_format)
    return PackedWeight(
        qweight=pack_rows(w.codes.t(), bits),
        qzeros=pack_rows(zeros, bits).t().contiguous(),
        scales=w.scales.t().to(torch.float16).contiguous(),
        g_idx=w.g_idx.to(torch.int32),
    )


def unpack(p: PackedWeight, bits: int, checkpoint_format: str = V1) -> QuantizedWeight:
    """Words to codes: the exact inverse of `pack`."""
    return QuantizedWeight(
        codes=unpack_rows(p.qweight, bits).t().contiguous(),
        scales=p.scales.t().float().contiguous(),
        zeros=true_zeros(unpack_rows(p.qzeros.t(), bits), checkpoint_format).contiguous(),
        g_idx=p.g_idx.to(torch.int32),
    )
