"""Inputs sorted by group and cut into runs that share a scale: what the layouts for CPUs and for GPUs are made from."""

from typing import NamedTuple

import torch
from torch import Tensor

RUN_LENGTHS = (128, 64, 32)
MAX_PADDING = 2  # times K


class SortedGroups(NamedTuple):
    """How inputs are cut into runs of one group."""

    run: int
    groups: Tensor  # (G,) int64: the checkpoint's group of each run
    order: Tensor | None  # (G * run,) int32: the input at each place, -1 for padding; None where they stand in order


def sort_by_group(g_idx: Tensor, block: int = 1) -> SortedGroups:
    """Sort inputs by group, and fill every group up to whole runs, as long ones as cost no more padding than others.

    Args:
        g_idx: (K,) integers, the group of each input. The result is on its device.
        block: the caller will fill the last places up to a multiple of it anyway: that padding costs nothing here.
    """
    run = min(RUN_LENGTHS, key=lambda length: (-(-padded_length(g_idx, length) // block), -length))
    ordered, inputs = g_idx.sort(stable=True)
    groups, counts = ordered.unique_consecutive(return_counts=True)
    taken = -(-counts // run)
    starts = torch.cat((counts.new_zeros(1), (taken * run).cumsum(0)[:-1]))
    behind = torch.arange(len(inputs), device=g_idx.device) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    places = torch.repeat_interleave(starts, counts) + behind
    order: Tensor | None = None
    if not torch.equal(inputs, places):
        order = torch.full((int(taken.sum()) * run,), -1, dtype=torch.int32, device=g_idx.device)
        order[places] = inputs.int()
    return SortedGroups(run, torch.repeat_interleave(groups.long(), taken), order)


def padded_length(g_idx: Tensor, run: int) -> int:
    """Places that the inputs of g_idx (K,) take when every group is filled up to whole runs."""
    return int((-(-g_idx.bincount() // run)).sum()) * run


def is_mostly_padding(g_idx: Tensor) -> bool:
    """Whether groups are so small that even the shortest runs would be mostly padding."""
    return padded_length(g_idx, RUN_LENGTHS[-1]) > MAX_PADDING * max(g_idx.numel(), RUN_LENGTHS[-1])
