"""The head in 8 or 4 bits, as `quantize --packed-head-only` writes it in place of the embedding: our own tensors.

``gptq_belle.head.codes`` (V, H * bits / 8) uint8, rows of the matrix (V, H), with 4 bits two codes a byte, the first in
the low half; ``gptq_belle.head.scales`` (V, H / group) float16. ``W = (code - 2**(bits - 1)) * scale``. Bits and group
follow from the shapes. No other program knows these names.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.kernels import cpu_packed_rows

HEAD_CODES, HEAD_SCALES = "gptq_belle.head.codes", "gptq_belle.head.scales"
BITS = (8, 4)
GROUPS = (128, 64, 32)  # inputs that share a scale: the largest that divides the width
STEP = 1 << 22  # weights rounded at a time: two threads then lay them into different huge pages
# Shares of a group's largest weight that are tried as the end of the grid, too.
CLIPS: dict[int, tuple[float, ...]] = {8: (), 4: (0.9, 0.8)}


def head_group_size(width: int) -> int | None:
    """Inputs that share a scale in a matrix of `width` columns; None where it is too odd to be packed."""
    return next((size for size in GROUPS if width % size == 0), None)


def quantize_rows(matrix: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Round rows of a matrix (n, H) to symmetric codes.

    Returns:
        codes (n, H) uint8, the zero point at 2**(bits - 1); scales (n, H / group) float16.
    Raises:
        ValueError: it holds NaN or infinity.
    """
    if cpu_packed_rows.is_supported(matrix):
        return cpu_packed_rows.quantize_rows(matrix, bits, group, CLIPS[bits])
    groups, top = matrix.float().unflatten(-1, (-1, group)), (1 << (bits - 1)) - 1
    largest = groups.abs().amax(-1, keepdim=True)
    if not bool(largest.isfinite().all()):
        raise ValueError("it holds NaN or infinity")
    best = _rounded(groups, largest, top)
    for clip in CLIPS[bits]:
        found = _rounded(groups, largest * clip, top)
        better = found.error(groups) < best.error(groups)
        best = _Rounded(*(torch.where(better, new, old) for new, old in zip(found, best, strict=True)))
    return best.codes.add_(top + 1).to(torch.uint8).flatten(1), best.scales.squeeze(-1).half()


class _Rounded(NamedTuple):
    codes: Tensor  # (n, groups, group), in float32, signed
    scales: Tensor  # (n, groups, 1)

    def error(self, groups: Tensor) -> Tensor:
        """Sum of squares (n, groups, 1)."""
        return (self.codes * self.scales - groups).square_().sum(-1, keepdim=True)


def _rounded(groups: Tensor, largest: Tensor, top: int) -> _Rounded:
    """Rounded on the grid that ends at `largest` (n, groups, 1)."""
    scales = (largest / top).clamp_(min=6e-8, max=65504).half().float()
    return _Rounded((groups / scales).round_().clamp_(-top - 1, top), scales)


def pack_head_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (n, H) uint8 as they are stored: (n, H * bits / 8)."""
    return codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4


def unpack_head_codes(stored: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_head_codes`."""
    return stored if bits == 8 else torch.stack((stored & 15, stored >> 4), -1).flatten(1)
