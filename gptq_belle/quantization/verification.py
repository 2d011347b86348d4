"""Trust, then verify: one block's output from the written file must be the one that the solver left behind."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gptq_belle.checkpoint.empty_model import assign
from gptq_belle.checkpoint.packed_reader import read_packed, read_quantization
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.errors import GptqBelleError
from gptq_belle.kernels.reference import dequantize
from gptq_belle.quantization.block_stream import BlockStream

VERIFIED_BLOCK = 0
EXPECTED = "verification.expected"
LARGEST_DIFFERENCE = 1e-5  # of the output's largest value; the same floats in the same order give 0 on a CPU


class BlockVerification:
    """A few tokens in front of the first block, and what they were behind it when that block was quantized."""

    def __init__(self, hidden: Iterable[Tensor]) -> None:
        (self.states,) = hidden

    def expected_output(self, stream: BlockStream, block: nn.Module) -> dict[str, Tensor]:
        """The output of the block as the solver left it, to be kept until `compare`."""
        return {EXPECTED: stream.run(block, self.states)}

    def compare(self, directory: Path, stream: BlockStream, kept: Mapping[str, Tensor]) -> float:
        """Read the block back, through the runtime's own reading of the words, and run the same tokens.

        Returns:
            The largest difference as a share of the output's largest value.
        Raises:
            GptqBelleError: it is larger than rounding explains; the written files are then not to be trusted.
        """
        expected = kept[EXPECTED]
        reader = CheckpointReader(directory)
        block = stream.blocks.get_submodule(str(VERIFIED_BLOCK))
        for name, parameter in list(block.named_parameters()):
            full_name = f"{stream.arch.blocks}.{VERIFIED_BLOCK}.{name}"
            assign(block, name, _read(reader, full_name, parameter.shape).to(stream.device, torch.float32))
        output = stream.run(block, self.states)
        stream.release(block)
        difference = float((output - expected).abs().max() / expected.abs().max())
        if not difference <= LARGEST_DIFFERENCE:
            raise GptqBelleError(
                f"block {VERIFIED_BLOCK} read back from the written file differs by {difference:.2e} of its output",
                "The files were removed. Check disk and memory, and run it with --restart; if it stays, report it.")
        return difference


def _read(reader: CheckpointReader, name: str, shape: torch.Size) -> Tensor:
    """A parameter of the written file in full precision; (N, K) where it is a packed weight."""
    if name in reader:
        return reader.tensor(name)
    words = read_packed(reader, read_quantization(reader), name.removesuffix(".weight"), shape[1], shape[0])
    return dequantize(words).t().contiguous()
