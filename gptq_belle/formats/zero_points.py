"""Zero points on disk: `gptq` (v1) stores zero - 1, `gptq_v2` stores zero. Conversion and repair between them."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.errors import InputError
from gptq_belle.formats.packing import pack_rows, unpack_rows

V1, V2 = "gptq", "gptq_v2"


class ZeroPointCounts(NamedTuple):
    """Counts over all zero points of a checkpoint.

    Attributes:
        symmetric: all of them are 2**(bits - 1).
        lowest: the smallest one.
        wrapped: how many read as 2**bits.
        overwritten: how many of those follow another one in their word, whose carry may have changed them.
    """

    symmetric: bool
    lowest: int
    wrapped: int
    overwritten: int


def unpack_zeros(qzeros: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """True zero points (G, N) int32 of words (G, N * bits / 32), up to 2**bits in v1."""
    return true_zeros(unpack_rows(qzeros.t(), bits), checkpoint_format).t().contiguous()


def count_zero_points(zeros: Iterable[tuple[Tensor, int]]) -> ZeroPointCounts:
    """Count over the zero points (G, N) of all linears, each with its bits."""
    symmetric, lowest, wrapped, overwritten = True, 1 << 8, 0, 0
    for each, bits in zeros:
        symmetric &= bool((each == 1 << (bits - 1)).all())
        lowest = min(lowest, int(each.min()))
        full = each == 1 << bits
        word = torch.arange(each.shape[1]) * bits // 32
        wrapped += int(full.sum())
        overwritten += int((full[:, 1:] & full[:, :-1] & (word[1:] == word[:-1])).sum())
    return ZeroPointCounts(symmetric, lowest, wrapped, overwritten)


def choose_checkpoint_format(found: ZeroPointCounts, asked: str | None, *, repair: bool) -> str:
    """The format to write: asymmetric zero points go to gptq_v2, except where one reads as 2**bits.

    Raises:
        InputError: the format asked for cannot hold the zero points.
    """
    lost = found.wrapped > 0 and not repair
    if asked == V2 and lost:
        raise InputError(f"{found.wrapped} zero points read as one more than {V2} can hold", "Add --repair-zeros: they "
                         f"become 0, as they were meant; or keep them as they are with --format {V1}.")
    if asked == V1 and (found.lowest == 0 or (found.wrapped > 0 and repair)):
        raise InputError(f"zero points of 0 cannot be written in format {V1}", f"Choose --format {V2}.")
    return asked or (V1 if found.symmetric or lost else V2)


def repair_wrapped_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Zero points with 0 in place of 2**bits."""
    return torch.where(zeros == 1 << bits, 0, zeros)


def pack_zeros(zeros: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """The inverse of `unpack_zeros`; raises InputError for zero points that the format cannot hold."""
    return pack_rows(stored_zeros(zeros, bits, checkpoint_format).t(), bits).t().contiguous()


def stored_zeros(zeros: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """Zero points as their bits are written: minus one in v1, masked to `bits` so that none reaches its neighbour.

    Raises:
        InputError: a zero point that the format cannot hold (0 in v1, 2**bits in v2).
    """
    low, high = (1, 1 << bits) if checkpoint_format == V1 else (0, (1 << bits) - 1)
    if int(zeros.min()) < low or int(zeros.max()) > high:
        raise InputError(f"zero points {int(zeros.min())}..{int(zeros.max())} do not fit format {checkpoint_format}",
                         f"Format {checkpoint_format} with {bits} bits holds {low}..{high}; write asymmetric as {V2}.")
    return zeros - 1 if checkpoint_format == V1 else zeros


def true_zeros(stored: Tensor, checkpoint_format: str) -> Tensor:
    """Zero points as the formula needs them: plus one in v1 (so up to 2**bits, on purpose not masked)."""
    return stored.to(torch.int32) + (1 if checkpoint_format == V1 else 0)
