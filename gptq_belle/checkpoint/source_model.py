"""The model that is quantized or converted: an empty model that is filled, part by part, from a checkpoint.

Tensors that the output stores in float16 are rounded on reading, so that calibration sees the values of the output.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptq_belle.checkpoint.empty_model import assign, empty_model, wrong_shape
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.errors import InputError
from gptq_belle.formats.gptq_weight import all_finite
from gptq_belle.models.architectures import LM_HEAD
from gptq_belle.models.decoder_config import read_decoder_config
from gptq_belle.models.dimensions import dimensions

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class SourceModel:
    """A checkpoint and the empty model of its config.json, parts of which are filled while they are needed.

    Args:
        device: device of the filled parameters.
    Attributes:
        linear_shapes: (K, N) of the linears of a block, by their path inside it.
    """

    def __init__(self, reader: CheckpointReader, device: torch.device) -> None:
        self.reader, self.arch, self.device = reader, reader.arch, device
        self.model = empty_model(reader.path)
        self.blocks = self.model.get_submodule(self.arch.blocks)
        self.count = len(self.blocks)  # type: ignore[arg-type]
        self.linear_shapes = dimensions(reader.config).arch.shapes
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        self.embedding_shape = tuple(self.model.get_parameter(f"{self.arch.modules_before[0]}.weight").shape)

    def embeddings_and_norms(self) -> list[str]:
        """Names of the tensors before and after the blocks, except the lm_head: embeddings and norms."""
        return [f"{root}.{name}" for root in (*self.arch.modules_before, *self.arch.modules_after)
                for name, _ in self.model.get_submodule(root).named_parameters()]

    def tensors_outside_blocks(self) -> list[str]:
        """Names of the tensors outside the blocks, without a packed lm_head, or a tied one that the files contain."""
        separate = [f"{LM_HEAD}.weight"] if not self.tied() and not self.reader.is_packed(LM_HEAD) else []
        bias = [name for name in self.arch.outer if name == f"{LM_HEAD}.bias"]
        return [*self.embeddings_and_norms(), *separate, *bias]

    def tied(self) -> bool:
        """Whether the lm_head is the embedding: config.json says so, and the files do not have another lm_head."""
        if self.reader.is_packed(LM_HEAD):
            return False
        head, embedding = f"{LM_HEAD}.weight", f"{self.arch.modules_before[0]}.weight"
        if not self.model.config.tie_word_embeddings or head not in self.reader:
            return bool(self.model.config.tie_word_embeddings)
        return self.reader.shape(head) == self.reader.shape(embedding) and all(
            torch.equal(ours, theirs) for ours, theirs in
            zip(self.reader.chunks(head), self.reader.chunks(embedding), strict=True))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor according to config.json.

        Raises:
            InputError: the tensor in the file has another shape.
        """
        embedding = name == f"{self.arch.modules_before[0]}.weight"
        shape = self.embedding_shape if embedding else tuple(self.model.get_parameter(name).shape)
        if self.reader.shape(name) != shape:
            raise wrong_shape(name, self.reader.shape(name), shape)
        return shape

    @property
    def context(self) -> int | None:
        """Limit on the number of tokens that the configuration states; None if it states none."""
        return read_decoder_config(self.reader.config).context

    def float16(self, name: str, tensor: Tensor) -> Tensor:
        """Check and round values of the tensor `name` to float16, as in the output.

        Raises:
            InputError: see `finite`; a value exceeds the range of float16.
        """
        rounded = self.finite(name, tensor).to(torch.float16)
        if not all_finite(rounded):
            raise InputError(f"tensor {name} has values up to {float(tensor.abs().max()):.3g}, more than 65504",
                             "The standard format stores float16 only; this model cannot be written in it.")
        return rounded

    def finite(self, name: str, tensor: Tensor) -> Tensor:
        """Check values of the tensor `name` and return them unchanged.

        Raises:
            InputError: the tensor is not floating point, or contains NaN or infinity.
        """
        if tensor.dtype not in FLOATS:
            raise InputError(f"tensor {name} is {tensor.dtype}, not floating point", "Give the full-precision model.")
        if not all_finite(tensor):
            raise InputError(f"tensor {name} contains NaN or infinity", "The source is damaged: fetch it again.")
        return tensor

    def head(self) -> Iterator[Tensor]:
        """Read the lm_head, some rows (tokens of the vocabulary) at a time, on the device in float32.

        The bias, the scaling and the soft-capping that some architectures apply to logits are left out: this weighs
        the losses of linears against each other only.
        """
        name = f"{self.arch.modules_before[0]}.weight" if self.tied() else f"{LM_HEAD}.weight"
        for chunk in self.reader.chunks(name):
            yield self.float16(name, chunk).to(self.device, torch.float32)

    def fill(self, root: str, unrounded: Sequence[str] = ()) -> None:
        """Fill the parameters of a module, all rounded to float16 except those in `unrounded`."""
        module = self.model.get_submodule(root)
        for name, _ in list(module.named_parameters()):
            full_name = f"{root}.{name}"
            rounded = self.finite if name in unrounded else self.float16
            tensor = rounded(full_name, self.reader.tensor(full_name))
            assign(module, name, tensor.to(self.device, torch.float32))

    @staticmethod
    def unload(module: nn.Module) -> None:
        """Free the memory of a module's parameters; its computed buffers stay."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def fill_embedding(self, tokens: Sequence[int]) -> None:
        """Fill the embedding with the rows of these tokens only, in this order."""
        name = f"{self.arch.modules_before[0]}.weight"
        embedding: Any = self.model.get_submodule(self.arch.modules_before[0])
        self.shape(name)
        rows = self.float16(name, self.reader.rows(name, tokens)).to(self.device, torch.float32)
        embedding.weight = nn.Parameter(rows, requires_grad=False)
        embedding.padding_idx = None  # affects gradients only, and must be below the number of rows
