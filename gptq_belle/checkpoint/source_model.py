"""The source's tensors as calibration sees them: what the written file will hold in float16 is rounded already."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptq_belle.checkpoint.empty_model import assign, empty_model, wrong_shape
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.errors import InputError
from gptq_belle.formats.gptq_weight import all_finite
from gptq_belle.models.architectures import LM_HEAD
from gptq_belle.models.dimensions import dimensions, linear_shapes

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class SourceModel:
    """A checkpoint beside its model's empty skeleton, parts of which are filled while they are needed.

    Args:
        reader: the checkpoint.
        device: where parameters go.
    Attributes:
        blocks: the list of decoder blocks.
        count: number of blocks.
        linear_shapes: (K, N) of the linears of a block, by their path inside it.
    Raises:
        InputError: blocks of more than one kind of attention.
    """

    def __init__(self, reader: CheckpointReader, device: torch.device) -> None:
        self.reader, self.arch, self.device = reader, reader.arch, device
        self.model = empty_model(reader.path)
        self.blocks = self.model.get_submodule(self.arch.blocks)
        self.count = len(self.blocks)  # type: ignore[arg-type]
        self.linear_shapes = linear_shapes(dimensions(reader.config))
        if len(set(getattr(self.model.config, "layer_types", None) or ["full_attention"])) > 1:
            raise InputError("this model mixes kinds of attention between its blocks",
                             "Only models whose blocks all use the same attention can be quantized or converted.")
        self.embedding_shape = tuple(self.model.get_parameter(f"{self.arch.modules_before[0]}.weight").shape)

    def embeddings_and_norms(self) -> list[str]:
        """Names of what stands before and behind the blocks, but the head: embeddings and norms."""
        return [f"{root}.{name}" for root in (*self.arch.modules_before, *self.arch.modules_after)
                for name, _ in self.model.get_submodule(root).named_parameters()]

    def tensors_outside_blocks(self) -> list[str]:
        """Names of the tensors outside of the blocks, which are written unquantized; without a head that is tied.

        Old files hold a tied head too: it is written once.
        """
        return self.embeddings_and_norms() if self.tied() else [*self.embeddings_and_norms(), f"{LM_HEAD}.weight"]

    def tied(self) -> bool:
        """Whether the head is the embedding; where the configuration says so and the file does not, believe the file.
        """
        head, embedding = f"{LM_HEAD}.weight", f"{self.arch.modules_before[0]}.weight"
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
        embedding = name == f"{self.arch.modules_before[0]}.weight"
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

    def head(self) -> Iterator[Tensor]:
        """The head's matrix, some rows (tokens of the vocabulary) at a time, on the device in float32."""
        name = f"{self.arch.modules_before[0]}.weight" if self.tied() else f"{LM_HEAD}.weight"
        for chunk in self.reader.chunks(name):
            yield self.float16(name, chunk).to(self.device, torch.float32)

    def fill(self, root: str, unrounded: Sequence[str] = ()) -> None:
        """Read the parameters of a module of the skeleton, those that stay `unrounded` without rounding."""
        module = self.model.get_submodule(root)
        for name, _ in list(module.named_parameters()):
            full_name = f"{root}.{name}"
            rounded = self.finite if name in unrounded else self.float16
            tensor = rounded(full_name, self.reader.tensor(full_name))
            assign(module, name, tensor.to(self.device, torch.float32))

    def fill_embedding(self, tokens: Sequence[int]) -> None:
        """The embeddings of these tokens, in this order, in the place of all."""
        name = f"{self.arch.modules_before[0]}.weight"
        embedding: Any = self.model.get_submodule(self.arch.modules_before[0])
        self.shape(name)
        rows = self.float16(name, self.reader.rows(name, tokens)).to(self.device, torch.float32)
        embedding.weight = nn.Parameter(rows, requires_grad=False)
        embedding.padding_idx = None  # a matter of gradients only, and checked against the rows that are there
