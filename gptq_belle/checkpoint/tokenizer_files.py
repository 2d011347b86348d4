"""Load and copy the tokenizer and chat template of a model directory, and show the prompt format they imply."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gptq_belle.checkpoint.generation_config import GENERATION, repaired_generation_config
from gptq_belle.checkpoint.reader import CheckpointReader, read_json
from gptq_belle.checkpoint.writer import CheckpointWriter
from gptq_belle.common.files import reject_lfs_pointer
from gptq_belle.errors import InputError
from gptq_belle.prompts.styles import Turn, chat_template, detect_style, get_style, render_conversation

TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
TOKENIZER, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
TOKENIZER_FILES = (TOKENIZER, SENTENCEPIECE, "vocab.json", TOKENIZER_CONFIG)
NO_TOKENIZER = ("Copy tokenizer.json and tokenizer_config.json of the model into the folder; convert also takes "
                "their folder as --base DIR.")
LLAMA_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True,
                "add_eos_token": False}
COPIED_FILES = (TOKENIZER, SENTENCEPIECE, "vocab.json", "merges.txt", "special_tokens_map.json",
               "added_tokens.json", GENERATION, TEMPLATE)
QUESTION = "你好"


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """Prompt format of a model directory.

    Attributes:
        style: a key of `prompts.styles.STYLES`, used by `generate`.
        text: the prompt of an example question, including special tokens.
        stops: strings that end an answer.
        chat_template: chat template of the directory, for other programs; None if it has none.
        templated: the example question rendered by that template; None if there is none.
    """

    style: str
    text: str
    stops: tuple[str, ...]
    chat_template: str | None
    templated: str | None

    @property
    def agrees(self) -> bool:
        """Whether the chat template gives the same prompt as `generate`."""
        return self.templated is None or self.templated == self.text


def read_prompt_format(path: str | Path) -> PromptFormat:
    """Read the prompt format of a model directory.

    Raises:
        InputError: config.json or tokenizer is missing, the style is unknown, or the template cannot be rendered.
    """
    reader = CheckpointReader(path)
    tokenizer = load_tokenizer(reader.path)
    template = getattr(tokenizer, "chat_template", None)
    name = detect_style(reader.config, template)
    style = get_style(name)
    asked = render_conversation([Turn(QUESTION)], name, tokenizer.eos_token)
    ids = tokenizer(asked, add_special_tokens=style.special_tokens)["input_ids"]
    templated = None
    if template:
        try:
            templated = str(tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False,
                                                          add_generation_prompt=True))
        except Exception as error:  # a template is a program, which jinja runs in a sandbox
            raise InputError(f"{path}: the chat template cannot be rendered: {str(error)[:200]}",
                             "Choose another: gptq-belle convert SRC OUT --prompt-style bloom.") from error
    text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    return PromptFormat(name, text, style.stops, template, templated)


def summary_rows(found: PromptFormat) -> list[tuple[str, str]]:
    """Format a prompt format as (name, value) pairs."""
    rows = [("prompt style", found.style), ("prompt", repr(found.text)), ("stop string", repr(found.stops[-1]))]
    if found.chat_template is None:
        return [*rows, ("chat template", "none")]
    if not found.agrees:
        rows.append(("prompt of the template", repr(found.templated)))
    return [*rows, ("chat template", found.chat_template)]


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory; nothing is downloaded, and no code of the directory is run.

    Raises:
        InputError: the tokenizer is missing or damaged, or has no eos token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True,
                                                  **_missing_special_tokens(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # for damaged files the tokenizers library raises bare Exceptions, or panics
        files = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
        for file in files:
            reject_lfs_pointer(file)
        if not files:
            raise InputError(f"{path} contains no tokenizer", NO_TOKENIZER) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"the tokenizer of {path} cannot be loaded: {reason}",
                         NO_TOKENIZER) from error
    if tokenizer.eos_token is None:
        raise InputError(f"{path}: the tokenizer has no eos token",
                         f"State eos_token in {TOKENIZER_CONFIG}.")
    return tokenizer


def _missing_special_tokens(folder: Path) -> dict[str, Any]:
    """LLaMA's special tokens if tokenizer_config.json has empty strings for them, else nothing.

    Conversions of early 2023, such as BELLE-LLaMA, have empty strings, which cause a RecursionError in transformers 5.
    """
    path = folder / TOKENIZER_CONFIG
    stated = read_json(path) if path.is_file() else {}
    empty = any(stated.get(key) == "" for key in LLAMA_TOKENS)
    return LLAMA_TOKENS if empty and (folder / SENTENCEPIECE).is_file() else {}


def copy_tokenizer(writer: CheckpointWriter, folder: Path, tokenizer: PreTrainedTokenizerBase,
                   config: dict[str, Any]) -> None:
    """Copy the files of the tokenizer and generation_config.json from `folder`, and add a chat template.

    An existing template is kept unless the ``prompt_style`` of `config` selects another one.
    """
    for file in copied_files(folder):
        if file.name == GENERATION:
            writer.write_json(GENERATION, repaired_generation_config(read_json(file), file))
        elif not (file.name == TEMPLATE and "prompt_style" in config):
            (writer.files / file.name).write_bytes(file.read_bytes())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not (folder / TOKENIZER).is_file() and backend is not None:
        writer.write_text(TOKENIZER, backend.to_str())  # readers then do not need sentencepiece
    writer.write_json(TOKENIZER_CONFIG, _tokenizer_config(folder, tokenizer, config))


def copied_files(folder: Path) -> list[Path]:
    """The files of a model directory that `copy_tokenizer` copies to the output.

    Raises:
        InputError: one is a link to a file of another name outside of the folder and of the hub's cache. Its content
            might not be meant for publication.
    """
    place = folder.resolve()
    cache = [place.parent.parent / "blobs"] if place.parent.name == "snapshots" else []
    found = [folder / name for name in COPIED_FILES if (folder / name).is_file()]
    for file in found:
        target = file.resolve()
        if target.name != file.name and not any(target.is_relative_to(own) for own in (place, *cache)):
            raise InputError(f"{file} links to {target}", "Put the file itself into the folder.")
    return found


def _tokenizer_config(folder: Path, tokenizer: PreTrainedTokenizerBase, model: dict[str, Any]) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG
    config = (read_json(path) if path.is_file() else {}) | _missing_special_tokens(folder)
    if config.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name in transformers 4; 5 accepts it, too
    present = "chat_template" in config or (folder / TEMPLATE).is_file()
    if "prompt_style" in model or not present:
        adds_bos = bool(tokenizer("")["input_ids"])  # the result of a template is tokenized without special tokens
        config["chat_template"] = chat_template(detect_style(model), bos=adds_bos)
    return {key: value for key, value in config.items() if key != "auto_map"}
