"""The CPU layout of a weight (see native/native.h): made from the words of a checkpoint, and converted back.

One layout serves any bits, groups, zero points and order of inputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .huge_pages import empty_bytes
from .layout import CanonicalWeight, restore_input_order, sort_by_group
from .native_library import data_pointer, require_library
from .native_structs import PackedWordsStruct
from .reference import unpack

BLOCK = 16  # outputs of a block of codes
OUTPUT_MULTIPLE = 32  # N is padded to multiples of it
CONTAINERS = {2: 2, 3: 4, 4: 4, 8: 8}  # bits of a code in memory, by bits of the checkpoint
ACTIVATION_PARTS = {"exact": 2, "fast": 1}  # by precision


class CpuWeight(NamedTuple):
    """A weight in the layout of native/native.h: K inputs, N outputs, G runs of inputs that share a scale."""

    codes: Tensor  # (N / 16, G, run * bits / 32, 64) uint8; N padded to 32
    scales: Tensor  # (N / 16, G, 16) float16, or float32 if the checkpoint's are not float16
    zeros: Tensor | None  # (N / 16, G, 16) int16; None if all are `zero`
    order: Tensor | None  # (G * run,) int32: the input at each position, -1 for padding; None if already sorted
    g_idx: Tensor  # (K,) int32, as in CanonicalWeight; the product does not read it
    in_features: int
    out_features: int
    run: int  # 32, 64 or 128 inputs
    bits: int  # of a code in memory: 2, 4 or 8
    zero: int
    parts: int  # of the activations: 2 exact, 1 fast
    checkpoint_bits: int  # of a code: 2, 3, 4 or 8
    checkpoint_groups: int
    zero_offset: int  # as in CanonicalWeight


def prepare(weight: CanonicalWeight, precision: str = "exact") -> CpuWeight:
    """Lay out a weight on the CPU that `cpu_matmul.unsupported_reason` has no objection to.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in ACTIVATION_PARTS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(ACTIVATION_PARTS)}")
    runs = sort_by_group(weight.g_idx)
    bits, outputs = CONTAINERS[weight.bits], weight.out_features
    blocks = -(-outputs // OUTPUT_MULTIPLE) * OUTPUT_MULTIPLE // BLOCK
    common = _common_zero(weight.qzeros, weight.bits)
    zeros = None if common is not None else unpack(weight.qzeros.t(), weight.bits).t() + weight.zero_offset
    scales = weight.scales if weight.scales.dtype == torch.float16 else weight.scales.float()
    codes = empty_codes(blocks, len(runs.groups), runs.run * bits // 32)
    words, lib = weight.qweight.contiguous(), require_library()
    lib.pack(
        PackedWordsStruct(words.data_ptr(), data_pointer(runs.order), weight.in_features, outputs, len(runs.groups),
                          weight.bits, runs.run, bits),
        codes.data_ptr(), torch.get_num_threads(), lib.isa_index(None))
    return CpuWeight(
        codes=codes,
        scales=_split_blocks(scales, runs.groups, blocks),
        zeros=None if zeros is None else _split_blocks(zeros.to(torch.int16), runs.groups, blocks),
        order=runs.order,
        g_idx=weight.g_idx.clone(),
        in_features=weight.in_features,
        out_features=outputs,
        run=runs.run,
        bits=bits,
        zero=0 if common is None else common + weight.zero_offset,
        parts=ACTIVATION_PARTS[precision],
        checkpoint_bits=weight.bits,
        checkpoint_groups=weight.scales.shape[0],
        zero_offset=weight.zero_offset,
    )


def unpack_weight(weight: CpuWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (K, N) uint8, true zeros (groups, N) int32 and scales (groups, N) of the checkpoint: `prepare` undone."""
    runs, sorted_codes = sort_by_group(weight.g_idx), unpack_codes(weight.codes, weight.bits)
    codes = restore_input_order(sorted_codes.t(), weight.order, weight.in_features).t()
    zeros = weight.zeros if weight.zeros is not None else torch.full(weight.scales.shape, weight.zero)

    def table(values: Tensor) -> Tensor:
        by_group = values.new_zeros(weight.checkpoint_groups, sorted_codes.shape[1])  # 0 for a group without inputs
        by_group[runs.groups] = merge_blocks(values)
        return by_group[:, : weight.out_features].contiguous()

    return codes[:, : weight.out_features].contiguous(), table(zeros.int()), table(weight.scales)


def unpack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (N / 16, G, run * bits / 32, 64) of the layout, or of some of its runs: (G * run, N) uint8, N padded."""
    blocks, groups, vectors, _ = codes.shape
    fields = torch.stack([codes >> shift & 2**bits - 1 for shift in range(0, 8, bits)])
    return fields.view(-1, blocks, groups, vectors, BLOCK, 4).permute(2, 3, 0, 5, 1, 4).reshape(-1, blocks * BLOCK)


def merge_blocks(values: Tensor) -> Tensor:
    """Scales or zeros (N / 16, G, 16) of the layout as a table (G, N), N padded."""
    return values.transpose(0, 1).flatten(1)


def empty_codes(blocks: int, groups: int, vectors: int) -> Tensor:
    """Memory for codes (blocks, groups, vectors, 64) uint8."""
    return empty_bytes(blocks * groups * vectors * 64).view(blocks, groups, vectors, 64)


def _common_zero(words: Tensor, bits: int) -> int | None:
    """The stored zero of all groups and outputs, or None if they differ."""
    if 32 % bits:
        found = unpack(words.t(), bits).unique()
    else:  # a word holds whole zeros, so that comparing words is enough
        found = unpack(words[:1, :1], bits).unique() if bool((words == words[0, 0]).all()) else words.new_empty(0)
    return int(found) if len(found) == 1 else None


def _split_blocks(table: Tensor, groups: Tensor, blocks: int) -> Tensor:
    """A table (groups, N) as (blocks, G, 16), padded with zeros."""
    padded = pad(table[groups], (0, blocks * BLOCK - table.shape[1]))
    return padded.view(len(groups), blocks, BLOCK).transpose(0, 1).contiguous()
