"""The source model with one block in memory at a time: load a block, run it on the calibration rows, drop it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from gptq_belle.checkpoint.packing import all_finite
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.errors import InputError
from gptq_belle.models.registry import HEAD
from gptq_belle.models.skeleton import assign, empty_model
from gptq_belle.quantization.hessian import HessianSum

TOKENS_A_BATCH = 4096
ATTENTION_SCORES_A_BATCH = 1 << 27  # eager attention holds batch * heads * T * T float32 values: 512 MiB


class _Stop(Exception):
    """Ends a forward pass as soon as what it was run for is known."""


class BlockStream:
    """Blocks of a checkpoint in float32, one at a time, and the calibration activations between them.

    What the written file will hold in float16 (everything but the quantized weights) is rounded to float16 here, so
    that calibration sees what the user's model computes.

    Attributes:
        count: number of blocks.
        hidden: the activations in front of the next block, one (batch, T, hidden_size) float32 tensor a batch.
    """

    def __init__(self, reader: CheckpointReader, device: torch.device) -> None:
        self.reader, self.arch, self.device = reader, reader.arch, device
        self.model = empty_model(reader.path)
        self.blocks = self.model.get_submodule(self.arch.blocks)
        self.count = len(self.blocks)  # type: ignore[arg-type]
        self.hidden: list[Tensor] = []
        self._arguments: dict[torch.Size, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        if len(set(getattr(self.model.config, "layer_types", None) or ["full_attention"])) > 1:
            raise InputError("this model mixes kinds of attention between its blocks",
                             "Only models whose blocks all attend alike can be quantized.")

    def block(self, index: int) -> nn.Module:
        """Block `index` on the device, in float32, with the source's weights.

        Raises:
            InputError: a tensor is missing, misshapen, or holds NaN or infinity; it is named.
        """
        block = self.blocks.get_submodule(str(index))
        self._fill(f"{self.arch.blocks}.{index}", [f"{name}.weight" for name in self.arch.linears])
        return block

    def drop(self, block: nn.Module) -> None:
        """Give a block's memory back."""
        block.to("meta")

    @contextmanager
    def embeddings(self) -> Iterator[None]:
        """What comes before the first block is in memory inside of this context, and gone behind it."""
        for name in self.arch.before:
            self._fill(name)
        yield
        for name in self.arch.before:
            self.model.get_submodule(name).to("meta")

    def embed(self, rows: Tensor) -> list[Tensor]:
        """Run everything that comes before the first block, inside of `embeddings`.

        Args:
            rows: (rows, T) int64 token ids without padding.
        Returns:
            The first block's inputs, one (batch, T, hidden_size) float32 tensor on the CPU a batch.
        """
        hidden: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs.pop("hidden_states")
            hidden.append(states.cpu())
            self._arguments[states.shape[:2]] = args[1:], kwargs
            raise _Stop

        first = self.blocks.get_submodule("0")
        with _hooked([first.register_forward_pre_hook(keep, with_kwargs=True)]), torch.inference_mode():
            for batch in rows.split(self._rows_a_batch(rows.shape[1])):
                with suppress(_Stop):
                    self.model(input_ids=batch.to(self.device), use_cache=False)
        return hidden

    def hessian(self, block: nn.Module, stage: Sequence[str], advance: Callable[[], None]) -> Tensor:
        """The Hessian (K, K) float32 of the inputs that the linears of one stage share.

        Args:
            block: the block in front of which `hidden` stands.
            stage: names of linears inside the block that see the same input.
            advance: called once a batch, for progress.
        """
        linear = block.get_submodule(stage[0])
        total = HessianSum(block.get_parameter(f"{stage[0]}.weight").shape[1], self.device)

        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            total.add(inputs[0])
            raise _Stop

        with _hooked([linear.register_forward_pre_hook(add)]):
            for states in self.hidden:
                with suppress(_Stop):
                    self.run(block, states)
                advance()
        return total.value

    def propagate(self, block: nn.Module, advance: Callable[[], None]) -> None:
        """Move `hidden` behind the block."""
        for i, states in enumerate(self.hidden):
            self.hidden[i] = self.run(block, states).cpu()
            advance()

    @torch.inference_mode()
    def run(self, block: nn.Module, states: Tensor) -> Tensor:
        """The block's output (batch, T, hidden_size) on `states` of the same shape."""
        args, kwargs = self._arguments[states.shape[:2]]
        output = block(states.to(self.device), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def rest(self) -> Iterator[tuple[str, Tensor]]:
        """Embeddings, final norm, and the head where it is its own: what goes into the file unquantized."""
        for root in (*self.arch.before, *self.arch.after):
            for name, _ in self.model.get_submodule(root).named_parameters():
                yield f"{root}.{name}", self.float16(f"{root}.{name}")

    def own_head(self) -> dict[str, Tensor]:
        """The head's weight where it is not the embedding's. Old files hold a tied head too: it is written once."""
        name, embedding = f"{HEAD}.weight", f"{self.arch.before[0]}.weight"
        tied = self.model.config.tie_word_embeddings
        if tied and (name not in self.reader or torch.equal(self.reader.tensor(name), self.reader.tensor(embedding))):
            return {}
        return {name: self.float16(name)}

    @property
    def context(self) -> int | None:
        """Tokens that the model's positions allow; None for ALiBi, which knows no limit."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def float16(self, name: str) -> Tensor:
        """A source tensor as the file will hold it.

        Raises:
            InputError: it holds NaN or infinity, or values beyond float16.
        """
        tensor = self.finite(name)
        rounded = tensor.to(torch.float16)
        if not all_finite(rounded):
            raise InputError(f"tensor {name} holds values up to {float(tensor.abs().max()):.3g}, more than 65504",
                             "The standard format holds float16 only; this model cannot be written in it.")
        return rounded

    def finite(self, name: str) -> Tensor:
        """A source tensor as it is.

        Raises:
            InputError: it holds NaN or infinity.
        """
        tensor = self.reader.tensor(name)
        if not all_finite(tensor):
            raise InputError(f"tensor {name} holds NaN or infinity", "The source is damaged: fetch it again.")
        return tensor

    def _fill(self, root: str, as_they_are: Sequence[str] = ()) -> None:
        module = self.model.get_submodule(root)
        for name, _ in list(module.named_parameters()):
            read = self.finite if name in as_they_are else self.float16
            assign(module, name, read(f"{root}.{name}").to(self.device, torch.float32))

    def _rows_a_batch(self, length: int) -> int:
        heads = self.model.config.num_attention_heads
        return max(1, min(TOKENS_A_BATCH // length, ATTENTION_SCORES_A_BATCH // (heads * length * length)))


@contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
