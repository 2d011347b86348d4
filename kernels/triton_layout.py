"""The layout that the Triton kernels read for every M: "slices", made once at loading, by torch on any device.

Inputs are sorted by group and padded to whole blocks of 128 (or 64). The block of one output is 64 consecutive bytes
(128 with 8 bits): word i of 16 bits holds the codes of inputs i, S + i, 2 S + i, ... of the block, the first in the
lowest bits, where S is the length of a slice. The same bits of all words then belong to S neighbouring inputs: nothing
is shuffled after unpacking, copies are 16 bytes wide, and the 64 outputs that a program loads are contiguous.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import CanonicalWeight, SortedGroups, restore_input_order, sort_by_group
from .reference import unpack

COLUMNS = 128  # N is padded to multiples of it, so that no load of words or scales needs a mask
CONTAINERS = {2: 4, 3: 4, 4: 4, 8: 8}  # bits of a code in memory, by bits of the checkpoint
WORD = 16  # bits
BLOCK = 128  # inputs of a block; 64 where codes of 8 bits have a scale for every 32 inputs
GATES = 8  # neighbouring gates, followed by the values that they multiply: a thread of the kernel holds both
CHUNK = 1 << 24  # codes unpacked at a time, 64 MiB


class SlicedWeight(NamedTuple):
    """A weight in slices: K inputs at K' places, N outputs padded to N', one scale per run of places."""

    words: Tensor  # (K' / block, N', S) int16, S = block * bits / 16
    scales: Tensor  # (K' / run, N') of the checkpoint's dtype; 0 in padding
    zeros: Tensor | None  # (K' / run, N') float16, whole numbers 0..256; None if all are `zero`
    order: Tensor | None  # (K',) int32: the input at each place, -1 for padding; None if inputs are in order
    g_idx: Tensor  # (K,) int32, as in CanonicalWeight; the product does not read it
    in_features: int
    out_features: int
    run: int  # 32, 64 or 128
    bits: int  # of a code in memory: 4 or 8
    zero: int  # the zero point of all weights, or -1 if they differ
    checkpoint_bits: int  # bits of a code in the checkpoint: 2, 3, 4 or 8
    checkpoint_groups: int  # groups of the checkpoint
    zero_offset: int  # as in CanonicalWeight

    @property
    def block(self) -> int:
        """Inputs of a block."""
        return block_inputs(self.bits, self.run)

    @property
    def places(self) -> int:
        """K': inputs and padding."""
        return self.words.shape[0] * self.block


def block_inputs(bits: int, run: int) -> int:
    """Inputs of a block: a slice must not mix runs, so the two slices of 8 bits have at most the length of a run."""
    return min(BLOCK, run * WORD // bits)


def prepare(weight: CanonicalWeight) -> SlicedWeight:
    """Lay out a weight on its device; its tensors are not changed."""
    bits, outputs = CONTAINERS[weight.bits], weight.out_features
    runs = sort_by_group(weight.g_idx, BLOCK)
    block, columns = block_inputs(bits, runs.run), -(-outputs // COLUMNS) * COLUMNS
    blocks = -(-len(runs.groups) * runs.run // block)
    order = _padded_order(runs, weight.in_features, blocks * block)
    words = weight.qweight.new_zeros(blocks, columns, block * bits // WORD, dtype=torch.int16)
    step = max(1, CHUNK // weight.in_features)
    for start in range(0, outputs, step):
        codes = unpack(weight.qweight[:, start : start + step], weight.bits)
        words[:, start : start + codes.shape[1]] = pack_slices(_placed(codes, order, blocks * block), bits, block)
    zeros = unpack(weight.qzeros.t(), weight.bits).t() + weight.zero_offset
    low, high = int(zeros.min()), int(zeros.max())
    return SlicedWeight(
        words=words,
        scales=_table(weight.scales, runs, blocks * block, columns),
        zeros=None if low == high else _table(zeros.to(torch.float16), runs, blocks * block, columns),
        order=order,
        g_idx=weight.g_idx.clone(),
        in_features=weight.in_features,
        out_features=outputs,
        run=runs.run,
        bits=bits,
        zero=low if low == high else -1,
        checkpoint_bits=weight.bits,
        checkpoint_groups=weight.scales.shape[0],
        zero_offset=weight.zero_offset,
    )


def pack_slices(codes: Tensor, bits: int, block: int) -> Tensor:
    """Codes (K', N) of any integer dtype, K' a multiple of block: words (K' / block, N, block * bits / 16) int16."""
    slices = WORD // bits
    parts = codes.view(-1, slices, block // slices, codes.shape[1]).to(torch.int32)
    words = parts[:, 0].clone()
    for place in range(1, slices):
        words |= parts[:, place] << place * bits
    return words.to(torch.int16).transpose(1, 2).contiguous()


def unpack_slices(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_slices`: codes (K', N) uint8 of words (K' / block, N, block * bits / 16)."""
    slices = [(words >> place * bits).bitwise_and_(2**bits - 1) for place in range(WORD // bits)]
    return torch.stack(slices, 1).transpose(2, 3).reshape(-1, words.shape[1]).to(torch.uint8)


def lookup_rows(weight: SlicedWeight, ids: Tensor) -> Tensor:
    """Rows `ids` (n,) of the weight as a matrix (N, K): (n, K) float32, exact if scales are float16."""
    codes = unpack_slices(weight.words[:, ids], weight.bits).float().view(-1, weight.run, len(ids))
    zeros = weight.zero if weight.zeros is None else weight.zeros[:, ids].float()[:, None]
    values = ((codes - zeros) * weight.scales[:, ids].float()[:, None]).flatten(0, 1).t()
    return restore_input_order(values, weight.order, weight.in_features).contiguous()


def input_places(weight: SlicedWeight) -> Tensor | None:
    """The place of each input (K,) int32; None if inputs are in order."""
    if weight.order is None:
        return None
    places = torch.arange(weight.places, dtype=torch.int32, device=weight.order.device)
    return restore_input_order(places[None], weight.order, weight.in_features)[0]


def interleave_gates(weight: SlicedWeight) -> SlicedWeight:
    """The weight of (gates | values), N / 2 outputs each, with outputs in the order that a gated product takes.

    Raises:
        ValueError: N is not a multiple of 2 * GATES.
    """
    n = weight.out_features
    if n % (2 * GATES):
        raise ValueError(f"{n} outputs are not pairs of {GATES} gates and {GATES} values")
    order = gate_order(n, weight.words.device)
    rest = torch.arange(n, weight.words.shape[1], device=order.device)
    columns = torch.cat((order, rest))
    return weight._replace(
        words=weight.words.index_select(1, columns), scales=weight.scales.index_select(1, columns),
        zeros=None if weight.zeros is None else weight.zeros.index_select(1, columns))


def gate_order(outputs: int, device: torch.device) -> Tensor:
    """The outputs of (gates | values) in the order that a gated product takes: 8 gates, their values, 8 gates, ..."""
    half = torch.arange(outputs // 2, device=device).view(-1, GATES)
    return torch.stack((half, half + outputs // 2), 1).flatten()


def unpack_weight(weight: SlicedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `prepare`: codes (K, N) uint8, true zeros (groups, N) int32 and scales (groups, N)."""
    runs, outputs = sort_by_group(weight.g_idx, BLOCK), weight.out_features
    places = unpack_slices(weight.words[:, :outputs], weight.bits)
    codes = restore_input_order(places.t(), weight.order, weight.in_features).t()

    def table(values: Tensor) -> Tensor:
        whole = values.new_zeros(weight.checkpoint_groups, outputs)  # a group without inputs keeps zeros
        whole[runs.groups] = values[: len(runs.groups), :outputs]
        return whole

    zeros = torch.full_like(weight.scales, weight.zero) if weight.zeros is None else weight.zeros
    return codes.contiguous(), table(zeros).int(), table(weight.scales)


def _padded_order(runs: SortedGroups, inputs: int, places: int) -> Tensor | None:
    """The order with the padding of the last block; None if inputs are in order and fill the blocks."""
    order = runs.order
    if order is None:
        if inputs == places:
            return None
        order = torch.arange(inputs, dtype=torch.int32, device=runs.groups.device)
    return torch.nn.functional.pad(order, (0, places - len(order)), value=-1)


def _placed(codes: Tensor, order: Tensor | None, places: int) -> Tensor:
    """Codes (K, N) in the order of their places (K', N), 0 in padding."""
    if order is None:
        return codes
    filled = order >= 0
    placed = codes.new_zeros(places, codes.shape[1])
    placed[filled] = codes[order[filled].long()]
    return placed


def _table(values: Tensor, runs: SortedGroups, places: int, columns: int) -> Tensor:
    """Values (groups, N) by run: (K' / run, N'), 0 in padding."""
    table = values.new_zeros(places // runs.run, columns)
    table[: len(runs.groups), : values.shape[1]] = values[runs.groups]
    return table
