"""Launches of the kernel for few rows: what is derived from its tensors, and the workspace of a split K.

Imported by the first product, because it imports Triton.
"""

import torch
from torch import Tensor

from . import triton_matmul
from .triton_config import TileConfig, launch_options
from .triton_launch import Launch, Workspace
from .triton_layout import SlicedWeight
from .triton_norm import FoldedNorm, NextNorm
from .triton_skinny import skinny_kernel

ACTIVATIONS = ("none", "gelu", "silu_mul")
MIN_TICKETS = 4096  # kept per stream: of 131,072 outputs
_tickets: dict[tuple[torch.device, int], Tensor] = {}


def skinny_launch(x: Tensor, weight: SlicedWeight, out: Tensor, config: TileConfig, workspace: Workspace | None = None,
                  *, bias: Tensor | None = None, residual: Tensor | None = None, activation: str = "none",
                  places: Tensor | None = None, norm: FoldedNorm | None = None, next_norm: NextNorm | None = None,
                  pdl: bool = False) -> Launch:
    """The launch of activation(norm(x) @ W + bias) + residual. Nothing is launched or allocated here.

    Args:
        x: (M, K') float16 or bfloat16, contiguous, at the places of the weight.
        out: (M, row), contiguous; row is N, N / 2 with "silu_mul", or more with `places`.
        config: the tile; SPLIT_K is at most the number of blocks.
        workspace: as large as `skinny_workspace` says; needed if K is split.
        activation: one of ACTIVATIONS; "silu_mul" needs the columns of the weight in the order of `interleave_gates`.
        places: int32, the column of each output in out; None: the same one.
        norm: if x is the stream times gamma.
        next_norm: if out is the stream, what the norm after it needs; the tile of its moments is config.BN.
        pdl: programmatic dependent launch, for compute capability 9.0 and newer.
    """
    rows, n = x.shape[0], weight.out_features
    arch = triton_matmul.device_properties(x.device)[0]
    sums, tickets = workspace if workspace is not None and config.SPLIT_K > 1 else (None, None)
    arguments = {
        "x": x, "words": weight.words, "scales": weight.scales, "zeros": weight.zeros, "bias": bias,
        "residual": residual, "out": out, "out_places": places, "sums": sums, "tickets": tickets,
        "moments": norm and norm.moments, "gamma_product": norm and norm.gamma_product,
        "eps": norm.eps if norm else 0.0,
        "next_gamma": next_norm and next_norm.gamma, "next_places": next_norm and next_norm.places,
        "next_x": next_norm and next_norm.x, "next_moments": next_norm and next_norm.moments,
        "M": rows, "N": n, "K": weight.places, "out_row": out.shape[1],
        "next_row": next_norm.x.shape[1] if next_norm else 1}
    constants = triton_matmul.weight_constants(weight) | {
        "ACTIVATION": activation, "WIDTH": norm.width if norm else 1, "TILE": norm.tile if norm else 1,
        "BM": config.BM, "BN": config.BN, "BK": config.step(weight.block), "K_WARPS": config.K_WARPS,
        "SPLIT": config.SPLIT_K > 1, "PDL": pdl}
    options = launch_options("skinny", config, weight.bits, weight.run, arch)
    if pdl:
        options["launch_pdl"] = True
    return Launch(skinny_kernel, skinny_grid(rows, n, config), arguments, constants | options)


def skinny_grid(rows: int, outputs: int, config: TileConfig) -> tuple[int, int, int]:
    """Tiles of outputs, tiles of rows, and parts of K."""
    return -(-outputs // config.BN), -(-rows // config.BM), config.SPLIT_K


def skinny_workspace(rows: int, outputs: int, config: TileConfig) -> tuple[int, int]:
    """Elements of `Workspace.sums` and `Workspace.tickets` that a launch needs."""
    tiles_n, tiles_m, parts = skinny_grid(rows, outputs, config)
    return (parts * rows * outputs, tiles_n * tiles_m) if parts > 1 else (0, 0)


def new_workspace(out: Tensor, config: TileConfig) -> Workspace | None:
    """The workspace of one launch to out (M, N) on the current stream; None if K is not split."""
    sums, tickets = skinny_workspace(out.shape[0], out.shape[1], config)
    if not sums:
        return None
    return Workspace(torch.empty(sums, dtype=torch.float32, device=out.device), _zero_tickets(tickets, out.device))


def _zero_tickets(count: int, device: torch.device) -> Tensor:
    """At least `count` tickets. Every stream has its own, which its launches use one after the other.

    While a CUDA graph is captured, new ones are made and cleared in it: captured memory belongs to the graph.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if key not in _tickets or len(_tickets[key]) < count:
        _tickets[key] = torch.zeros(max(count, MIN_TICKETS), dtype=torch.int32, device=device)
    return _tickets[key]
