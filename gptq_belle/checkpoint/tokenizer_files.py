"""Tokenizer and chat template of a model directory: loading, copying, and which prompts they stand for."""

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
NO_TOKENIZER = ("Copy tokenizer.json and tokenizer_config.json of the model into the folder; convert takes them from "
                "--base DIR, too.")
LLAMA_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True,
                "add_eos_token": False}
COPIED_FILES = (TOKENIZER, SENTENCEPIECE, "vocab.json", "merges.txt", "special_tokens_map.json",
               "added_tokens.json", GENERATION, TEMPLATE)
QUESTION = "你好"


@dataclass(frozen=True, slots=True)
class Prompt:
    """How a question is asked.

    Attributes:
        style: the key of `prompts.styles.STYLES` that `generate` takes.
        text: a question as the model gets it, special tokens shown.
        stops: strings that end an answer.
        chat_template: the directory's own, for other programs; None where it has none.
        templated: the same question through that template; None where there is none.
    """

    style: str
    text: str
    stops: tuple[str, ...]
    chat_template: str | None
    templated: str | None

    @property
    def agrees(self) -> bool:
        """Whether other programs ask as `generate` does."""
        return self.templated is None or self.templated == self.text


def read_prompt_format(path: str | Path) -> Prompt:
    """Look at a directory's prompts.

    Raises:
        InputError: no configuration or tokenizer, an unknown style, a template that cannot be rendered.
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
        except Exception as error:  # a template is a program of whoever wrote it, run by jinja in a sandbox
            raise InputError(f"{path}: the chat template cannot be rendered: {str(error)[:200]}",
                             "Choose another: gptq-belle convert SRC OUT --prompt-style bloom.") from error
    text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    return Prompt(name, text, style.stops, template, templated)


def lines(found: Prompt) -> list[tuple[str, str]]:
    """(name, value) pairs for reading."""
    rows = [("prompt style", found.style), ("a question", repr(found.text)), ("ends an answer", repr(found.stops[-1]))]
    if found.chat_template is None:
        return [*rows, ("chat template", "none")]
    if not found.agrees:
        rows.append(("its template gives", repr(found.templated)))
    return [*rows, ("chat template", found.chat_template)]


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; nothing is downloaded, no code that comes with it is run.

    Raises:
        InputError: there is none, it is damaged, or it knows no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True,
                                                  **_unnamed_tokens(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # for damaged files the tokenizers library raises bare Exceptions, or panics
        files = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
        for file in files:
            reject_lfs_pointer(file)
        if not files:
            raise InputError(f"{path} holds no tokenizer", NO_TOKENIZER) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} holds no tokenizer that can be loaded: {reason}",
                         NO_TOKENIZER) from error
    if tokenizer.eos_token is None:
        raise InputError(f"{path}: the tokenizer has no end-of-sequence token",
                         f"Name eos_token in {TOKENIZER_CONFIG}.")
    return tokenizer


def _unnamed_tokens(folder: Path) -> dict[str, Any]:
    """LLaMA's special tokens, where the configuration calls them "", as conversions of early 2023 did.

    BELLE-LLaMA's do; on such a directory transformers 5 ends in a RecursionError.
    """
    path = folder / TOKENIZER_CONFIG
    stated = read_json(path) if path.is_file() else {}
    empty = any(stated.get(key) == "" for key in LLAMA_TOKENS)
    return LLAMA_TOKENS if empty and (folder / SENTENCEPIECE).is_file() else {}


def copy_tokenizer(writer: CheckpointWriter, folder: Path, tokenizer: PreTrainedTokenizerBase,
                   config: dict[str, Any]) -> None:
    """The files of a tokenizer and of generation from `folder`, with a chat template for the model that `config` is.

    A template that lies there stays, unless config.json's ``prompt_style`` chooses one of ours.
    """
    for file in copied_files(folder):
        if file.name == GENERATION:
            writer.write_json(GENERATION, repaired_generation_config(read_json(file), file))
        elif not (file.name == TEMPLATE and "prompt_style" in config):
            (writer.files / file.name).write_bytes(file.read_bytes())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not (folder / TOKENIZER).is_file() and backend is not None:
        writer.write_text(TOKENIZER, backend.to_str())  # so that no reader needs sentencepiece
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
    config = (read_json(path) if path.is_file() else {}) | _unnamed_tokens(folder)
    if config.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name before transformers 5, still understood
    present = "chat_template" in config or (folder / TEMPLATE).is_file()
    if "prompt_style" in model or not present:
        adds_bos = bool(tokenizer("")["input_ids"])  # templates are tokenized without what it adds by itself
        config["chat_template"] = chat_template(detect_style(model), bos=adds_bos)
    return {key: value for key, value in config.items() if key != "auto_map"}
