"""Record the output of a block's attention, so that later passes through the block do not compute it again.

A block runs once for each stage of its linears, up to that stage. When the stage of the output projection is reached,
the weights before it no longer change, so that q, k, v and attention run in one pass instead of four.
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


class AttentionOutputs:
    """Inputs of the output projection, one tensor per piece of rows in the order of the pass; float32 on the CPU.

    Args:
        folder: folder of an unnamed temporary file that holds them; None to keep them in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._shapes: list[torch.Size] = []
        self._pieces: list[Tensor] = []
        self._file: BinaryIO | None = None
        self._complete = False

    def __iter__(self) -> Iterator[Tensor]:
        if self._file is None:
            yield from self._pieces
            return
        self._file.seek(0)
        for shape in self._shapes:
            states = torch.empty(shape, dtype=torch.float32)
            if self._file.readinto(byte_view(states)) != states.nbytes:  # type: ignore[attr-defined]
                raise InputError(f"a file in {self.folder} shrank while it was read", DAMAGED)
            yield states

    def clear(self) -> None:
        """Discard everything, and free its memory or disk space."""
        if self._file is not None:
            self._file.close()
        self._shapes, self._pieces, self._file, self._complete = [], [], None, False

    @contextmanager
    def forward_pass(self, block: nn.Module, arch: Architecture,
                     stage: tuple[str, ...] | None = None) -> Iterator[PieceContext]:
        """A context for one pass of all pieces up to `stage`, or through the whole block if that is None.

        The first pass that reaches the output projection records its inputs; later passes replay them.

        Returns:
            A function that gives the context for running one piece; outside of it the block is unchanged, so that other
            rows may run between two pieces.
        """
        if not arch.attention or (stage is not None and arch.stages.index(stage) < arch.output_stage):
            yield nullcontext
        elif self._complete:
            recorded = iter(self)
            yield lambda: self._replaying(block, arch, recorded)
        else:
            yield lambda: self._recording(block, arch)
            self._complete = True

    @contextmanager
    def _recording(self, block: nn.Module, arch: Architecture) -> Iterator[None]:
        hook = block.get_submodule(arch.output).register_forward_pre_hook(lambda _, inputs: self._record(inputs[0]))
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _replaying(self, block: nn.Module, arch: Architecture, recorded: Iterator[Tensor]) -> Iterator[None]:
        attention: Any = block.get_submodule(arch.attention)
        output = block.get_submodule(arch.output)

        def forward(*args: Any, **_: Any) -> Tensor | tuple[Tensor | None, ...]:
            weight = cast(Tensor, output.weight)
            result = output(next(recorded).to(weight.device))
            if arch.family.residual_attention:
                result.add_(args[1])
            return (result, *[None] * (arch.attention_results - 1)) if arch.attention_results else result

        attention.forward = forward  # an instance attribute, which hides the method of its class
        try:
            yield
        finally:
            del attention.forward

    def _record(self, states: Tensor) -> None:
        states = states.to("cpu", torch.float32).contiguous()
        if self.folder is None:
            self._pieces.append(states)
            return
        try:
            if self._file is None:
                self._file = cast(BinaryIO, tempfile.TemporaryFile(dir=self.folder))  # noqa: SIM115 - see clear
            self._file.write(byte_view(states))
        except OSError as error:
            error.filename = str(self.folder)  # the error of a full disk names no file
            raise
        self._shapes.append(states.shape)
