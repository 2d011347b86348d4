"""The launch of the decode attention. Imports Triton."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .tensor_checks import check_tensors
from .triton_attention_kernel import attention_kernel
from .triton_config import TENSOR_CORES
from .triton_launch import Launch, Workspace
from .triton_matmul import OPTIONS, device_properties, is_interpreted

PIECE = 128  # positions of a program
STEP = 64  # positions of an iteration; PIECE is a multiple of it
MIN_QUERIES = 16  # rows of the smallest matrix instruction
AHEAD = 16  # pieces that the merging program loads at a time
COMPILED = {"num_warps": 2, "num_stages": 3, "maxnreg": 224, **OPTIONS}  # nothing spills: benchmarks/aot_decode.py


class HeadLayout(NamedTuple):
    """Heads of the attention, and how they are arranged in a row of qkv."""

    heads: int  # of queries
    kv_heads: int  # of keys and values; divides `heads`
    head_dim: int
    interleaved: bool  # (heads, 3, head_dim) as in BLOOM; else all queries, then all keys, then all values


def workspace_size(rows: int, layout: HeadLayout, bucket: int, piece: int = PIECE) -> tuple[int, int]:
    """Numbers of float32 and of tickets that `attention_launch` needs of a Workspace."""
    pairs = rows * layout.kv_heads
    group = layout.heads // layout.kv_heads
    return pairs * -(-bucket // piece) * group * (layout.head_dim + 2), pairs


def attention_launch(qkv: Tensor, cache: tuple[Tensor, Tensor, Tensor | None, Tensor | None], slots: Tensor,
                     lengths: Tensor, out: Tensor, workspace: Workspace, layout: HeadLayout, *,
                     rotation: Tensor | None, slopes: Tensor | None, places: Tensor | None, bucket: int,
                     pdl: bool = False, piece: int = PIECE, step: int = STEP) -> Launch:
    """Prepare the attention of one decode step in one block.

    Args:
        qkv: (rows, n) float16 or bfloat16, arranged as `layout` says.
        cache: keys and values (slots, kv_heads, capacity, head_dim) in float16, bfloat16 or int8, and for int8 their
            scales (slots, kv_heads, capacity, 1) float16, else None.
        slots, lengths: (rows,) int32; a row with length -1 is idle and changes nothing.
        out: (rows, heads * head_dim or more), in which `places` (heads * head_dim,) int32 gives the column of each
            number; None for their order.
        rotation: (positions, head_dim) float32, cosines and sines; None with ALiBi, whose slopes are (heads,) float32.
        bucket: the largest number of tokens that a slot may hold after the step.
        piece, step: positions of a program and of an iteration, powers of two.
    Raises:
        ValueError: tensors that do not fit together.
    """
    keys, values, key_scales, value_scales = cache
    _check(qkv, cache, slots, lengths, layout, rotation, slopes)
    pieces = -(-bucket // piece)
    floats, tickets = workspace_size(len(qkv), layout, bucket, piece)
    if workspace.sums.numel() < floats or workspace.tickets.numel() < tickets:
        raise ValueError(f"the workspace has {workspace.sums.numel()} numbers and {workspace.tickets.numel()} tickets; "
                         f"the attention needs {floats} and {tickets}")
    if key_scales is not None:
        keys, values = keys.view(torch.int16), values.view(torch.int16)
    arguments = {
        "qkv": qkv, "keys": keys, "values": values, "key_scales": key_scales, "value_scales": value_scales,
        "slots": slots, "lengths": lengths, "rotation": rotation, "slopes": slopes, "places": places, "out": out,
        "sums": workspace.sums, "tickets": workspace.tickets, "capacity": keys.shape[2], "row_size": qkv.shape[1],
        "out_size": out.shape[1]}
    has_assembly = not is_interpreted() and device_properties(qkv.device)[0] >= TENSOR_CORES
    options = COMPILED | {"launch_pdl": True} if pdl else COMPILED
    return Launch(attention_kernel, (pieces, layout.kv_heads, len(qkv)), arguments,
                  constants(layout, piece, step) | {"ASM": has_assembly, "PDL": pdl} | options)


def constants(layout: HeadLayout, piece: int = PIECE, step: int = STEP) -> dict[str, int]:
    """The constexpr arguments that follow from the heads."""
    heads, kv_heads, d, interleaved = layout
    group = heads // kv_heads
    if interleaved:
        row = {"QUERY_STEP": 3 * d, "GROUP_STEP": 3 * d, "KEY_START": d, "VALUE_START": 2 * d, "KEY_STEP": 3 * d}
    else:
        row = {"QUERY_STEP": d, "GROUP_STEP": group * d, "KEY_START": heads * d,
               "VALUE_START": (heads + kv_heads) * d, "KEY_STEP": d}
    return {**row, "D": d, "GROUP": group, "PIECE": piece, "STEP": step, "AHEAD": AHEAD,
            "QUERIES": max(MIN_QUERIES, triton.next_power_of_2(group))}


def _check(qkv: Tensor, cache: tuple[Tensor, Tensor, Tensor | None, Tensor | None], slots: Tensor, lengths: Tensor,
           layout: HeadLayout, rotation: Tensor | None, slopes: Tensor | None) -> None:
    """Refuse tensors that the kernel would misread."""
    keys, values, key_scales, value_scales = cache
    device, d = qkv.device, layout.head_dim
    check_tensors((len(qkv), (layout.heads + 2 * layout.kv_heads) * d), torch.float16, torch.bfloat16, device=device,
                  qkv=qkv)
    check_tensors((keys.shape[0], layout.kv_heads, keys.shape[2], d), keys.dtype, device=device, keys=keys,
                  values=values)
    check_tensors((len(qkv),), torch.int32, device=device, slots=slots, lengths=lengths)
    if key_scales is not None and value_scales is not None:
        check_tensors(keys.shape, torch.int8, device=device, keys=keys)
        check_tensors((*keys.shape[:-1], 1), torch.float16, device=device, key_scales=key_scales,
                      value_scales=value_scales)
    else:
        check_tensors(keys.shape, torch.float16, torch.bfloat16, device=device, keys=keys)
    if rotation is not None:
        check_tensors((len(rotation), d), torch.float32, device=device, rotation=rotation)
    if slopes is not None:
        check_tensors((layout.heads,), torch.float32, device=device, slopes=slopes)
