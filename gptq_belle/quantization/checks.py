"""What can be refused before any time is lost: sources quantized already, sizes that no word or group holds."""

import torch

from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.config import QuantConfig
from gptq_belle.errors import InputError, UsageError
from gptq_belle.quantization.stream import BlockStream


def check_source(reader: CheckpointReader) -> None:
    """Refuse a model that is quantized already.

    Raises:
        InputError: it is.
    """
    if "quantization_config" in reader.config or reader.packed:
        raise InputError(f"{reader.path} is quantized already", "Give the full-precision model.")


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
