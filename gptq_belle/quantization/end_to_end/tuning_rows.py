"""What tuning learns from: calibration rows in front of the first block, and the full-precision model's states behind
the last one, from which its predictions follow."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from gptq_belle.errors import UsageError
from gptq_belle.quantization.job import QuantizationJob

LENGTH = 256  # tokens a row, at most
TOKENS, HELD_OUT = 1 << 17, 1 << 13  # at most, of rows to learn from and of those to stop by
SHARE = 16  # one in so many rows is held out


class TuningRows:
    """InMemoryActivations of tokens, in the two models.

    Args:
        states: (rows, T, hidden_size) float32, in front of the first block.
        aims: the same, behind the full-precision model's last norm.
        seed: of the order of batches.
    """

    def __init__(self, states: Tensor, aims: Tensor, seed: int = 0) -> None:
        self.states, self.aims, self.seed = states, aims, seed

    def batch(self, step: int, tokens: int) -> tuple[Tensor, Tensor]:
        """The rows of one step, about so many tokens: every row once before any comes again, in random order."""
        count, length = self._rows_of(tokens), len(self.states)
        numbers = range(step * count, (step + 1) * count)
        orders = {turn: self._order(turn) for turn in {number // length for number in numbers}}
        places = [orders[number // length][number % length] for number in numbers]
        return self.states[places], self.aims[places]

    def batches(self, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows in their order, about so many tokens at a time."""
        count = self._rows_of(tokens)
        yield from zip(self.states.split(count), self.aims.split(count), strict=True)

    def _rows_of(self, tokens: int) -> int:
        return max(1, min(len(self.states), tokens // self.states.shape[1]))

    def _order(self, turn: int) -> list[int]:
        found: list[int] = torch.randperm(len(self.states), generator=torch.Generator().manual_seed(self.seed + turn)
                                          ).tolist()
        return found


def cut(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Calibration rows (rows, T) as rows of `LENGTH` tokens: those to learn from, and those to stop by, which come from
    the end, as the rows do that no Hessian has seen.

    Raises:
        UsageError: there are less than two.
    """
    length = min(LENGTH, tokens.shape[1])
    pieces = tokens[:, : tokens.shape[1] // length * length].reshape(-1, length)
    if len(pieces) < 2:
        raise UsageError(f"tuning needs at least two rows, or {2 * LENGTH} tokens, to calibrate on",
                         "Give more --rows or --seq-len, or take --preset best.")
    held = max(1, min(HELD_OUT // length, len(pieces) // SHARE))
    return pieces[: min(len(pieces) - held, TOKENS // length)], pieces[-held:]


def tuning_rows(job: QuantizationJob, scratch: Path, step: Callable[[int], None]) -> tuple[TuningRows, TuningRows]:
    """Run the full-precision model, with one block in memory at a time.

    Args:
        job: the job.
        scratch: a name for the file that memory is mapped to; it has gone when this returns.
        step: called with the number of every block when it begins.
    Returns:
        InMemoryActivations to learn from, and rows to stop by.
    """
    assert job.tokens is not None
    stream, (learnt, held) = job.stream, cut(job.tokens)
    tokens = torch.cat([learnt, held])
    shape = (2, *tokens.shape, int(stream.model.config.hidden_size))
    states, aims = torch.from_file(str(scratch), shared=True, size=torch.Size(shape).numel(),
                                   dtype=torch.float32).view(shape)
    scratch.unlink()
    count = len(stream.batches(tokens)[0])
    for part, batch in zip(states.split(count), stream.embed(tokens), strict=True):
        part.copy_(batch)
    aims.copy_(states)
    for index in range(stream.count):
        step(index)
        block = stream.load_block(index)
        stream.prefetch(index + 1)
        for batch in aims.split(count):
            batch.copy_(stream.run(block, batch))
        stream.release(block)
    with stream.final_norm() as normalize:
        for batch in aims.split(count):
            batch.copy_(normalize(batch))
    seed = int((job.calibration or {}).get("seed", 0))
    at = len(learnt)
    return TuningRows(states[:at], aims[:at], seed), TuningRows(states[at:], aims[at:])


def scratch_bytes(job: QuantizationJob) -> int:
    """Size of the file that the rows lie in."""
    assert job.tokens is not None
    return 8 * int(job.stream.model.config.hidden_size) * sum(part.numel() for part in cut(job.tokens))
