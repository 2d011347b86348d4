"""An empty transformers model: modules without weights, on the meta device."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gptq_belle.errors import InputError, one_line
from gptq_belle.models.dimensions import LARGEST

DROPOUTS = ("attention_dropout", "hidden_dropout")


def empty_model(path: Path) -> PreTrainedModel:
    """Build the causal model of a config.json without memory for weights; computed buffers (RoPE) have values.

    Nothing is downloaded, and no code of the model directory is run.

    Raises:
        InputError: transformers cannot build a model from config.json.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # otherwise transformers looks for a quantizer
        config.use_cache = False
        config._attn_implementation = None  # a file can name code on the hub here; use the default
        for name in DROPOUTS:
            setattr(config, name, 0.0)  # only for training; a value outside 0..1 would fail in a forward pass
        _check_sizes(config)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # the code of a model raises anything for values of a wrong type
        raise InputError(f"no model can be built from {path / 'config.json'}: {one_line(error)}",
                         "Correct the value, or install a newer version of transformers.") from error
    _rebuild_computed_buffers(model, config)
    return model.eval().requires_grad_(False)


def _check_sizes(config: Any) -> None:
    """Check sizes before modules and tables of these sizes are allocated.

    Raises:
        ValueError: a size is not an integer within bounds.
    """
    for name, most in LARGEST.items():
        value = getattr(config, name, None)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ValueError(f"{name} {str(value)[:40]} is not a whole number from 1 to {most}")


def assign(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the parameter or buffer `name` (dotted, from `root`) by a tensor.

    Raises:
        InputError: the shapes differ.
    """
    owner, _, leaf = name.rpartition(".")
    module = root.get_submodule(owner)
    present = getattr(module, leaf)
    if present.shape != tensor.shape:
        raise wrong_shape(name, tuple(tensor.shape), tuple(present.shape))
    if isinstance(present, nn.Parameter):
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(module, leaf, tensor)


def wrong_shape(name: str, found: tuple[int, ...], needed: tuple[int, ...]) -> InputError:
    """Build the error for a tensor whose shape differs from config.json."""
    return InputError(f"tensor {name} has shape {found}, config.json needs {needed}",
                      "config.json belongs to another model, or the file is damaged: fetch the directory again.")


def _rebuild_computed_buffers(model: PreTrainedModel, config: Any) -> None:
    """Compute RoPE's inverse frequencies, which modules compute on creation: on meta they have no values."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, type(module)(config))
