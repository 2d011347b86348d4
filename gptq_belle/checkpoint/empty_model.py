"""An empty transformers model: modules without weights, on the meta device."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq_belle.checkpoint.reader import read_json
from gptq_belle.errors import InputError, one_line
from gptq_belle.models.discovery import meta_model, model_class


def empty_model(path: Path) -> PreTrainedModel:
    """Build the causal model of a config.json without memory for weights; computed buffers (RoPE) have values.

    Nothing is downloaded, and no code of the model directory is run.

    Raises:
        InputError: transformers cannot build a model from config.json.
    """
    config = read_json(path / "config.json")
    model_class(config)
    try:
        model = meta_model(config)
        _compute_buffers(model)
    except Exception as error:  # the code of a model raises anything for values of a wrong type
        raise InputError(f"no model can be built from {path / 'config.json'}: {one_line(error)}",
                         "Correct the value, or install a newer version of transformers.") from error
    return model


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


def _compute_buffers(model: PreTrainedModel) -> None:
    """Compute buffers such as RoPE's inverse frequencies, which have no values on meta, as transformers does it when it
    loads a model: by `_init_weights`, which leaves parameters on meta without values."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if any(buffer is not None for buffer in module._buffers.values()):
            model._init_weights(module)
