"""What can be refused before any time is lost: a source quantized already or not whole, sizes that nothing holds."""

import torch

from gptq_belle.checkpoint.quantization import WRONG_CONFIG
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.config import QuantConfig
from gptq_belle.errors import InputError, UsageError
from gptq_belle.models.registry import HEAD
from gptq_belle.quantization.stream import BlockStream


def check_source(reader: CheckpointReader) -> None:
    """Refuse a model that is quantized already.

    Raises:
        InputError: it is.
    """
    if "quantization_config" in reader.config or reader.packed:
        raise InputError(f"{reader.path} is quantized already", "Give the full-precision model.")


def check_complete(stream: BlockStream) -> None:
    """Refuse files that hold fewer or more blocks than config.json speaks of, or lack one of the model's tensors.

    From headers alone, so that no time is lost, and no block is left out in silence.

    Raises:
        InputError: they do; a tensor is named.
    """
    prefix, names = f"{stream.arch.blocks}.", stream.around()
    names += [f"{prefix}{index}.{name}" for index in range(stream.count)
              for name, _ in stream.blocks.get_submodule(str(index)).named_parameters()]
    if not stream.model.config.tie_word_embeddings:
        names.append(f"{HEAD}.weight")
    for name in names:
        stream.reader.shape(name)  # which says what it lacks
    for name in stream.reader:
        index = name.removeprefix(prefix).partition(".")[0]
        if name.startswith(prefix) and index.isdecimal() and int(index) >= stream.count:
            raise InputError(f"{stream.reader.path} holds {name}, where config.json speaks of {stream.count} blocks",
                             WRONG_CONFIG)


def check_sizes(stream: BlockStream, config: QuantConfig) -> None:
    """Refuse layers whose sizes the settings or the format cannot hold.

    Raises:
        UsageError: the group size does not divide a layer's inputs.
        InputError: a layer's sizes do not fill whole words.
    """
    shapes = [(f"{stream.arch.blocks}.{index}.{name}", shape) for index in range(stream.count)
              for name, shape in linear_shapes(stream).items()]
    for name, (outputs, inputs) in shapes:
        own = config.of(name)
        if own is not None and own.group_size != -1 and inputs % own.group_size:
            raise UsageError(f"group size {own.group_size} does not divide the {inputs} inputs of {name}",
                             "Choose 32, 64, 128 or -1 (one group for the whole row), such that it does.")
        if own is not None and (inputs % 32 or outputs % 32):
            raise InputError(f"{name} is {outputs} x {inputs}, and packing needs multiples of 32",
                             "Models of such sizes have no form in the GPTQ format.")


def widest(stream: BlockStream) -> tuple[int, str]:
    """Inputs and name of the linear with the most inputs."""
    return max((shape[1], name) for name, shape in linear_shapes(stream).items())


def linear_shapes(stream: BlockStream) -> dict[str, torch.Size]:
    """(N, K) of the linears of a block, by their path inside it."""
    block = stream.blocks.get_submodule("0")
    return {name: block.get_parameter(f"{name}.weight").shape for name in stream.arch.linears}
