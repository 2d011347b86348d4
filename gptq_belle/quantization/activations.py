"""Calibration activations between two blocks: on disk for resuming, and in memory where there is room."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptq_belle.checkpoint.direct_io import byte_view
from gptq_belle.checkpoint.safetensors_file import DAMAGED
from gptq_belle.common.files import AtomicFile, FileChecksum
from gptq_belle.errors import InputError
from gptq_belle.quantization.attention_outputs import AttentionOutputs
from gptq_belle.quantization.journal import QUANTIZED, activations_name


class InMemoryActivations:
    """Batches (rows, T, hidden_size) in memory only, with the interface of `Activations` for one block."""

    def __init__(self, *batches: Tensor) -> None:
        self.batches, self.attention = batches, AttentionOutputs()

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


class Activations:
    """The inputs of a block; iteration yields one float32 tensor (batch, T, hidden_size) per batch.

    A file holds the bytes of all batches in order.

    Args:
        partial: ``OUT.partial``, which holds the files (see `journal.activations_name`).
        shapes: shapes of the batches; empty without calibration.
        spill: keep activations on disk only.
        model: `journal.QUANTIZED` or `journal.FULL`.

    Attributes:
        index: index of the block.
        attention: recorded attention outputs of the block while it is being quantized; otherwise empty.
    """

    def __init__(self, partial: Path, shapes: Iterable[tuple[int, ...]], *, spill: bool = False,
                 model: str = QUANTIZED) -> None:
        self.partial, self.shapes, self.spill, self.model = partial, list(shapes), spill, model
        self.index = 0
        self.attention = AttentionOutputs(partial if spill else None)
        self._batches: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[Tensor]:
        yield from self._batches if self._batches is not None else self._read()

    def name(self, index: int) -> str:
        """Path of the inputs of block `index` below ``OUT.partial``."""
        return activations_name(index, self.model)

    def write(self, index: int, batches: Iterable[Tensor]) -> FileChecksum:
        """Replace the activations by the inputs of block `index`, which may be computed from the current ones.

        If `batches` raises, the current activations are kept.
        """
        written: list[Tensor] | None = None if self.spill else (self._batches or [])
        try:
            with AtomicFile(self.partial / self.name(index)) as file:
                for place, states in enumerate(batches):
                    states = states.to("cpu", torch.float32).contiguous()
                    file.write(byte_view(states))
                    if written is not None:
                        written[place : place + 1] = [states]  # in place, so that memory never holds both
        except Exception:
            if self._batches is not None:
                self.load(self.index)
            raise
        self.index, self._batches = index, written
        return file.checksum

    def load(self, index: int) -> None:
        """Use the inputs of block `index` that an interrupted job has written."""
        self.index, self._batches = index, None
        if not self.spill:
            self._batches = list(self._read())

    def delete(self, index: int) -> None:
        """Delete the file of the inputs of block `index`."""
        (self.partial / self.name(index)).unlink(missing_ok=True)

    def _read(self) -> Iterator[Tensor]:
        path = self.partial / self.name(self.index)
        with path.open("rb", buffering=0) as file:
            for shape in self.shapes:
                states = torch.empty(shape, dtype=torch.float32)
                if file.readinto(byte_view(states)) != states.nbytes:
                    raise InputError(f"{path} shrank while it was read", DAMAGED)
                yield states


BatchSource = Activations | InMemoryActivations


@dataclass(frozen=True, slots=True)
class ActivationPair:
    """The activations of the quantized model and, for full-precision targets, of the full-precision model.

    Attributes:
        quantized, full: inputs of the same block.
        hessian_rows: number of rows for the Hessians, from the first one on; the others are held out.
    """

    quantized: Activations
    full: Activations | None = None
    hessian_rows: int = 0

    def __len__(self) -> int:
        return len(self.quantized)

    @property
    def models(self) -> list[Activations]:
        """The activations of one or both models."""
        return [self.quantized] if self.full is None else [self.quantized, self.full]

    def write(self, index: int, *batches: Callable[[], Iterable[Tensor]]) -> dict[str, FileChecksum]:
        """`Activations.write` for each model; if one raises, the current activations of all are kept."""
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

    def delete(self, index: int) -> None:
        """`Activations.delete` for each model."""
        for states in self.models:
            states.delete(index)
