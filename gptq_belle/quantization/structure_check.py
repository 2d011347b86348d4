"""Check what discovery found on the first block: its linears are replaced by products with the inputs of their stages.

A wrong stage, a linear that runs in another order, or an attention that does not end with its output projection gives
another output, and the architecture is refused before any work.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptq_belle.errors import InputError, one_line
from gptq_belle.models.architectures import Architecture
from gptq_belle.quantization.attention_outputs import AttentionOutputs
from gptq_belle.quantization.block_stream import BlockStream

TOKENS = 16  # of the input of the block
LARGEST_ERROR = 1e-4  # relative; float32 sums in another order differ by 1e-6


def check_structure(stream: BlockStream) -> None:
    """Compare the first block's outputs with those that the discovered structure gives.

    Raises:
        InputError: they differ, or a tensor of the block is missing or damaged.
    """
    device, stream.device = stream.device, torch.device("cpu")  # a full GPU says nothing about the structure
    vocabulary = int(stream.model.config.vocab_size)
    try:
        states = next(iter(stream.embed((torch.arange(TOKENS) % vocabulary)[None])))
        block = stream.load_block(0)
        expected = stream.run(block, states)
        try:
            error = _structure_error(stream, block, states, expected)
            difference = "" if error < LARGEST_ERROR else f"outputs differ by {error:.1e} of their norm"
        except (TypeError, RuntimeError, KeyError, IndexError) as failure:  # a module got what it does not expect
            difference = one_line(failure)
        stream.release(block)
    finally:
        stream.device = device
    if difference:
        raise InputError(f"{stream.reader.config['model_type']} is not supported: its blocks do not have the structure "
                         f"that was found in them ({difference})", "Report the architecture with its config.json.")


def _structure_error(stream: BlockStream, block: nn.Module, states: Tensor, expected: Tensor) -> float:
    """Largest difference of outputs that the discovered structure gives, relative to the norm of `expected`."""
    arch, recorded = stream.arch, AttentionOutputs()
    with _products_of_stages(block, arch):
        found = [stream.run(block, states)]
    for _ in range(2):  # the first pass records the attention, the second one replays it
        with recorded.forward_pass(block, arch) as piece_context:
            found.append(stream.run(block, states, piece_context))
    found.append(stream.run(block, states[:, : TOKENS // 2]))  # attention is causal: no later token changes these
    return max(float((output - expected[:, : output.shape[1]]).norm() / expected.norm()) for output in found)


@contextmanager
def _products_of_stages(block: nn.Module, arch: Architecture) -> Iterator[None]:
    """A context in which each linear multiplies the input of the first linear of its stage."""
    inputs: dict[int, Tensor] = {}

    def product(linear: Any, stage: int, is_first: bool) -> Any:
        def forward(x: Tensor) -> Tensor:
            if is_first:
                inputs[stage] = x
            return F.linear(inputs[stage], linear.weight, linear.bias)
        return forward

    linears = {name: (stage, name == names[0]) for stage, names in enumerate(arch.stages) for name in names}
    try:
        for name, place in linears.items():
            linear: Any = block.get_submodule(name)
            linear.forward = product(linear, *place)  # an instance attribute, which hides the method of its class
        yield
    finally:
        for name in linears:
            vars(block.get_submodule(name)).pop("forward", None)
