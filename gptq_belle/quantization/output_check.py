"""Check that a job's own output loads, as a user's `load` would, before it is published.

`load` validates the directory (`check_model`), reads its tokenizer, and turns one linear after the other into a
kernel's layout. Everything of it that depends on files is repeated here: the first two by the same functions, the
tensors by their values. At most one linear's scales and zero points and four chunks of 16 MiB are in memory.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from gptq_belle.checkpoint.packed_reader import read_quantization
from gptq_belle.checkpoint.reader import CheckpointReader, read_json
from gptq_belle.checkpoint.tokenizer_files import load_tokenizer
from gptq_belle.checkpoint.validation import list_problems
from gptq_belle.errors import GptqBelleError
from gptq_belle.prompts.conversation import chat_format

SAMPLE = "请介绍一下北京的历史。\n\nHuman: Hello,  world! 1+1=2 \N{GRINNING FACE}"
REPORT_IT = "The files were removed. Report this with the output of `gptq-belle inspect` for the source."


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
