"""From a model directory to a transformers model on a device; packed linears stay packed all the way."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from gptq_belle.checkpoint.empty_model import assign, empty_model
from gptq_belle.checkpoint.hub import model_directory
from gptq_belle.checkpoint.packed_reader import check_geometry, read_quantization, stated_quantization
from gptq_belle.checkpoint.reader import CheckpointReader, read_json
from gptq_belle.common.devices import choose_dtype, resolve_device, resolve_precision
from gptq_belle.engine.linear import QuantLinear
from gptq_belle.errors import InputError
from gptq_belle.formats.packed_head import CODES
from gptq_belle.formats.quantize_config import WRONG_CONFIG, Quantization
from gptq_belle.kernels.dispatch import prepare
from gptq_belle.models.architectures import COMPUTED, HEAD


def hf_model(path: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None,
             precision: str | None = None) -> PreTrainedModel:
    """Load a model directory, quantized (standard GPTQ, of any producer) or not, for inference with transformers.

    Weights are read one by one; a packed linear becomes a `QuantLinear` and is never expanded in memory.

    Args:
        path: a Hugging Face directory, a hub id, or a name that `gptq-belle models` lists.
        device: "auto", "cpu" or "cuda:0".
        dtype: of activations and unquantized weights; left out, float32 on a CPU, and on CUDA what precision asks.
        precision: "exact" or "fast"; left out, exact on a CPU and fast on CUDA. On a CPU, packed linears take 16 or 8
            bits of each activation; on CUDA, dtype is float32 or float16.
    Raises:
        InputError: files that are missing, damaged, or do not fit together; the tensor or the key is named.
        UsageError, HardwareError: see `resolve_device`; a dtype that models do not run in; an unknown precision.
    """
    target = resolve_device(device)
    precision = resolve_precision(precision, target)
    dtype = choose_dtype(dtype, target, precision)
    reader = CheckpointReader(model_directory(path))
    if CODES in reader:
        raise InputError(f"{reader.path} holds its head packed, for which transformers has no place",
                         "Load it with gptq_belle.load, or quantize again without --packed-head-only.")
    model = empty_model(reader.path)
    _Filling(reader, model, target, dtype, precision).run()
    model.config.dtype = dtype
    model.config.use_cache = True
    if (stated := stated_quantization(reader)) is not None:
        model.config.quantization_config = stated  # so that save_pretrained writes a directory that can be read
    model.generation_config = _generation_config(reader, model)
    return model.to(target)  # type: ignore[arg-type]


class _Filling:
    """One pass over an empty model; remembers which tensors of the checkpoint were used."""

    def __init__(self, reader: CheckpointReader, model: PreTrainedModel, device: torch.device,
                 dtype: torch.dtype, precision: str) -> None:
        self.reader, self.model, self.device, self.dtype, self.precision = reader, model, device, dtype, precision
        self.used: set[str] = set()

    def run(self) -> None:
        quantization = read_quantization(self.reader)
        for name in self._packed_linears():
            if quantization is None:
                raise InputError(f"{self.reader.path} holds packed weights, but no configuration says how",
                                 "Add the quantize_config.json that belongs to it.")
            own = quantization.of(name)
            if own is None:
                raise InputError(f"{self.reader.path}: dynamic leaves {name} unquantized, but it is packed",
                                 WRONG_CONFIG)
            self._place_linear(name, own)
        for name, _ in list(self.model.named_parameters()):
            if name != f"{HEAD}.weight" or not self._tied():
                self._place(name)
        self._place_head()
        self._check_nothing_left()

    def _packed_linears(self) -> Iterator[str]:
        blocks = self.model.get_submodule(self.reader.arch.blocks)
        for index, _ in blocks.named_children():
            for linear in self.reader.arch.linears:
                if self.reader.is_packed(f"{self.reader.arch.blocks}.{index}.{linear}"):
                    yield f"{self.reader.arch.blocks}.{index}.{linear}"

    def _place_linear(self, name: str, quantization: Quantization) -> None:
        linear = self.model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        check_geometry(self.reader, name, quantization, linear.in_features, linear.out_features)
        g_idx = self._read(f"{name}.g_idx") if f"{name}.g_idx" in self.reader else None
        if g_idx is None and quantization.group_size != -1:
            g_idx = torch.arange(linear.in_features) // quantization.group_size
        words = [self._read(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")]
        # Some writers store a bias of zeros where the model has none.
        bias = self._read(f"{name}.bias") if f"{name}.bias" in self.reader or linear.bias is not None else None
        try:
            prepared = prepare(words[0], words[1], words[2], g_idx, quantization.bits, quantization.zero_offset,
                               device=self.device, dtype=self.dtype, precision=self.precision)
        except ValueError as error:
            raise InputError(f"{self.reader.path}: {name}: {error}",
                             "The file is damaged, or was not written in the GPTQ format.") from error
        if bias is not None:
            _same_shape(f"{name}.bias", bias, (linear.out_features,))
            bias = bias.to(self.device, copy=True)
        self.model.set_submodule(name, QuantLinear(prepared, bias))

    def _place(self, name: str) -> None:
        tensor = self._read(name)
        if not tensor.is_floating_point():
            raise InputError(f"{self.reader.path}: tensor {name} is {tensor.dtype}, not floating point",
                             "Only GPTQ's packed linears and plain floating point weights can be read.")
        assign(self.model, name, tensor.to(self.device, self.dtype, copy=True))

    def _tied(self) -> bool:
        return bool(self.model.config.tie_word_embeddings)

    def _place_head(self) -> None:
        """Tie the head; where the file holds another one although the configuration says tied, believe the file."""
        head = f"{HEAD}.weight"
        if self._tied() and head in self.reader:
            embedding = self.model.get_input_embeddings().get_parameter("weight")
            if not torch.equal(self._read(head).to(embedding), embedding):
                self.model.config.tie_word_embeddings = False
                self._place(head)
        if self._tied():
            self.model.tie_weights()

    def _check_nothing_left(self) -> None:
        extra = [name for name in self.reader if name not in self.used and not name.endswith(COMPUTED)]
        if extra:
            raise InputError(f"{self.reader.path} holds {len(extra)} tensors that the model has no place for, "
                             f"such as {extra[0]}", "config.json belongs to another model, or the kind is unsupported.")
        state = [*self.model.named_parameters(), *self.model.named_buffers()]
        empty = [name for name, tensor in state if tensor.is_meta]
        if empty:
            raise InputError(f"{self.reader.path} gives no value for {empty[0]}",
                             "A shard is missing, or the architecture is newer than this program.")

    def _read(self, name: str) -> Tensor:
        self.used.add(name)
        return self.reader.tensor(name)


def _same_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError(f"tensor {name} has shape {tuple(tensor.shape)}, config.json needs {shape}", WRONG_CONFIG)


def _generation_config(reader: CheckpointReader, model: PreTrainedModel) -> GenerationConfig:
    path = reader.path / "generation_config.json"
    if path.is_file():
        try:
            return GenerationConfig.from_dict(read_json(path))
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path} is not understood: {str(error).splitlines()[0][:200]}", WRONG_CONFIG) from error
    return GenerationConfig.from_model_config(model.config)
