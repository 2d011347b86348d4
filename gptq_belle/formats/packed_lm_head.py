"""The packed lm_head: a matrix (V, H) in 8 or 4 bits, written by `quantize --packed-head-only`.

The format is gptq_belle's own; no other program reads it:

- ``gptq_belle.head.codes`` (V, H * bits / 8) uint8; with 4 bits, two codes per byte, the first in the low half;
- ``gptq_belle.head.scales`` (V, H / group) float16.

``W = (code - 2**(bits - 1)) * scale``. Bits and group size follow from the shapes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.kernels import cpu_packed_rows

HEAD_CODES, HEAD_SCALES = "gptq_belle.head.codes", "gptq_belle.head.scales"
PACKED_HEAD_BITS = (8, 4)
GROUP_SIZES = (128, 64, 32)  # the largest one that divides the width is used
WEIGHTS_PER_STEP = 1 << 22  # weights quantized at a time: two threads then write to different huge pages
# Fractions of a group's largest weight that are tried as the end of the grid, besides 1.
CLIPS: dict[int, tuple[float, ...]] = {8: (), 4: (0.9, 0.8)}


def head_group_size(width: int) -> int | None:
    """Group size for a matrix with `width` columns; None if no size of GROUP_SIZES divides it."""
    return next((size for size in GROUP_SIZES if width % size == 0), None)


def quantize_rows(matrix: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Quantize rows (n, H) of a matrix symmetrically to nearest, with the best of CLIPS for each group.

    Returns:
        codes (n, H) uint8 with zero point 2**(bits - 1), and scales (n, H / group) float16.
    Raises:
        ValueError: the matrix contains NaN or infinity.
    """
    if cpu_packed_rows.is_supported(matrix):
        return cpu_packed_rows.quantize_rows(matrix, bits, group, CLIPS[bits])
    groups, top = matrix.float().unflatten(-1, (-1, group)), (1 << (bits - 1)) - 1
    largest = groups.abs().amax(-1, keepdim=True)
    if not bool(largest.isfinite().all()):
        raise ValueError("it contains NaN or infinity")
    best = _round_to_grid(groups, largest, top)
    for clip in CLIPS[bits]:
        found = _round_to_grid(groups, largest * clip, top)
        better = found.error(groups) < best.error(groups)
        best = _Candidate(*(torch.where(better, new, old) for new, old in zip(found, best, strict=True)))
    return best.codes.add_(top + 1).to(torch.uint8).flatten(1), best.scales.squeeze(-1).half()


class _Candidate(NamedTuple):
    codes: Tensor  # (n, groups, group) float32, signed
    scales: Tensor  # (n, groups, 1) float32

    def error(self, groups: Tensor) -> Tensor:
        """Sum of squared errors of each group (n, groups, 1)."""
        return (self.codes * self.scales - groups).square_().sum(-1, keepdim=True)


def _round_to_grid(groups: Tensor, largest: Tensor, top: int) -> _Candidate:
    """Round groups to the symmetric grid whose largest value is `largest` (n, groups, 1)."""
    scales = (largest / top).clamp_(min=6e-8, max=65504).half().float()
    return _Candidate((groups / scales).round_().clamp_(-top - 1, top), scales)


def pack_head_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (n, H) uint8 into bytes (n, H * bits / 8)."""
    return codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4


def unpack_head_codes(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_head_codes`."""
    return packed if bits == 8 else torch.stack((packed & 15, packed >> 4), -1).flatten(1)
