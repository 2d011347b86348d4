"""Sampling parameters of the rows of fused decode steps, written to the GPU when requests join or leave."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_belle.engine.logit_rules import MAX_FACTOR, MIN_FACTOR
from gptq_belle.engine.sampling import Sampler
from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.kernels.triton_sampling import SamplingState


def state_of_rows(state: SamplingState, rows: int) -> SamplingState:
    """The part of the state that steps of `rows` rows use."""
    tiles = state.maxima.shape[1]
    first = SamplingState(*(tensor[:rows] for tensor in state))
    return first._replace(maxima=state.maxima.flatten()[: 2 * tiles * rows].view(2, tiles, rows))


def write_samplers(state: SamplingState, samplers: Sequence[Sampler], lengths: Sequence[int],
                   counts: Sequence[int]) -> None:
    """Write parameters, random numbers and the tokens that occurred before, of the first rows.

    Args:
        state: written.
        samplers: one per row; they are not changed. Rows that need the host are greedy on the device.
        lengths: cached tokens of each row: the column of its first random number.
        counts: how many tokens each row can still get.
    """
    params = [SamplingParams() if sampler.needs_host else sampler.params for sampler in samplers]
    vocab = state.seen.shape[1]
    _write(state.temperatures, [p.temperature and max(p.temperature, MIN_FACTOR) for p in params])
    _write(state.penalties, [min(max(p.repetition_penalty, MIN_FACTOR), MAX_FACTOR) for p in params])
    _write(state.top_k, [min(p.top_k, vocab) for p in params])
    _write(state.top_p, [p.top_p for p in params])
    _write(state.min_p, [p.min_p for p in params])
    numbers, seen = torch.zeros(len(params), state.numbers.shape[1]), list[int]()
    for row, (sampler, length, count) in enumerate(zip(samplers, lengths, counts, strict=True)):
        numbers[row, length : length + count] = torch.tensor(sampler.next_numbers(count))
        seen += [row * vocab + token for token in sampler.rules.seen]
    state.numbers[: len(params)].copy_(numbers)
    state.seen[: len(params)].zero_()  # there: a copy of all bytes is 16 MB for 64 rows of BELLE's vocabulary
    state.seen.view(-1).index_fill_(0, torch.tensor(seen, dtype=torch.long).to(state.seen.device), 1)


def _write(target: Tensor, values: Sequence[float]) -> None:
    target[: len(values)].copy_(torch.tensor(values, dtype=target.dtype))
