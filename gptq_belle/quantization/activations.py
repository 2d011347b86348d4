"""The calibration rows between two blocks: always on disk, for a restart, and in memory too where there is room."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from gptq_belle.checkpoint.durable import DurableFile, Stamp
from gptq_belle.checkpoint.tensor_file import DAMAGED, raw
from gptq_belle.errors import InputError
from gptq_belle.quantization.contexts import Contexts
from gptq_belle.quantization.journal import activations_name


class Activations:
    """Hidden states in front of a block, batch by batch; iterating gives (batch, T, hidden_size) float32 tensors.

    A file holds the batches' bytes one behind the other.

    Args:
        partial: ``OUT.partial``, below which their files lie (see `journal.activations_name`).
        shapes: of the batches; none where nothing is calibrated.
        spill: keep them on disk only.

    Attributes:
        index: the block in front of which they stand.
        contexts: what that block's attention has made of them, kept where they are; empty unless it is being solved.
    """

    def __init__(self, partial: Path, shapes: Iterable[tuple[int, ...]], *, spill: bool = False) -> None:
        self.partial, self.shapes, self.spill = partial, list(shapes), spill
        self.index = 0
        self.contexts = Contexts(partial if spill else None)
        self._kept: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[Tensor]:
        yield from self._kept if self._kept is not None else self._read()

    @property
    def nbytes(self) -> int:
        """Of all batches."""
        return sum(4 * math.prod(shape) for shape in self.shapes)

    def write(self, index: int, batches: Iterable[Tensor]) -> Stamp:
        """Put the states in front of block `index` in the place of those that are here; `batches` may come of these.

        Where `batches` ends in an error, the states are those of before.
        """
        kept: list[Tensor] | None = None if self.spill else (self._kept or [])
        try:
            with DurableFile(self.partial / activations_name(index)) as file:
                for place, states in enumerate(batches):
                    states = states.to("cpu", torch.float32).contiguous()
                    file.write(raw(states))
                    if kept is not None:
                        kept[place : place + 1] = [states]  # in place: never two generations in memory
        except Exception:
            if self._kept is not None:
                self.load(self.index)
            raise
        self.index, self._kept = index, kept
        return file.stamp

    def load(self, index: int) -> None:
        """Go on with the states in front of block `index` that an earlier job has written."""
        self.index, self._kept = index, None
        if not self.spill:
            self._kept = list(self._read())

    def forget(self, index: int) -> None:
        """The states in front of block `index` are not needed any more."""
        (self.partial / activations_name(index)).unlink(missing_ok=True)

    def _read(self) -> Iterator[Tensor]:
        path = self.partial / activations_name(self.index)
        with path.open("rb", buffering=0) as file:
            for shape in self.shapes:
                states = torch.empty(shape, dtype=torch.float32)
                if file.readinto(raw(states)) != states.nbytes:
                    raise InputError(f"{path} shrank while it was read", DAMAGED)
                yield states


def mapped(function: Callable[[Tensor], Tensor], batches: Iterable[Tensor], advance: Callable[[], None],
           ) -> Iterator[Tensor]:
    """`function` of each batch, telling `advance` about every one."""
    for states in batches:
        yield function(states)
        advance()
