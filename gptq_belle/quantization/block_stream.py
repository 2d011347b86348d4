"""The source model with one block in memory at a time: load a block, run it on the calibration rows, drop it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.checkpoint.source_model import SourceModel
from gptq_belle.common.timers import PhaseClock
from gptq_belle.errors import InputError
from gptq_belle.quantization.attention_outputs import PieceContext
from gptq_belle.quantization.bloom_attention import use_fused_modules

TOKENS_A_BATCH = 4096


class _Stop(Exception):
    """Ends a forward pass as soon as what it was run for is known."""


class BlockStream(SourceModel):
    """Blocks of a checkpoint in float32, one at a time, and what the calibration rows are in front of them.

    Attributes:
        device: where blocks run.
        max_rows: rows that go through a block at a time; None for whole batches.
        clock: told what time goes into: "reading", "forwards", "hessians".
    """

    def __init__(self, reader: CheckpointReader, device: torch.device, clock: PhaseClock | None = None) -> None:
        super().__init__(reader, device)
        self.clock = clock or PhaseClock()
        self.max_rows: int | None = None
        use_fused_modules(self.model)
        self._arguments: dict[tuple[torch.device, torch.Size], tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def load_block(self, index: int) -> nn.Module:
        """Block `index` on the device, in float32, with the source's weights.

        Raises:
            InputError: a tensor is missing, misshapen, or holds NaN or infinity; it is named.
        """
        block = self.blocks.get_submodule(str(index))
        with self.clock("reading"):
            self.fill(f"{self.arch.blocks}.{index}", [f"{name}.weight" for name in self.arch.linears])
        return block

    def prefetch(self, index: int) -> None:
        """Begin to bring block `index` from the disk into the system's cache, while something else goes on."""
        names = [f"{self.arch.blocks}.{index}.{name}" for name, _ in
                 self.blocks.get_submodule(str(index)).named_parameters()] if index < self.count else []

        def read() -> None:
            for name in names:
                with suppress(InputError):  # whoever needs the tensor says what is wrong with it
                    self.reader.prefetch(name)

        threading.Thread(target=read, name="prefetch", daemon=True).start()

    def release(self, block: nn.Module) -> None:
        """Give a block's memory back."""
        block.to("meta")

    def batches(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Token ids (rows, T) in batches of the size in which they run."""
        return rows.split(max(1, TOKENS_A_BATCH // rows.shape[1]))

    def embed(self, rows: Tensor) -> Iterator[Tensor]:
        """Run everything that comes before the first block; only the embeddings of tokens that occur are in memory.

        Args:
            rows: (rows, T) int64 token ids without padding.
        Returns:
            The first block's inputs, one (batch, T, hidden_size) float32 tensor on the CPU a batch.
        """
        tokens, places = rows.unique(return_inverse=True)
        self.fill_embedding(tokens.tolist())
        for name in self.arch.before[1:]:
            self.fill(name)
        for batch in self.batches(places):
            yield self._embed(batch)
        for name in self.arch.before:
            self.model.get_submodule(name).to("meta")

    def linear_input(self, block: nn.Module, linear: str, states: Tensor) -> Tensor:
        """The input (rows, T, K) of a linear inside the block, on `states` (rows, T, hidden_size); what would come
        behind it is left out."""
        found: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0])
            raise _Stop

        with _hooked([block.get_submodule(linear).register_forward_pre_hook(keep)]), suppress(_Stop):
            self._run(block, states)
        return found[0]

    def run(self, block: nn.Module, states: Tensor, piece_context: PieceContext = nullcontext) -> Tensor:
        """The block's output (batch, T, hidden_size) on the CPU, on `states` of the same shape.

        Args:
            block, states: as they are.
            piece_context: what each piece runs in, see `AttentionOutputs.forward_pass`.
        """
        pieces = []
        for piece in states.split(self.max_rows or len(states)):
            with piece_context():
                pieces.append(self._run(block, piece).cpu())
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def block_arguments(self, shape: torch.Size) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a block gets beside hidden states of `shape` (rows, T): it follows from the shape alone."""
        if (self.device, shape) not in self._arguments:
            list(self.embed(torch.zeros(shape, dtype=torch.int64)))
        return self._arguments[self.device, shape]

    @contextmanager
    def final_norm(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A context with what comes between the last block and the head, to be run on states of any shape."""
        for root in self.arch.after:
            self.fill(root)
        modules = [self.model.get_submodule(root) for root in self.arch.after]

        @torch.no_grad()
        def run(states: Tensor) -> Tensor:
            states = states.to(self.device)
            for module in modules:
                states = module(states)
            return states

        try:
            yield run
        finally:
            for module in modules:
                module.to("meta")

    def _embed(self, places: Tensor) -> Tensor:
        """One batch, places (batch, T) among the embeddings; notes what the blocks get beside the hidden states."""
        hidden: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs.pop("hidden_states")
            hidden.append(states.cpu())
            self._arguments[self.device, states.shape[:2]] = args[1:], kwargs
            raise _Stop

        first = self.blocks.get_submodule("0")
        hook = first.register_forward_pre_hook(keep, with_kwargs=True)
        with _hooked([hook]), torch.no_grad(), suppress(_Stop):
            self.model(input_ids=places.to(self.device), use_cache=False)
        return hidden[0]

    @torch.no_grad()
    def _run(self, block: nn.Module, states: Tensor) -> Tensor:
        args, kwargs = self.block_arguments(states.shape[:2])
        with self.clock("forwards"):
            output = block(states.to(self.device), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


@contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
