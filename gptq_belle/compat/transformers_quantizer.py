"""Quantizer for transformers that replaces its method "gptq", so that `from_pretrained` uses gptq_belle's kernels.

transformers reads the packed tensors into `PackedTensors` modules, which are replaced by `QuantLinear` after loading.
Other methods, and models that transformers itself is asked to quantize, are not affected.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPTQConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from gptq_belle.checkpoint.packed_reader import (
    PARTS,
    canonical_weight,
    check_packed_linear,
    raw_quantization_config,
    read_quantization,
)
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.common.devices import resolve_precision
from gptq_belle.engine.linear import QuantLinear
from gptq_belle.errors import InputError
from gptq_belle.formats.quantize_config import WRONG_CONFIG, Quantization
from gptq_belle.kernels.dispatch import prepare_weight

METHOD = "gptq"
METHODS: dict[str, Any] = AUTO_QUANTIZER_MAPPING  # transformers looks up its quantizers here
CONFIGS: dict[str, Any] = AUTO_QUANTIZATION_CONFIG_MAPPING  # and the classes of their settings here


def patch_transformers() -> Callable[[], None]:
    """Make `from_pretrained` of transformers run GPTQ directories of the supported architectures on our kernels.

    Neither optimum nor gptqmodel is needed then; GPTQ directories of other architectures are refused until the patch is
    undone. On a CPU pass ``dtype=torch.float32``, because transformers keeps the file's float16 otherwise. A second
    call has no effect.

    Returns:
        A function that undoes the patch; loaded models are not affected by it.
    """
    original = METHODS[METHOD]
    if isinstance(original, _QuantizerFactory):
        return original.undo
    factory = _QuantizerFactory(original)
    METHODS[METHOD], CONFIGS[METHOD] = factory, PackedConfig
    return factory.undo


class _QuantizerFactory:
    """Replacement for transformers' class: `PackedQuantizer` for packed directories, the original otherwise."""

    def __init__(self, original: Callable[..., HfQuantizer]) -> None:
        self.original, self.original_config = original, CONFIGS[METHOD]

    def __call__(self, config: Any, **kwargs: Any) -> HfQuantizer:
        return (PackedQuantizer if kwargs.get("pre_quantized", True) else self.original)(config, **kwargs)

    def undo(self) -> None:
        """Restore the original."""
        if METHODS[METHOD] is self:
            METHODS[METHOD], CONFIGS[METHOD] = self.original, self.original_config


class PackedConfig(GPTQConfig):
    """transformers' settings of GPTQ; ``modules_in_block_to_quantize`` does not require optimum, which is not used."""

    def post_init(self) -> None:
        """Check the settings."""
        modules, self.modules_in_block_to_quantize = self.modules_in_block_to_quantize, None
        super().post_init()
        self.modules_in_block_to_quantize = modules


class PackedQuantizer(HfQuantizer):
    """Callbacks of transformers while it loads a packed directory."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Replace every linear that is packed in the files by a `PackedTensors` on meta."""
        files = kwargs.get("checkpoint_files") or []
        if not files:
            raise InputError("transformers gave no files to load packed weights from", "Load a model directory.")
        reader = CheckpointReader(Path(files[0]).parent)
        try:
            prefix = reader.arch.prefix
        except InputError as error:
            raise InputError(error.cause, "Call the function that patch_transformers returned, and load it with "
                             "optimum.") from error
        quantization = read_quantization(reader)
        if quantization is None:
            raise InputError(f"{reader.path} has no quantization settings", WRONG_CONFIG)
        self.settings = raw_quantization_config(reader) or {}
        self.checkpoint_format = quantization.checkpoint_format
        for name, module in list(model.named_modules()):
            stored = name if f"{name}.qweight" in reader else f"{prefix}.{name}"
            if isinstance(module, nn.Linear) and f"{stored}.qweight" in reader:
                own = check_packed_linear(reader, quantization, stored, module.in_features, module.out_features)
                model.set_submodule(name, PackedTensors(reader, stored, module, own))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Replace every `PackedTensors` by a `QuantLinear` on the device of its tensors."""
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedTensors):
                model.set_submodule(name, module.to_quant_linear(name, model.dtype))
        # transformers reads `checkpoint_format`, other programs read `format`; and transformers drops `dynamic`.
        self.quantization_config.format = self.checkpoint_format  # type: ignore[attr-defined]
        if "dynamic" in self.settings:
            self.quantization_config.dynamic = self.settings["dynamic"]  # type: ignore[attr-defined]

    def is_serializable(self) -> bool:
        """The state dict has the tensors of the file."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top."""
        return True


class PackedTensors(nn.Module):
    """The tensors of one packed linear under their names in the file, on meta until transformers has read them.

    Args:
        name: name of the linear in the file.
        linear: the module to replace.
    """

    def __init__(self, reader: CheckpointReader, name: str, linear: nn.Linear, quantization: Quantization) -> None:
        super().__init__()
        self.in_features, self.quantization = linear.in_features, quantization
        for part in PARTS:
            if f"{name}.{part}" in reader:
                self.register_buffer(part, torch.empty(
                    reader.shape(f"{name}.{part}"), dtype=reader.dtype(f"{name}.{part}"), device="meta"))
        if linear.bias is not None and f"{name}.bias" not in reader:
            raise InputError(f"{reader.path} lacks the tensor {name}.bias", WRONG_CONFIG)

    def to_quant_linear(self, name: str, dtype: torch.dtype) -> QuantLinear:
        """The layer in the layout of the kernels for the device of the tensors.

        Raises:
            InputError: the tensors do not fit together.
        """
        tensors = {part: tensor for part, tensor in self._buffers.items() if tensor is not None}
        bias, device = tensors.pop("bias", None), tensors["qweight"].device
        words = canonical_weight(tensors, self.quantization, self.in_features, name)
        precision = resolve_precision(None, device)
        return QuantLinear(prepare_weight(words, device=device, dtype=dtype, precision=precision), bias)
