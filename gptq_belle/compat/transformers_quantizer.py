"""transformers' own `from_pretrained` on our kernels: a quantizer of its kind, in the place of its method "gptq".

On disk the method stays "gptq". transformers reads the words into `Words` modules, which become `QuantLinear` when all
are there. No other method is touched, and a model that transformers is to quantize itself still goes the usual way.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
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
from gptq_belle.models.architectures import ARCHITECTURES

METHOD = "gptq"
METHODS: dict[str, Any] = AUTO_QUANTIZER_MAPPING  # transformers calls what it finds there


def patch_transformers() -> Callable[[], None]:
    """Make `from_pretrained` of transformers run GPTQ directories of the supported architectures on our kernels.

    Neither optimum nor gptqmodel is needed then; GPTQ directories of other architectures are refused until it is
    undone. On a CPU say ``dtype=torch.float32``: transformers keeps the file's float16 otherwise. Calling this twice is
    the same as calling it once.

    Returns:
        a function that undoes it; models that were loaded stay as they are.
    """
    original = METHODS[METHOD]
    if isinstance(original, _Choice):
        return original.undo
    choice = _Choice(original)
    METHODS[METHOD] = choice
    return choice.undo


class _Choice:
    """Stands where transformers keeps the class: ours for packed directories, its own for what it quantizes itself."""

    def __init__(self, original: Callable[..., HfQuantizer]) -> None:
        self.original = original

    def __call__(self, config: Any, **kwargs: Any) -> HfQuantizer:
        return (PackedQuantizer if kwargs.get("pre_quantized", True) else self.original)(config, **kwargs)

    def undo(self) -> None:
        """Put the original back, where this stands."""
        if METHODS[METHOD] is self:
            METHODS[METHOD] = self.original


class PackedQuantizer(HfQuantizer):
    """What transformers asks while it loads a packed directory."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Put `Words` in the place of every linear that the files hold packed (all still on meta)."""
        files = kwargs.get("checkpoint_files") or []
        if not files:
            raise InputError("transformers names no files to load packed weights from", "Load a model directory.")
        if model.config.model_type not in ARCHITECTURES:
            raise InputError(f"gptq_belle has no kernels for the architecture {model.config.model_type!r}",
                             "Call the function that patch_transformers returned, and load it with optimum.")
        reader = CheckpointReader(Path(files[0]).parent)
        found = read_quantization(reader)
        if found is None:
            raise InputError(f"{reader.path} states no quantization", WRONG_CONFIG)
        self.stated = raw_quantization_config(reader) or {}
        self.checkpoint_format = found.checkpoint_format
        for name, module in list(model.named_modules()):
            stored = name if f"{name}.qweight" in reader else f"{reader.arch.prefix}.{name}"
            if isinstance(module, nn.Linear) and f"{stored}.qweight" in reader:
                own = check_packed_linear(reader, found, stored, module.in_features, module.out_features)
                model.set_submodule(name, Words(reader, stored, module, own))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Make a `QuantLinear` of every `Words`, where its tensors are."""
        for name, module in list(model.named_modules()):
            if isinstance(module, Words):
                model.set_submodule(name, module.prepared(name, model.dtype))
        # transformers takes `checkpoint_format` where the two differ, others `format`; and it drops `dynamic`.
        self.quantization_config.format = self.checkpoint_format  # type: ignore[attr-defined]
        if "dynamic" in self.stated:
            self.quantization_config.dynamic = self.stated["dynamic"]  # type: ignore[attr-defined]

    def is_serializable(self) -> bool:
        """The state dict is what stands on disk."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top."""
        return True


class Words(nn.Module):
    """The tensors of one packed linear under their names on disk, on meta until transformers has read them.

    Args:
        reader: the directory.
        name: of the linear, on disk.
        linear: what stood in its place.
        quantization: what the directory says about it.
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

    def prepared(self, name: str, dtype: torch.dtype) -> QuantLinear:
        """The layer, laid out for the kernels of the device where the words are.

        Raises:
            InputError: tensors that do not fit together.
        """
        tensors = {part: tensor for part, tensor in self._buffers.items() if tensor is not None}
        bias, device = tensors.pop("bias", None), tensors["qweight"].device
        words = canonical_weight(tensors, self.quantization, self.in_features, name)
        precision = resolve_precision(None, device)
        return QuantLinear(prepare_weight(words, device=device, dtype=dtype, precision=precision), bias)
