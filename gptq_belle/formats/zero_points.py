"""Zero points on disk: format "gptq" (v1) stores zero - 1, "gptq_v2" stores zero. Conversion and repair.

The first GPTQ kernels computed ``scale * (code - (stored + 1))``, hence the minus one in v1. A zero point of 0 cannot
be stored in v1: it would be -1, which old packers did not mask, so it overwrote its neighbours in the word. A stored 15
of 4 bits means 16 in v1 and must not be masked when it is read.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.errors import InputError
from gptq_belle.formats.packing import pack_rows, unpack_rows

V1, V2 = "gptq", "gptq_v2"


class ZeroPointCounts(NamedTuple):
    """Statistics of all zero points of a checkpoint."""

    symmetric: bool  # whether all of them are 2**(bits - 1)
    lowest: int  # the smallest zero point
    wrapped: int  # number of zero points that read as 2**bits
    overwritten: int  # number of these that follow another one in the same word, whose carry may have changed them


def unpack_zeros(qzeros: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """Unpack words (G, N * bits / 32) into true zero points (G, N) int32, up to 2**bits in v1."""
    return true_zeros(unpack_rows(qzeros.t(), bits), checkpoint_format).t().contiguous()


def count_zero_points(zeros: Iterable[tuple[Tensor, int]]) -> ZeroPointCounts:
    """Collect statistics of the zero points (G, N) of all linears, each with its bits."""
    symmetric, lowest, wrapped, overwritten = True, 1 << 8, 0, 0
    for each, bits in zeros:
        symmetric &= bool((each == 1 << (bits - 1)).all())
        lowest = min(lowest, int(each.min()))
        full = each == 1 << bits
        word = torch.arange(each.shape[1]) * bits // 32
        wrapped += int(full.sum())
        overwritten += int((full[:, 1:] & full[:, :-1] & (word[1:] == word[:-1])).sum())
    return ZeroPointCounts(symmetric, lowest, wrapped, overwritten)


def choose_checkpoint_format(found: ZeroPointCounts, requested: str | None, *, repair: bool) -> str:
    """Choose the format to write: v1 for symmetric zero points and for unrepaired 2**bits, else v2.

    Args:
        found: statistics of the zero points.
        requested: the format that the user wants, or None.
        repair: whether zero points of 2**bits are written as 0.
    Raises:
        InputError: the requested format cannot represent the zero points.
    """
    keeps_wrapped = found.wrapped > 0 and not repair
    if requested == V2 and keeps_wrapped:
        raise InputError(f"{found.wrapped} zero points are one more than {V2} can represent",
                         f"Add --repair-zeros to write them as 0, or keep them with --format {V1}.")
    if requested == V1 and (found.lowest == 0 or (found.wrapped > 0 and repair)):
        raise InputError(f"zero points of 0 cannot be written in format {V1}", f"Choose --format {V2}.")
    return requested or (V1 if found.symmetric or keeps_wrapped else V2)


def repair_wrapped_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Replace zero points of 2**bits by 0."""
    return torch.where(zeros == 1 << bits, 0, zeros)


def pack_zeros(zeros: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """Inverse of `unpack_zeros`; raises InputError like `stored_zeros`."""
    return pack_rows(stored_zeros(zeros, bits, checkpoint_format).t(), bits).t().contiguous()


def stored_zeros(zeros: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """Convert true zero points to stored ones: minus one in v1, unchanged in v2.

    Raises:
        InputError: the format cannot represent a zero point (0 in v1, 2**bits in v2).
    """
    low, high = (1, 1 << bits) if checkpoint_format == V1 else (0, (1 << bits) - 1)
    if int(zeros.min()) < low or int(zeros.max()) > high:
        raise InputError(f"zero points {int(zeros.min())}..{int(zeros.max())} do not fit format {checkpoint_format}",
                         f"It allows {low}..{high} with {bits} bits. Use {V2} for asymmetric weights.")
    return zeros - 1 if checkpoint_format == V1 else zeros


def true_zeros(stored: Tensor, checkpoint_format: str) -> Tensor:
    """Convert stored zero points to true ones: plus one in v1 (up to 2**bits, not masked on purpose)."""
    return stored.to(torch.int32) + (1 if checkpoint_format == V1 else 0)
