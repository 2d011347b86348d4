"""The small files of a model directory: configuration, tokenizer, chat template, model card."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gptq_belle.checkpoint.card import model_card
from gptq_belle.checkpoint.reader import CheckpointReader, read_json
from gptq_belle.checkpoint.unready import check_fetched
from gptq_belle.checkpoint.writer import CheckpointWriter
from gptq_belle.config import QuantConfig
from gptq_belle.errors import InputError
from gptq_belle.runtime.chat import chat_template, detect_style

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
TOKENIZER, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
TOKENIZER_FILES = (TOKENIZER, SENTENCEPIECE, "vocab.json", TOKENIZER_CONFIG)
NO_TOKENIZER = ("Copy tokenizer.json and tokenizer_config.json of the model into the folder; convert takes them from "
                "--base DIR, too.")
LLAMA_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True,
                "add_eos_token": False}
AS_THEY_ARE = (TOKENIZER, SENTENCEPIECE, "vocab.json", "merges.txt", "special_tokens_map.json",
               "added_tokens.json", GENERATION, TEMPLATE)


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
            check_fetched(file)
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


def write_small_files(writer: CheckpointWriter, source: CheckpointReader, config: QuantConfig,
                      tokenizer: PreTrainedTokenizerBase, *, tied: bool) -> None:
    """Everything of a quantized directory but weights and report.

    Args:
        writer: the directory in the making.
        source: the model that was quantized.
        config: how.
        tokenizer: the source's.
        tied: whether the head shares the embedding, so that the file holds it once.
    """
    write_configuration(writer, source.config, config.to_dict(), tied=tied)
    copy_tokenizer(writer, source.path, tokenizer, source.config)
    writer.write_text("README.md", model_card(source, config, tied=tied))


def write_configuration(writer: CheckpointWriter, config: dict[str, Any], quantization: dict[str, Any], *,
                        tied: bool) -> None:
    """config.json of a model and its quantization_config, which is quantize_config.json too."""
    writer.write_json("config.json", quantized_config(config, quantization, tied))
    writer.write_json("quantize_config.json", quantization)


def copy_tokenizer(writer: CheckpointWriter, folder: Path, tokenizer: PreTrainedTokenizerBase,
                   config: dict[str, Any]) -> None:
    """The files of a tokenizer and of generation from `folder`, with a chat template for the model that `config` is.

    A template that lies there stays, unless config.json's ``prompt_style`` chooses one of ours.
    """
    for name in AS_THEY_ARE:
        if (folder / name).is_file() and not (name == TEMPLATE and "prompt_style" in config):
            (writer.files / name).write_bytes(_own_file(folder / name).read_bytes())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not (folder / TOKENIZER).is_file() and backend is not None:
        writer.write_text(TOKENIZER, backend.to_str())  # so that no reader needs sentencepiece
    writer.write_json(TOKENIZER_CONFIG, _tokenizer_config(folder, tokenizer, config))


def _own_file(path: Path) -> Path:
    """A file that may be copied: of the folder itself, or of the hub's cache that the folder belongs to.

    Raises:
        InputError: a link that leads elsewhere; what it leads to might not be meant for others.
    """
    folder, target = path.parent.resolve(), path.resolve()
    cache = [folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else []
    if not any(target.is_relative_to(place) for place in (folder, *cache)):
        raise InputError(f"{path} leads out of its folder", "Put the file itself there.")
    return path


def quantized_config(source: dict[str, Any], quantization: dict[str, Any], tied: bool) -> dict[str, Any]:
    """config.json of the quantized model, in words that readers of 2024 and of transformers 5 both understand."""
    result = {key: value for key, value in source.items() if key != "auto_map"}
    result |= {"dtype": "float16", "torch_dtype": "float16", "tie_word_embeddings": tied,
               "quantization_config": quantization}
    rope = source.get("rope_parameters")
    if isinstance(rope, dict):
        result.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        if rope.get("rope_type", "default") != "default":
            result.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    return result


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
