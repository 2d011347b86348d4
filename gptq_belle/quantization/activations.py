"""The calibration rows between two blocks: always on disk, for a restart, and in memory too where there is room."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptq_belle.checkpoint.direct_io import byte_view
from gptq_belle.checkpoint.safetensors_file import DAMAGED
from gptq_belle.common.files import DurableFile, Stamp
from gptq_belle.errors import InputError
from gptq_belle.quantization.attention_outputs import AttentionOutputs
from gptq_belle.quantization.journal import QUANTIZED, activations_name


class Activations:
    """Hidden states in front of a block, batch by batch; iterating gives (batch, T, hidden_size) float32 tensors.

    A file holds the batches' bytes one behind the other.

    Args:
        partial: ``OUT.partial``, below which their files lie (see `journal.activations_name`).
        shapes: of the batches; none where nothing is calibrated.
        spill: keep them on disk only.
        model: whose they are, `journal.QUANTIZED` or `journal.FULL`.

    Attributes:
        index: the block in front of which they stand.
        contexts: what that block's attention has made of them, kept where they are; empty unless it is being solved.
    """

    def __init__(self, partial: Path, shapes: Iterable[tuple[int, ...]], *, spill: bool = False,
                 model: str = QUANTIZED) -> None:
        self.partial, self.shapes, self.spill, self.model = partial, list(shapes), spill, model
        self.index = 0
        self.attention = AttentionOutputs(partial if spill else None)
        self._kept: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[Tensor]:
        yield from self._kept if self._kept is not None else self._read()

    def name(self, index: int) -> str:
        """Path below ``OUT.partial`` of the states in front of block `index`."""
        return activations_name(index, self.model)

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
            with DurableFile(self.partial / self.name(index)) as file:
                for place, states in enumerate(batches):
                    states = states.to("cpu", torch.float32).contiguous()
                    file.write(byte_view(states))
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
        (self.partial / self.name(index)).unlink(missing_ok=True)

    def _read(self) -> Iterator[Tensor]:
        path = self.partial / self.name(self.index)
        with path.open("rb", buffering=0) as file:
            for shape in self.shapes:
                states = torch.empty(shape, dtype=torch.float32)
                if file.readinto(byte_view(states)) != states.nbytes:
                    raise InputError(f"{path} shrank while it was read", DAMAGED)
                yield states


@dataclass(frozen=True, slots=True)
class ActivationPair:
    """The calibration rows in the quantized model and, where its outputs are aimed at, in the full-precision one.

    Attributes:
        quantized, full: in front of the same block.
        seen: how many rows, from the first one on, Hessians see; those behind them are held out.
    """

    quantized: Activations
    full: Activations | None = None
    seen: int = 0

    def __len__(self) -> int:
        return len(self.quantized)

    @property
    def models(self) -> list[Activations]:
        """Those that there are."""
        return [self.quantized] if self.full is None else [self.quantized, self.full]

    def write(self, index: int, *batches: Callable[[], Iterable[Tensor]]) -> dict[str, Stamp]:
        """`Activations.write` for each model; where one ends in an error, all are those of before."""
        before, files = self.quantized.index, {}
        for states, outputs in zip(self.models, batches, strict=True):
            try:
                files[states.name(index)] = states.write(index, outputs())
            except Exception:
                if states is not self.quantized:
                    self.quantized.load(before)
                raise
        return files

    def clear_attention(self) -> None:
        """`AttentionOutputs.clear` for each model."""
        for states in self.models:
            states.attention.clear()

    def load(self, index: int) -> None:
        """`Activations.load` for each model."""
        for states in self.models:
            states.load(index)

    def forget(self, index: int) -> None:
        """`Activations.forget` for each model."""
        for states in self.models:
            states.forget(index)


def map_batches(function: Callable[[Tensor], Tensor], batches: Iterable[Tensor], advance: Callable[[], None],
           ) -> Iterator[Tensor]:
    """`function` of each batch, telling `advance` about every one."""
    for states in batches:
        yield function(states)
        advance()
