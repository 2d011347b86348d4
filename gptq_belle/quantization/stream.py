"""The source model with one block in memory at a time: load a block, run it on the calibration rows, drop it."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from gptq_belle.checkpoint.packing import all_finite
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.errors import InputError
from gptq_belle.measure.phases import PhaseClock
from gptq_belle.models.quick import quicken
from gptq_belle.models.registry import HEAD
from gptq_belle.models.skeleton import assign, empty_model, wrong_shape
from gptq_belle.quantization.contexts import Turn

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TOKENS_A_BATCH = 4096


class _Stop(Exception):
    """Ends a forward pass as soon as what it was run for is known."""


class BlockStream:
    """Blocks of a checkpoint in float32, one at a time, and what the calibration rows are in front of them.

    What the written file will hold in float16 (everything but the quantized weights) is rounded to float16 here, so
    that calibration sees what the user's model computes.

    Attributes:
        count: number of blocks.
        device: where blocks run.
        most_rows: rows that go through a block at a time; None for whole batches.
        clock: told what time goes into: "reading", "forwards", "hessians".
    """

    def __init__(self, reader: CheckpointReader, device: torch.device, clock: PhaseClock | None = None) -> None:
        self.reader, self.arch, self.device = reader, reader.arch, device
        self.clock = clock or PhaseClock()
        self.most_rows: int | None = None
        self.model = empty_model(reader.path)
        quicken(self.model)
        self.blocks = self.model.get_submodule(self.arch.blocks)
        self.count = len(self.blocks)  # type: ignore[arg-type]
        self.embedding_shape = tuple(self.model.get_parameter(f"{self.arch.before[0]}.weight").shape)
        self._arguments: dict[tuple[torch.device, torch.Size], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        if len(set(getattr(self.model.config, "layer_types", None) or ["full_attention"])) > 1:
            raise InputError("this model mixes kinds of attention between its blocks",
                             "Only models whose blocks all attend alike can be quantized.")

    def block(self, index: int) -> nn.Module:
        """Block `index` on the device, in float32, with the source's weights.

        Raises:
            InputError: a tensor is missing, misshapen, or holds NaN or infinity; it is named.
        """
        block = self.blocks.get_submodule(str(index))
        with self.clock("reading"):
            self._fill(f"{self.arch.blocks}.{index}", [f"{name}.weight" for name in self.arch.linears])
        return block

    def read_ahead(self, index: int) -> None:
        """Begin to bring block `index` from the disk into the system's cache, while something else goes on."""
        names = [f"{self.arch.blocks}.{index}.{name}" for name, _ in
                 self.blocks.get_submodule(str(index)).named_parameters()] if index < self.count else []

        def read() -> None:
            for name in names:
                with suppress(InputError):  # whoever needs the tensor says what is wrong with it
                    self.reader.read_ahead(name)

        threading.Thread(target=read, name="read-ahead", daemon=True).start()

    def drop(self, block: nn.Module) -> None:
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
        self._fill_embedding(tokens.tolist())
        for name in self.arch.before[1:]:
            self._fill(name)
        for batch in self.batches(places):
            yield self._embed(batch)
        for name in self.arch.before:
            self.model.get_submodule(name).to("meta")

    def reach(self, block: nn.Module, linear: str, states: Tensor) -> Tensor:
        """The input (rows, T, K) of a linear inside the block, on `states` (rows, T, hidden_size); what would come
        behind it is left out."""
        found: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0])
            raise _Stop

        with _hooked([block.get_submodule(linear).register_forward_pre_hook(keep)]), suppress(_Stop):
            self._run(block, states)
        return found[0]

    def run(self, block: nn.Module, states: Tensor, turn: Turn = nullcontext) -> Tensor:
        """The block's output (batch, T, hidden_size) on the CPU, on `states` of the same shape.

        Args:
            block, states: as they are.
            turn: what each piece runs in, see `Contexts.during`.
        """
        pieces = []
        for piece in states.split(self.most_rows or len(states)):
            with turn():
                pieces.append(self._run(block, piece).cpu())
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def rest(self) -> list[str]:
        """Names of what goes into the file unquantized beside the blocks: embeddings, norms, the head where it is one
        of its own. Old files hold a tied head too: it is written once."""
        names = [f"{root}.{name}" for root in (*self.arch.before, *self.arch.after)
                 for name, _ in self.model.get_submodule(root).named_parameters()]
        return names if self.tied() else [*names, f"{HEAD}.weight"]

    def tied(self) -> bool:
        """Whether the head is the embedding; where the configuration says so and the file does not, believe the file.
        """
        head, embedding = f"{HEAD}.weight", f"{self.arch.before[0]}.weight"
        if not self.model.config.tie_word_embeddings or head not in self.reader:
            return bool(self.model.config.tie_word_embeddings)
        return self.reader.shape(head) == self.reader.shape(embedding) and all(
            torch.equal(ours, theirs) for ours, theirs in
            zip(self.reader.chunks(head), self.reader.chunks(embedding), strict=True))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that config.json gives a tensor.

        Raises:
            InputError: the file's is another one.
        """
        embedding = name == f"{self.arch.before[0]}.weight"
        shape = self.embedding_shape if embedding else tuple(self.model.get_parameter(name).shape)
        if self.reader.shape(name) != shape:
            raise wrong_shape(name, self.reader.shape(name), shape)
        return shape

    @property
    def context(self) -> int | None:
        """Tokens that the model's positions allow; None for ALiBi, which knows no limit."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def float16(self, name: str, tensor: Tensor) -> Tensor:
        """All or a part of the source's tensor `name` as the file will hold it.

        Raises:
            InputError: it holds NaN or infinity, or values beyond float16.
        """
        rounded = self.finite(name, tensor).to(torch.float16)
        if not all_finite(rounded):
            raise InputError(f"tensor {name} holds values up to {float(tensor.abs().max()):.3g}, more than 65504",
                             "The standard format holds float16 only; this model cannot be written in it.")
        return rounded

    def finite(self, name: str, tensor: Tensor) -> Tensor:
        """All or a part of the source's tensor `name` as it is.

        Raises:
            InputError: it holds NaN or infinity, or no floating point numbers.
        """
        if tensor.dtype not in FLOATS:
            raise InputError(f"tensor {name} is {tensor.dtype}, not floating point", "Give the full-precision model.")
        if not all_finite(tensor):
            raise InputError(f"tensor {name} holds NaN or infinity", "The source is damaged: fetch it again.")
        return tensor

    def _fill(self, root: str, as_they_are: Sequence[str] = ()) -> None:
        module = self.model.get_submodule(root)
        for name, _ in list(module.named_parameters()):
            full_name = f"{root}.{name}"
            rounded = self.finite if name in as_they_are else self.float16
            tensor = rounded(full_name, self.reader.tensor(full_name))
            assign(module, name, tensor.to(self.device, torch.float32))

    def _fill_embedding(self, tokens: Sequence[int]) -> None:
        """The embeddings of these tokens, in this order, in the place of all."""
        name = f"{self.arch.before[0]}.weight"
        embedding: Any = self.model.get_submodule(self.arch.before[0])
        self.shape(name)
        rows = self.float16(name, self.reader.rows(name, tokens)).to(self.device, torch.float32)
        embedding.weight = nn.Parameter(rows, requires_grad=False)
        embedding.padding_idx = None  # a matter of gradients only, and checked against the rows that are there

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
        with _hooked([hook]), torch.inference_mode(), suppress(_Stop):
            self.model(input_ids=places.to(self.device), use_cache=False)
        return hidden[0]

    @torch.inference_mode()
    def _run(self, block: nn.Module, states: Tensor) -> Tensor:
        shape = states.shape[:2]
        if (self.device, shape) not in self._arguments:  # they follow from the shape alone
            list(self.embed(torch.zeros(shape, dtype=torch.int64)))
        args, kwargs = self._arguments[self.device, shape]
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
