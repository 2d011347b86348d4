"""Verify a job's output before it is published.

`load` validates a directory (`check_model`), reads its tokenizer, and turns one linear after the other into a kernel's
layout. Everything of it that depends on files is repeated here: the first two by the same functions, the tensors by
their values, with at most one linear's scales and zero points and four chunks of 16 MiB in memory. And a block that is
read back must give the output that it had when it was quantized.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gptq_belle.checkpoint.empty_model import assign
from gptq_belle.checkpoint.packed_reader import read_packed_linear, read_quantization
from gptq_belle.checkpoint.reader import CheckpointReader, read_json
from gptq_belle.checkpoint.tokenizer_files import load_tokenizer
from gptq_belle.checkpoint.validation import list_problems
from gptq_belle.errors import GptqBelleError
from gptq_belle.kernels.reference import dequantize
from gptq_belle.prompts.conversation import chat_format
from gptq_belle.quantization.block_stream import BlockStream

SAMPLE = "请介绍一下北京的历史。\n\nHuman: Hello,  world! 1+1=2 \N{GRINNING FACE}"
REPORT_IT = "The files were removed. Report this with the output of `gptq-belle inspect` for the source."
VERIFIED_BLOCK = 0
VERIFICATION_TOKENS = 64  # tokens that run through the block before and after writing
EXPECTED = "verification.expected"
LARGEST_DIFFERENCE = 1e-5  # relative to the output's largest value; on a CPU the same operations give 0


def check_metadata(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Read configuration and tokenizer of an output that has no weights yet.

    Args:
        directory: the written files.
        tokenizer: the source's.
    Raises:
        GptqBelleError: they cannot be read, or the tokenizer gives other ids than the source's.
    """
    config, written = read_json(directory / "config.json"), load_tokenizer(directory)
    prompt = chat_format(config, written).question(SAMPLE).text
    for text in (SAMPLE, prompt):
        if written(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise GptqBelleError("the tokenizer of the output would give other token ids than the model's own",
                                 REPORT_IT)


def check_output(directory: Path) -> None:
    """Validate a complete output.

    Raises:
        GptqBelleError: `load` or another command would refuse it.
    """
    reader = CheckpointReader(directory)
    for problem in list_problems(reader, read_quantization(reader)):
        raise GptqBelleError(f"the output would not load: {problem}", REPORT_IT)


def verification_tokens(rows: Tensor | None, vocabulary: int) -> Tensor:
    """Token ids (1, T) for the verification: the first calibration row, or the first ids of the vocabulary."""
    if rows is not None:
        return rows[:1, :VERIFICATION_TOKENS]
    return torch.arange(VERIFICATION_TOKENS).unsqueeze(0) % vocabulary


class BlockVerification:
    """Inputs of the verified block for a few tokens.

    Args:
        hidden: iterable with one tensor (rows, T, hidden_size).
    """

    def __init__(self, hidden: Iterable[Tensor]) -> None:
        (self.states,) = hidden

    def expected_output(self, stream: BlockStream, block: nn.Module) -> dict[str, Tensor]:
        """The output of the quantized block, for `compare`."""
        return {EXPECTED: stream.run(block, self.states)}

    def compare(self, directory: Path, stream: BlockStream, tensors: Mapping[str, Tensor]) -> float:
        """Read the block from the written files with the engine's reader, and run it on the same tokens.

        Args:
            tensors: result of `expected_output`.
        Returns:
            The largest difference, relative to the output's largest value.
        Raises:
            GptqBelleError: the difference is larger than rounding errors; the written files are not usable.
        """
        expected = tensors[EXPECTED]
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
                "The files were removed. Check disk and memory, and run the command again with --restart; if the error "
                "persists, report it.")
        return difference


def _read(reader: CheckpointReader, name: str, shape: torch.Size) -> Tensor:
    """A parameter of the written file in full precision; a packed weight as (N, K)."""
    if name in reader:
        return reader.tensor(name)
    words = read_packed_linear(reader, read_quantization(reader), name.removesuffix(".weight"), shape[1], shape[0])
    return dequantize(words).t().contiguous()
