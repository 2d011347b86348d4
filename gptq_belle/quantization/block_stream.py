"""The source model with one block in memory at a time: load a block, run it on calibration rows, release it."""

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

TOKENS_PER_BATCH = 4096


BlockArguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a block, besides the hidden states


class _InputCaptured(Exception):
    """Ends a forward pass after an input has been captured."""


class BlockStream(SourceModel):
    """Blocks of a checkpoint in float32, one at a time.

    Attributes:
        device: where blocks run.
        max_rows: maximum number of rows per forward pass of a block; None for whole batches.
        clock: measures the phases "reading", "forwards" and "hessians".
    """

    def __init__(self, reader: CheckpointReader, device: torch.device, clock: PhaseClock | None = None) -> None:
        super().__init__(reader, device)
        self.clock = clock or PhaseClock()
        self.max_rows: int | None = None
        use_fused_modules(self.model)
        self._index = {block: index for index, block in enumerate(self.blocks.children())}
        self._arguments: dict[tuple[torch.device, torch.Size], list[BlockArguments]] = {}

    def load_block(self, index: int) -> nn.Module:
        """Block `index` on the device, in float32, with the source's weights.

        Raises:
            InputError: a tensor is missing, has a wrong shape, or holds NaN or infinity; it is named.
        """
        block = self.blocks.get_submodule(str(index))
        with self.clock("reading"):
            self.fill(f"{self.arch.blocks}.{index}", [f"{name}.weight" for name in self.arch.linears])
        return block

    def prefetch(self, index: int) -> None:
        """Start to read block `index` into the page cache, in a background thread."""
        names = [f"{self.arch.blocks}.{index}.{name}" for name, _ in
                 self.blocks.get_submodule(str(index)).named_parameters()] if index < self.count else []

        def read() -> None:
            for name in names:
                with suppress(InputError):  # raised again where the tensor is needed
                    self.reader.prefetch(name)

        threading.Thread(target=read, name="prefetch", daemon=True).start()

    def release(self, block: nn.Module) -> None:
        """Free a block's memory."""
        self.unload(block)

    @property
    def foldable_norms(self) -> tuple[str, ...]:
        """`Architecture.norms` of this model: none where residual connections start after the norm (a BLOOM option)."""
        residual = getattr(self.model.config, "apply_residual_connection_post_layernorm", False)
        return ("",) * len(self.arch.stages) if residual else self.arch.norms

    def batches(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Token ids (rows, T), split into batches of about `TOKENS_PER_BATCH` tokens."""
        return rows.split(max(1, TOKENS_PER_BATCH // rows.shape[1]))

    def embed(self, rows: Tensor) -> Iterator[Tensor]:
        """Run everything before the first block; only the embeddings of tokens that occur are in memory.

        Args:
            rows: (rows, T) int64 token ids without padding.
        Returns:
            The first block's inputs, one (batch, T, hidden_size) float32 tensor on the CPU per batch.
        """
        tokens, places = rows.unique(return_inverse=True)
        self.fill_embedding(tokens.tolist())
        for name in self.arch.modules_before[1:]:
            self.fill(name)
        for batch in self.batches(places):
            yield self._embed(batch)
        for name in self.arch.modules_before:
            self.unload(self.model.get_submodule(name))

    def linear_input(self, block: nn.Module, linear: str, states: Tensor) -> Tensor:
        """The input (rows, T, K) of a linear inside the block, for `states` (rows, T, hidden_size).

        The forward pass ends there.
        """
        captured: list[Tensor] = []

        def capture(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            captured.append(inputs[0])
            raise _InputCaptured

        with _removing(block.get_submodule(linear).register_forward_pre_hook(capture)), suppress(_InputCaptured):
            self._run(block, states)
        return captured[0].view(*states.shape[:2], -1)  # OPT's feed-forward joins rows and tokens

    def run(self, block: nn.Module, states: Tensor, piece_context: PieceContext = nullcontext) -> Tensor:
        """The block's output (batch, T, hidden_size) on the CPU, for `states` of the same shape.

        Args:
            piece_context: returns the context for each piece, see `AttentionOutputs.forward_pass`.
        """
        pieces = []
        for piece in states.split(self.max_rows or len(states)):
            with piece_context():
                pieces.append(self._run(block, piece).cpu())
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def block_arguments(self, shape: torch.Size) -> list[BlockArguments]:
        """The arguments of each block besides hidden states of shape (rows, T, hidden_size); `shape` is (rows, T)."""
        if (self.device, shape) not in self._arguments:
            list(self.embed(torch.zeros(shape, dtype=torch.int64)))
        return self._arguments[self.device, shape]

    @contextmanager
    def final_norm(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A context with the function between the last block and the head, for states of any shape."""
        for root in self.arch.modules_after:
            self.fill(root)
        modules = [self.model.get_submodule(root) for root in self.arch.modules_after]

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
                self.unload(module)

    def _embed(self, places: Tensor) -> Tensor:
        """The first block's input for one batch of places (batch, T) among the loaded embeddings.

        The other arguments of each block are recorded for `block_arguments`: they can differ, as those of blocks with
        and without a sliding window do. The blocks themselves do not run.
        """
        hidden: list[Tensor] = []
        found: list[BlockArguments] = []

        def capture(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
            states = args[0] if args else kwargs.pop("hidden_states")
            if not hidden:
                hidden.append(states.cpu())
            found.append((args[1:], kwargs))
            if len(found) == self.count:
                raise _InputCaptured
            return (states,) if self.arch.returns_tuple else states

        blocks: Any = self.blocks
        for block in blocks:
            block.forward = capture  # an instance attribute, which hides the method of its class
        try:
            with torch.no_grad(), suppress(_InputCaptured):
                self.model(input_ids=places.to(self.device), use_cache=False)
        finally:
            for block in blocks:
                del block.forward
        self._arguments[self.device, hidden[0].shape[:2]] = found
        return hidden[0]

    def forward(self, block: nn.Module, states: Tensor) -> Tensor:
        """The block's output (rows, T, hidden_size) on the device, for `states` of the same shape, with gradients."""
        args, kwargs = self.block_arguments(states.shape[:2])[self._index[block]]
        with self.clock("forwards"):
            output = block(states.to(self.device), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def _run(self, block: nn.Module, states: Tensor) -> Tensor:
        return self.forward(block, states)


@contextmanager
def _removing(handle: Any) -> Iterator[None]:
    """A context that removes a hook at its end."""
    try:
        yield
    finally:
        handle.remove()
