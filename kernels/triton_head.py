"""The launch of the lm_head at the end of a decode step. Imports Triton."""

import torch
from torch import Tensor

from . import triton_matmul
from .tensor_checks import check_tensors
from .triton_config import TileConfig, check_offsets, skinny_tile
from .triton_embedding import DENSE
from .triton_head_kernel import head_kernel
from .triton_launch import Launch, Workspace
from .triton_layout import SlicedWeight
from .triton_norm import FoldedNorm
from .triton_sampling import TILE, SamplingState, sampling_launch

DENSE_STEP = 64  # inputs of an iteration on a dense head
DENSE_OPTIONS = {"num_warps": 2, "num_stages": 4, **triton_matmul.OPTIONS}
MAX_ROWS = 32  # of a program
REGISTERS = {8: 128, 16: 168, 32: 224}  # per thread, by rows of a program: with 160 for 32 rows, sampling spills


def workspace_size(rows: int) -> tuple[int, int]:
    """Numbers of float32 and of tickets that `head_launches` needs of a Workspace."""
    row_tiles = -(-rows // 8)
    return 0, row_tiles + row_tiles % 2 + 2 * rows  # the maxima have 64 bits


def head_launches(x: Tensor, head: SlicedWeight | Tensor, bias: Tensor | None, norm: FoldedNorm, logits: Tensor,
                  tokens: Tensor, lengths: Tensor, workspace: Workspace,
                  sampling: SamplingState | None = None, *, pdl: bool = False) -> list[Launch]:
    """Prepare the final norm, the lm_head and the choice of the next tokens: one launch, or two with sampling.

    Args:
        x: (M, K') float16 or bfloat16, the stream times gamma.
        head: the packed lm_head with V outputs, in order, or a dense one (V, width).
        bias: (V,), to which beta @ W of a layer norm is added; None without one.
        norm: the final norm.
        logits: (M, V) float32, written.
        tokens, lengths: (M,) int32. Rows with length -1 are idle and keep both.
        workspace: as large as `workspace_size` says.
        sampling: parameters of the rows; None for greedy decoding.
    Raises:
        ValueError: tensors that do not fit together, or that 32-bit offsets cannot address.
    """
    rows, n = logits.shape
    check_tensors((rows, n), torch.float32, device=x.device, logits=logits)
    check_tensors((rows,), torch.int32, device=x.device, tokens=tokens, lengths=lengths)
    constants, options = _configuration(head, x)
    words, scales, zeros, inputs = (head, None, None, norm.width) if isinstance(head, Tensor) else (
        head.words, head.scales, head.zeros, head.places)
    check_tensors((rows, inputs), torch.float16, torch.bfloat16, device=x.device, x=x)
    row_tiles = -(-rows // constants["BM"])
    first = row_tiles + row_tiles % 2
    arguments = {
        "x": x, "words": words, "scales": scales, "zeros": zeros, "bias": bias, "moments": norm.moments,
        "gamma_product": norm.gamma_product, "eps": norm.eps, "logits": logits, "tokens": tokens, "lengths": lengths,
        "tickets": workspace.tickets, "best": workspace.tickets[first : first + 2 * rows].view(torch.int64),
        "temperatures": sampling and sampling.temperatures, "penalties": sampling and sampling.penalties,
        "seen": sampling and sampling.seen, "adjusted": sampling and sampling.adjusted,
        "maxima": sampling and sampling.maxima, "M": rows, "N": n, "K": x.shape[1]}
    constants |= {"WIDTH": norm.width, "MOMENTS_TILE": norm.tile, "BN": TILE, "PDL": pdl}
    launch = Launch(head_kernel, (row_tiles, -(-n // TILE)), arguments,
                    constants | options | ({"launch_pdl": True} if pdl else {}))
    return [launch] if sampling is None else [launch, sampling_launch(sampling, tokens, lengths, pdl=pdl)]


def dense_tile(rows: int) -> dict[str, int | bool]:
    """The constexpr arguments for a dense head."""
    most = next((most for most in (8, 16) if rows <= most), MAX_ROWS)
    return {**DENSE, "BM": most, "BK": DENSE_STEP, "ASM": False}


def packed_options(tile: TileConfig) -> dict[str, int | bool]:
    """Options of the compiler for a packed head."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "maxnreg": REGISTERS[tile.BM],
            **triton_matmul.OPTIONS}


def _configuration(head: SlicedWeight | Tensor, x: Tensor) -> tuple[dict[str, int | bool], dict[str, int | bool]]:
    """Constexpr arguments and options of the compiler."""
    if isinstance(head, Tensor):
        return dense_tile(len(x)), DENSE_OPTIONS
    check_offsets(**{"the packed lm_head": head.words.numel()})
    problem, arch = triton_matmul.problem_of(head, len(x), x.dtype), triton_matmul.device_properties(x.device)[0]
    tile = skinny_tile(problem._replace(rows=min(problem.rows, MAX_ROWS)), arch)
    return {**triton_matmul.weight_constants(head), "BM": tile.BM, "BK": tile.step(head.block)}, packed_options(tile)
