"""What a block's attention has computed, kept so that the passes behind it do not compute it again.

A block is run once for every stage of its linears, each time up to that stage. Nothing in front of attention's output
projection changes any more once that is reached: of four passes through q, k, v and the attention itself one is left.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from gptq_belle.checkpoint.direct_io import byte_view
from gptq_belle.checkpoint.safetensors_file import DAMAGED
from gptq_belle.errors import InputError
from gptq_belle.models.architectures import Architecture

PieceContext = Callable[[], AbstractContextManager[None]]


class BatchList:
    """Batches (rows, T, hidden_size) in front of a block that are at hand, with contexts as `Activations` has them."""

    def __init__(self, *batches: Tensor) -> None:
        self.batches, self.attention = batches, AttentionOutputs()

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


class AttentionOutputs:
    """Inputs of the output projection, piece by piece in the order in which they ran; float32, on the CPU.

    Args:
        folder: where a file without a name keeps them; None for memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._shapes: list[torch.Size] = []
        self._kept: list[Tensor] = []
        self._file: BinaryIO | None = None
        self._whole = False

    def __iter__(self) -> Iterator[Tensor]:
        if self._file is None:
            yield from self._kept
            return
        self._file.seek(0)
        for shape in self._shapes:
            states = torch.empty(shape, dtype=torch.float32)
            if self._file.readinto(byte_view(states)) != states.nbytes:  # type: ignore[attr-defined]
                raise InputError(f"a file in {self.folder} shrank while it was read", DAMAGED)
            yield states

    def clear(self) -> None:
        """Forget everything, and give its memory or the disk's space back."""
        if self._file is not None:
            self._file.close()
        self._shapes, self._kept, self._file, self._whole = [], [], None, False

    @contextmanager
    def forward_pass(self, block: nn.Module, arch: Architecture,
                     stage: tuple[str, ...] | None = None) -> Iterator[PieceContext]:
        """A context for one pass over all pieces, up to a stage or through the whole block.

        The first pass that comes to the output projection leaves here what the later ones take.

        Returns:
            what each piece has to run in; between two pieces the block is as it was, and other rows may run.
        """
        if stage == arch.stages[0]:
            yield nullcontext
        elif self._whole:
            recorded = iter(self)
            yield lambda: self._replayed(block, arch, recorded)
        else:
            yield lambda: self._recorded(block, arch)
            self._whole = True

    @contextmanager
    def _recorded(self, block: nn.Module, arch: Architecture) -> Iterator[None]:
        hook = block.get_submodule(arch.output).register_forward_pre_hook(lambda _, inputs: self._put(inputs[0]))
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _replayed(self, block: nn.Module, arch: Architecture, recorded: Iterator[Tensor]) -> Iterator[None]:
        attention: Any = block.get_submodule(arch.attention)
        output = block.get_submodule(arch.output)

        def forward(*args: Any, **_: Any) -> tuple[Tensor, None]:
            weight = cast(Tensor, output.weight)
            result = output(next(recorded).to(weight.device))
            return (result.add_(args[1]) if arch.residual_in_attention else result), None

        attention.forward = forward  # the instance's, which hides its class's
        try:
            yield
        finally:
            del attention.forward

    def _put(self, states: Tensor) -> None:
        states = states.to("cpu", torch.float32).contiguous()
        if self.folder is None:
            self._kept.append(states)
            return
        try:
            if self._file is None:
                self._file = cast(BinaryIO, tempfile.TemporaryFile(dir=self.folder))  # noqa: SIM115 - see clear
            self._file.write(byte_view(states))
        except OSError as error:
            error.filename = str(self.folder)  # a full disk says no name by itself
            raise
        self._shapes.append(states.shape)
