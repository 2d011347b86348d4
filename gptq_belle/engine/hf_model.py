"""Load a model directory as a transformers model; packed linears stay packed."""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from gptq_belle.checkpoint.config_files import read_generation_config
from gptq_belle.checkpoint.empty_model import assign, empty_model
from gptq_belle.checkpoint.hub import resolve_model_path
from gptq_belle.checkpoint.packed_reader import raw_quantization_config
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.checkpoint.validation import check_model
from gptq_belle.common.devices import choose_dtype, resolve_device, resolve_precision
from gptq_belle.engine.linear import QuantLinear
from gptq_belle.engine.weight_loader import WeightLoader
from gptq_belle.errors import InputError
from gptq_belle.formats.packed_lm_head import HEAD_CODES
from gptq_belle.kernels.dispatch import prepare_weight
from gptq_belle.models.architectures import LM_HEAD


def hf_model(path: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None,
             precision: str | None = None) -> PreTrainedModel:
    """Load a model directory for inference with transformers: quantized (GPTQ of any tool) or full precision.

    Weights are read one by one; a packed linear becomes a `QuantLinear` and is never dequantized in memory.

    Args:
        path: a Hugging Face directory, a hub id, or a name that `gptq-belle models` lists.
        device: "auto", "cpu" or "cuda:0".
        dtype: dtype of activations and unquantized weights. Default: float16 on CUDA with precision "fast", else
            float32.
        precision: "exact" or "fast". Default: exact on a CPU, fast on CUDA. On a CPU, packed linears use 16 (exact) or
            8 (fast) bits of each activation; on CUDA, the default dtype is float32 (exact) or float16 (fast).
    Raises:
        InputError: files are missing, damaged or inconsistent; the tensor or key is named.
        UsageError: unknown device or precision, or an unsupported dtype.
        HardwareError: this machine has no such device.
    """
    target = resolve_device(device)
    precision = resolve_precision(precision, target)
    dtype = choose_dtype(dtype, target, precision)
    reader = CheckpointReader(resolve_model_path(path))
    weights = WeightLoader(reader, target, dtype, precision)
    check_model(reader, weights.quantization)
    model = load_modules(weights)
    if (stated := raw_quantization_config(reader)) is not None:
        model.config.quantization_config = stated  # save_pretrained writes it
    model.generation_config = read_generation_config(reader.path) or GenerationConfig.from_model_config(model.config)
    return model


def load_modules(weights: WeightLoader) -> PreTrainedModel:
    """Build transformers' model of a checked directory, and load all its weights.

    Raises:
        InputError: the lm_head is packed, or a tensor is missing or damaged.
    """
    if HEAD_CODES in weights.reader:
        raise InputError(f"{weights.reader.path} has a packed lm_head, which transformers cannot load",
                         "Load it with gptq_belle.load, or quantize again without --packed-head-only.")
    model = empty_model(weights.reader.path)
    _replace_packed_linears(model, weights)
    _assign_parameters(model, weights)
    _check_complete(model, weights)
    model.config.dtype = weights.dtype
    model.config.use_cache = True
    return model.to(weights.device)  # type: ignore[arg-type]


def _replace_packed_linears(model: PreTrainedModel, weights: WeightLoader) -> None:
    """Replace every linear that is packed in the files by a `QuantLinear`: of the blocks, and the lm_head."""
    arch = weights.reader.arch
    for index, _ in model.get_submodule(arch.blocks).named_children():
        for linear in arch.linears:
            _replace_packed_linear(model, weights, f"{arch.blocks}.{index}.{linear}")
    if weights.reader.is_packed(LM_HEAD):
        model.config.tie_word_embeddings = False
        _replace_packed_linear(model, weights, LM_HEAD)


def _replace_packed_linear(model: PreTrainedModel, weights: WeightLoader, name: str) -> None:
    if not weights.reader.is_packed(name):
        return
    linear: Any = model.get_submodule(name)
    words = weights.packed_weight(name, linear.in_features, linear.out_features)
    prepared = prepare_weight(words, device=weights.device, dtype=weights.dtype, precision=weights.precision)
    weights.count_bytes(prepared)
    bias = weights.bias(name, linear.out_features, linear.bias is not None, narrow=True)
    model.set_submodule(name, QuantLinear(prepared, bias))


def _assign_parameters(model: PreTrainedModel, weights: WeightLoader) -> None:
    """Load all parameters. If config.json says that the lm_head is tied, but the files have another one, use theirs."""
    head, tied = f"{LM_HEAD}.weight", bool(model.config.tie_word_embeddings)
    embedding, parameters = model.get_input_embeddings(), dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        if name != head or not tied:
            assign(model, name, weights.tensor(name, *parameter.shape))
    if tied and head in weights.reader:
        stored = weights.tensor(head, *parameters[head].shape)
        if not torch.equal(stored, embedding.get_parameter("weight")):
            model.config.tie_word_embeddings = tied = False
            assign(model, head, stored)
    if tied:
        model.tie_weights()


def _check_complete(model: PreTrainedModel, weights: WeightLoader) -> None:
    """Raise InputError for parameters without a value."""
    state = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in state if tensor.is_meta]
    if empty:
        raise InputError(f"{weights.reader.path} has no value for {empty[0]}",
                         "A shard is missing, or the architecture is newer than this program.")
