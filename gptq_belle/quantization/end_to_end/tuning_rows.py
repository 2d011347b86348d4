"""Training and held-out rows of end-to-end tuning: inputs of the first block, and final states of the full model."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from gptq_belle.errors import UsageError
from gptq_belle.quantization.job import QuantizationJob

ROW_TOKENS = 256  # at most
TRAINING_TOKENS, HELD_OUT_TOKENS = 1 << 17, 1 << 13  # at most
HELD_OUT_EVERY = 16  # one row in 16 is held out


class TuningRows:
    """Inputs of the quantized model and targets for its outputs.

    Args:
        inputs: (rows, T, hidden_size) float32, inputs of the first block.
        targets: (rows, T, hidden_size) float32, outputs of the full-precision model's last norm.
        seed: random seed of the order of batches.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, seed: int = 0) -> None:
        self.inputs, self.targets, self.seed = inputs, targets, seed

    def batch(self, step: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one training step, about `tokens` tokens, in a random order for each epoch."""
        count, length = self._rows_per_batch(tokens), len(self.inputs)
        numbers = range(step * count, (step + 1) * count)
        orders = {epoch: self._order(epoch) for epoch in {number // length for number in numbers}}
        places = [orders[number // length][number % length] for number in numbers]
        return self.inputs[places], self.targets[places]

    def batches(self, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of all rows in order, about `tokens` tokens at a time."""
        count = self._rows_per_batch(tokens)
        yield from zip(self.inputs.split(count), self.targets.split(count), strict=True)

    def _rows_per_batch(self, tokens: int) -> int:
        return max(1, min(len(self.inputs), tokens // self.inputs.shape[1]))

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order: list[int] = torch.randperm(len(self.inputs), generator=generator).tolist()
        return order


def split_rows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Split calibration rows (rows, T) into training rows and held-out rows of at most `ROW_TOKENS` tokens.

    Held-out rows are taken from the end, as are the rows that are held out of the Hessians.

    Raises:
        UsageError: the tokens make fewer than two rows.
    """
    length = min(ROW_TOKENS, tokens.shape[1])
    rows = tokens[:, : tokens.shape[1] // length * length].reshape(-1, length)
    if len(rows) < 2:
        raise UsageError(f"tuning needs at least two rows, or {2 * ROW_TOKENS} tokens, to calibrate on",
                         "Give more --rows or --seq-len, or use --preset best.")
    held_out = max(1, min(HELD_OUT_TOKENS // length, len(rows) // HELD_OUT_EVERY))
    return rows[: min(len(rows) - held_out, TRAINING_TOKENS // length)], rows[-held_out:]


def tuning_rows(job: QuantizationJob, scratch: Path, step: Callable[[int], None]) -> tuple[TuningRows, TuningRows]:
    """Compute training rows and held-out rows with the full-precision model, one block in memory at a time.

    Args:
        scratch: path of a temporary file that the rows are mapped to; it is unlinked at once.
        step: progress callback, called with the index of each block when it starts.
    """
    assert job.tokens is not None
    stream, (training, held_out) = job.stream, split_rows(job.tokens)
    tokens = torch.cat([training, held_out])
    shape = (2, *tokens.shape, int(stream.model.config.hidden_size))
    inputs, targets = torch.from_file(str(scratch), shared=True, size=torch.Size(shape).numel(),
                                      dtype=torch.float32).view(shape)
    scratch.unlink()
    count = len(stream.batches(tokens)[0])
    for part, batch in zip(inputs.split(count), stream.embed(tokens), strict=True):
        part.copy_(batch)
    targets.copy_(inputs)
    for index in range(stream.count):
        step(index)
        block = stream.load_block(index)
        stream.prefetch(index + 1)
        for batch in targets.split(count):
            batch.copy_(stream.run(block, batch))
        stream.release(block)
    with stream.final_norm() as normalize:
        for batch in targets.split(count):
            batch.copy_(normalize(batch))
    seed, split = int((job.calibration or {}).get("seed", 0)), len(training)
    return TuningRows(inputs[:split], targets[:split], seed), TuningRows(inputs[split:], targets[split:])


def tuning_scratch_bytes(job: QuantizationJob) -> int:
    """Size of the temporary file of `tuning_rows`, in bytes."""
    assert job.tokens is not None
    return 8 * int(job.stream.model.config.hidden_size) * sum(part.numel() for part in split_rows(job.tokens))
