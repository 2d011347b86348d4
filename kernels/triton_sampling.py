"""Parameters of sampling on the GPU, and the launch that samples the next tokens. Imports Triton."""

from typing import NamedTuple

import torch
from torch import Tensor

from .tensor_checks import check_tensors
from .triton_launch import Launch
from .triton_matmul import OPTIONS
from .triton_sampling_kernel import sampling_kernel

CANDIDATES = 64  # a power of two
TILE = 64  # tokens of a program of the lm_head
BLOCK = 4096  # tokens of an iteration of a pass over a row
COMPILED = {"num_warps": 8, "maxnreg": 128, **OPTIONS}  # left to itself, ptxas spills to use fewer registers


class SamplingState(NamedTuple):
    """Parameters of the rows, which the host writes when a request joins, and buffers; all on the device.

    A row with temperature 0 takes the most likely token. Values are those of `engine.sampling_params`, within the
    bounds of `engine.logit_rules`, whose other rules (bias, presence and frequency penalty, minimum length) need the
    host.
    """

    temperatures: Tensor  # (M,) float32
    penalties: Tensor  # (M,) float32, repetition penalty
    top_k: Tensor  # (M,) int32; 0: no limit
    top_p: Tensor  # (M,) float32
    min_p: Tensor  # (M,) float32
    numbers: Tensor  # (M, room) float32: random numbers in [0, 1); column p for the token after position p
    seen: Tensor  # (M, V) uint8: 1 for tokens that occurred before; sampled tokens are added
    adjusted: Tensor  # (M, V) float32, buffer: logits after penalty and temperature
    maxima: Tensor  # (2, tiles, M) float32, buffer: maximum and sum of exp(logit - maximum) of each tile


def new_sampling_state(rows: int, vocab: int, room: int, device: torch.device) -> SamplingState:
    """The state of `rows` rows that decode greedily."""
    def full(*shape: int, value: float = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    return SamplingState(
        temperatures=full(rows), penalties=full(rows, value=1), top_k=full(rows, dtype=torch.int32),
        top_p=full(rows, value=1), min_p=full(rows), numbers=full(rows, room),
        seen=full(rows, vocab, dtype=torch.uint8), adjusted=full(rows, vocab), maxima=full(2, -(-vocab // TILE), rows))


def sampling_launch(state: SamplingState, tokens: Tensor, lengths: Tensor, *, pdl: bool = False) -> Launch:
    """Prepare the choice of the next tokens from `state.adjusted` and `state.maxima`.

    Args:
        tokens, lengths: (M,) int32, of which rows with length -1 keep everything.
    Raises:
        ValueError: tensors that do not fit together.
    """
    rows, vocab = state.adjusted.shape
    device = tokens.device
    vectors = {name: getattr(state, name) for name in ("temperatures", "penalties", "top_p", "min_p")}
    check_tensors((rows,), torch.float32, device=device, **vectors)
    check_tensors((rows,), torch.int32, device=device, tokens=tokens, lengths=lengths, top_k=state.top_k)
    check_tensors((rows, None), torch.float32, device=device, numbers=state.numbers)
    check_tensors((rows, vocab), torch.uint8, device=device, seen=state.seen)
    check_tensors((2, -(-vocab // TILE), rows), torch.float32, device=device, maxima=state.maxima)
    arguments = {
        "temperatures": state.temperatures, "top_ks": state.top_k, "top_ps": state.top_p, "min_ps": state.min_p,
        "numbers": state.numbers, "seen": state.seen, "adjusted": state.adjusted, "maxima": state.maxima,
        "tokens": tokens, "lengths": lengths, "V": vocab, "room": state.numbers.shape[1]}
    options = COMPILED | {"launch_pdl": True} if pdl else COMPILED
    return Launch(sampling_kernel, (rows,), arguments, constants(vocab) | {"PDL": pdl} | options)


def constants(vocab: int) -> dict[str, int]:
    """The constexpr arguments that follow from the number of tokens."""
    tiles = -(-vocab // TILE)
    return {"TILES": tiles, "PADDED": max(CANDIDATES, 1 << (tiles - 1).bit_length()), "TILE": TILE,
            "CANDIDATES": CANDIDATES, "BLOCK": BLOCK}
