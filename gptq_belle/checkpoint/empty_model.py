"""An empty transformers model: its modules in place, its weights on the meta device until something needs them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gptq_belle.errors import InputError
from gptq_belle.models.dimensions import LARGEST

DROPOUTS = ("attention_dropout", "hidden_dropout")


def empty_model(path: Path) -> PreTrainedModel:
    """The causal model that config.json describes, without memory for weights; computed buffers (RoPE's) are real.

    Nothing is downloaded, and no code that comes with a model is run.

    Raises:
        InputError: config.json describes no model that transformers can build.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the words are ours to read; transformers must not look for a quantizer
        config.use_cache = False
        config._attn_implementation = None  # a file may name code on the hub there; the model's usual one is taken
        for name in DROPOUTS:
            setattr(config, name, 0.0)  # a matter of training; one out of 0..1 would fail in the middle of a forward
        _check_sizes(config)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever a model's own code trips over when a figure is of the wrong type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path / 'config.json'} describes no model that can be built: {reason}",
                         "The configuration is damaged or of a newer kind than transformers knows.") from error
    _rebuild_computed_buffers(model, config)
    return model.eval().requires_grad_(False)


def _check_sizes(config: Any) -> None:
    """Refuse figures that no model of these architectures has, before modules and tables are made of them.

    Raises:
        ValueError: one is no whole number within bounds.
    """
    for name, most in LARGEST.items():
        value = getattr(config, name, None)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ValueError(f"{name} {str(value)[:40]} is not a whole number from 1 to {most}")


def assign(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the parameter or buffer `name` (dotted, from `root`).

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
    """The error for a tensor of another shape than the configuration's."""
    return InputError(f"tensor {name} has shape {found}, config.json needs {needed}",
                      "config.json belongs to another model, or the file is damaged: fetch the directory again.")


def _rebuild_computed_buffers(model: PreTrainedModel, config: Any) -> None:
    """RoPE's inverse frequencies are computed when the module is made, not read; on meta they would stay empty."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, type(module)(config))
