"""The layout of a weight on a CPU (native/native.h): made from a checkpoint's words, and back.

One layout serves any bits, groups, zeros and order of inputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .group_sort import RUN_LENGTHS, is_mostly_padding, sort_by_group
from .huge_pages import empty_bytes
from .layout import CanonicalWeight
from .native_library import data_pointer, load_library, require_library
from .native_structs import PackedWordsStruct
from .reference import unpack

BLOCK = 16  # outputs of a block of codes
PADDED = 32  # N is padded to multiples of it
CONTAINERS = {2: 2, 3: 4, 4: 4, 8: 8}  # bits of a code in memory, by bits of the checkpoint
PARTS = {"exact": 2, "fast": 1}


class CpuWeight(NamedTuple):
    """A weight in the layout of native/native.h: K inputs, N outputs, G runs of inputs that share a scale."""

    codes: Tensor  # (N / 16, G, run * bits / 32, 64) uint8; N padded to 32
    scales: Tensor  # (N / 16, G, 16) float16, or float32 where the checkpoint's are not float16
    zeros: Tensor | None  # (N / 16, G, 16) int16; None where all are `zero`
    order: Tensor | None  # (G * run,) int32: the input at each place, -1 for padding; None where they stand in order
    g_idx: Tensor  # (K,) int32, as in CanonicalWeight; the product does not read it
    in_features: int
    out_features: int
    run: int  # 32, 64 or 128 inputs
    bits: int  # of a code in memory: 2, 4 or 8
    zero: int
    parts: int  # of the activations: 2 exact, 1 fast
    source: int  # bits of a code in the checkpoint: 2, 3, 4 or 8
    source_groups: int  # groups of the checkpoint
    zero_offset: int  # as in CanonicalWeight


def unsupported_reason(g_idx: Tensor, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels do not serve a case, or None where they do; arguments as in `dispatch.choose_kernel`."""
    if device.type != "cpu":
        return f"the native kernels here are for CPUs, not {device.type}"
    if dtype == torch.float64:
        return "the native kernels keep 16 bits of an activation: too few for torch.float64"
    if isinstance(found := load_library(), str):
        return found
    if is_mostly_padding(g_idx):
        return f"the native kernels take groups that fill runs of {RUN_LENGTHS[-1]} inputs"
    return None


def prepare(weight: CanonicalWeight, precision: str = "exact") -> CpuWeight:
    """Lay out a weight that `unsupported_reason` lets through; its tensors are on the CPU.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in PARTS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PARTS)}")
    runs = sort_by_group(weight.g_idx)
    bits, outputs = CONTAINERS[weight.bits], weight.out_features
    blocks = -(-outputs // PADDED) * PADDED // BLOCK
    only = _only_zero(weight.qzeros, weight.bits)
    zeros = None if only is not None else unpack(weight.qzeros.t(), weight.bits).t() + weight.zero_offset
    scales = weight.scales if weight.scales.dtype == torch.float16 else weight.scales.float()
    codes = empty_codes(blocks, len(runs.groups), runs.run * bits // 32)
    words, lib = weight.qweight.contiguous(), require_library()
    lib.pack(
        PackedWordsStruct(words.data_ptr(), data_pointer(runs.order), weight.in_features, outputs, len(runs.groups),
                          weight.bits, runs.run, bits), codes.data_ptr(), torch.get_num_threads(), lib.number(None))
    return CpuWeight(
        codes=codes,
        scales=_blocks(scales, runs.groups, blocks),
        zeros=None if zeros is None else _blocks(zeros.to(torch.int16), runs.groups, blocks),
        order=runs.order,
        g_idx=weight.g_idx.clone(),
        in_features=weight.in_features,
        out_features=outputs,
        run=runs.run,
        bits=bits,
        zero=0 if only is None else only + weight.zero_offset,
        parts=PARTS[precision],
        source=weight.bits,
        source_groups=weight.scales.shape[0],
        zero_offset=weight.zero_offset,
    )


def unpack_weight(weight: CpuWeight) -> tuple[Tensor, Tensor, Tensor]:
    """What `prepare` was given: codes (K, N) uint8, true zeros (groups, N) int32 and scales (groups, N)."""
    runs, places = sort_by_group(weight.g_idx), unpack_codes(weight.codes, weight.bits)
    codes = places[: weight.in_features]
    if weight.order is not None:
        filled = weight.order >= 0
        codes = torch.empty_like(codes)
        codes[weight.order[filled].long()] = places[filled]
    zeros = weight.zeros if weight.zeros is not None else torch.full(weight.scales.shape, weight.zero)

    def table(values: Tensor) -> Tensor:
        whole = values.new_zeros(weight.source_groups, places.shape[1])  # a group without inputs keeps zeros
        whole[runs.groups] = merge_blocks(values)
        return whole[:, : weight.out_features].contiguous()

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
    """Memory for codes (blocks, groups, vectors, 64)."""
    return empty_bytes(blocks * groups * vectors * 64).view(blocks, groups, vectors, 64)


def _only_zero(words: Tensor, bits: int) -> int | None:
    """The stored zero of every group and output where they are all alike, else None."""
    if 32 % bits:
        found = unpack(words.t(), bits).unique()
    else:  # a word holds whole zeros: one of them tells
        found = unpack(words[:1, :1], bits).unique() if bool((words == words[0, 0]).all()) else words.new_empty(0)
    return int(found) if len(found) == 1 else None


def _blocks(table: Tensor, groups: Tensor, blocks: int) -> Tensor:
    """A table (groups, N) as (blocks, G, 16), padded with zeros."""
    padded = pad(table[groups], (0, blocks * BLOCK - table.shape[1]))
    return padded.view(len(groups), blocks, BLOCK).transpose(0, 1).contiguous()
