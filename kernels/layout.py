"""A packed weight as files store it, and how its inputs are sorted by group for the layouts of the kernels.

`reference.py` computes with it directly; `cpu_layout.py` and `triton_layout.py` make other layouts from it.
K = in_features, N = out_features, G = groups. `kernels/README.md` describes every layout.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .tensor_checks import check_tensors

BITS = (2, 3, 4, 8)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)
NEIGHBOUR_RUN_LENGTHS = (256, 128, 64, 32)  # of neighbouring inputs in one group, best first
RUN_LENGTHS = (128, 64, 32)  # of inputs sorted by group, best first
MAX_PADDING = 2  # largest ratio of padded inputs to K


class CanonicalWeight(NamedTuple):
    """``W[k, n] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n])``, with the words of the file."""

    qweight: Tensor  # (K * bits / 32, N) int32: codes along K, the lowest input in the lowest bits
    qzeros: Tensor  # (G, N * bits / 32) int32: stored zeros along N; the true zero is stored + zero_offset
    scales: Tensor  # (G, N) float16, bfloat16 or float32; may be negative
    g_idx: Tensor  # (K,) int32: the group of each input
    bits: int  # 2, 3, 4 or 8
    zero_offset: int  # 1 in format "gptq" (v1), 0 in "gptq_v2"
    run: int  # the longest of NEIGHBOUR_RUN_LENGTHS that groups consist of; 0 if act-order mixes them

    @property
    def in_features(self) -> int:
        """K."""
        return self.g_idx.shape[0]

    @property
    def out_features(self) -> int:
        """N."""
        return self.qweight.shape[1]


class SortedGroups(NamedTuple):
    """Inputs sorted by group and cut into runs that share a scale."""

    run: int  # inputs per run
    groups: Tensor  # (G,) int64: the checkpoint's group of each run
    order: Tensor | None  # (G * run,) int32: the input at each position, -1 for padding; None if already sorted


def checked_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int,
                     zero_offset: int) -> CanonicalWeight:
    """Check the tensors of one packed weight and combine them.

    Args:
        qweight, qzeros, scales: see `CanonicalWeight`.
        g_idx: (K,) int32 or int64; None if each group consists of K / G neighbouring inputs.
        bits: 2, 3, 4 or 8.
        zero_offset: added to a stored zero: 1 for "gptq" (v1), 0 for "gptq_v2".
    Raises:
        ValueError: a tensor or number that does not fit; the message states what is allowed.
    """
    _require(bits in BITS, f"bits {bits} is not one of {BITS}")
    _require(zero_offset in (0, 1), f"zero_offset {zero_offset} is not 1 (format gptq) or 0 (gptq_v2)")
    _check("qweight", qweight, (None, None), torch.int32)
    rows, outputs = qweight.shape
    _require(rows > 0 and outputs > 0 and rows * 32 % bits == 0 and outputs * bits % 32 == 0,
             f"qweight of {rows} rows and {outputs} columns does not hold whole words of {bits} bits")
    inputs = rows * 32 // bits
    _check("scales", scales, (None, outputs), *SCALE_DTYPES)
    groups = scales.shape[0]
    _check("qzeros", qzeros, (groups, outputs * bits // 32), torch.int32)
    _require(groups > 0, "scales hold no group")
    # isfinite() of a whole float16 tensor takes 20 times as long.
    _require(all(bool(end.isfinite()) for end in scales.aminmax()), "scales hold NaN or infinity")
    g_idx = _checked_groups(g_idx, inputs, groups).to(qweight.device)
    return CanonicalWeight(qweight, qzeros, scales, g_idx, bits, zero_offset, longest_run(g_idx))


def fuse_weights(weights: Sequence[CanonicalWeight]) -> CanonicalWeight:
    """Concatenate the outputs of weights with the same inputs (query, key, value; gate, up).

    Raises:
        ValueError: they differ in bits, format, dtype of scales, or groups of inputs.
    """
    first = weights[0]
    for name in ("bits", "zero_offset"):
        found = [getattr(weight, name) for weight in weights]
        _require(len(set(found)) == 1, f"weights with {name} of {found} cannot be fused")
    dtypes = [weight.scales.dtype for weight in weights]
    _require(len(set(dtypes)) == 1, f"weights with scales of {dtypes} cannot be fused")
    _require(all(torch.equal(weight.g_idx, first.g_idx) for weight in weights),
             "weights whose inputs are in different groups (g_idx) cannot be fused")
    return first._replace(
        qweight=torch.cat([weight.qweight for weight in weights], 1),
        qzeros=torch.cat([weight.qzeros for weight in weights], 1),
        scales=torch.cat([weight.scales for weight in weights], 1),
    )


def longest_run(g_idx: Tensor) -> int:
    """The longest of NEIGHBOUR_RUN_LENGTHS into which g_idx (K,) can be cut with one group per run; 0 if none."""
    for run in NEIGHBOUR_RUN_LENGTHS:
        if g_idx.numel() % run == 0 and bool((g_idx.view(-1, run) == g_idx.view(-1, run)[:, :1]).all()):
            return run
    return 0


def sort_by_group(g_idx: Tensor, block: int = 1) -> SortedGroups:
    """Sort inputs by group and pad every group to whole runs, the longest of RUN_LENGTHS with the least padding.

    Args:
        g_idx: (K,) integers, the group of each input. The result is on its device.
        block: the caller pads the total to a multiple of this in any case; that padding is not counted.
    """
    run = min(RUN_LENGTHS, key=lambda length: (-(-padded_length(g_idx, length) // block), -length))
    sorted_groups, inputs = g_idx.sort(stable=True)
    groups, counts = sorted_groups.unique_consecutive(return_counts=True)
    runs = -(-counts // run)
    starts = torch.cat((counts.new_zeros(1), (runs * run).cumsum(0)[:-1]))
    within = torch.arange(len(inputs), device=g_idx.device) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    positions = torch.repeat_interleave(starts, counts) + within
    order: Tensor | None = None
    if not torch.equal(inputs, positions):
        order = torch.full((int(runs.sum()) * run,), -1, dtype=torch.int32, device=g_idx.device)
        order[positions] = inputs.int()
    return SortedGroups(run, torch.repeat_interleave(groups.long(), runs), order)


def restore_input_order(columns: Tensor, order: Tensor | None, in_features: int) -> Tensor:
    """Columns (n, G * run) in the order of `SortedGroups`, as (n, K) in the order of the inputs, without padding."""
    if order is None:
        return columns[:, :in_features]
    restored = columns.new_empty(columns.shape[0], in_features + 1)  # padding goes to the last column
    restored[:, order.masked_fill(order < 0, in_features).long()] = columns  # selecting by a mask would wait for a GPU
    return restored[:, :in_features]


def padded_length(g_idx: Tensor, run: int) -> int:
    """Inputs of g_idx (K,) and padding if every group is padded to whole runs."""
    return int((-(-g_idx.bincount() // run)).sum()) * run


def is_mostly_padding(g_idx: Tensor) -> bool:
    """Whether groups are so small that even with the shortest runs most of the layout would be padding."""
    return padded_length(g_idx, RUN_LENGTHS[-1]) > MAX_PADDING * max(g_idx.numel(), RUN_LENGTHS[-1])


def _checked_groups(g_idx: Tensor | None, inputs: int, groups: int) -> Tensor:
    if g_idx is None:
        _require(inputs % groups == 0, f"{inputs} inputs are not {groups} equal groups: g_idx is needed")
        return torch.arange(inputs, dtype=torch.int32) // (inputs // groups)
    _check("g_idx", g_idx, (inputs,), *INDEX_DTYPES)
    low, high = int(g_idx.min()), int(g_idx.max())
    _require(low >= 0 and high < groups, f"g_idx holds {low}..{high}, not groups 0..{groups - 1}")
    return g_idx.to(torch.int32)


def _check(name: str, tensor: Tensor, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> None:
    check_tensors(shape, *dtypes, device=None, contiguous=False, **{name: tensor})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
