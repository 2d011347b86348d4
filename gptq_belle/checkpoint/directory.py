"""The small files of a model directory: configuration, tokenizer, chat template, model card."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gptq_belle.checkpoint.card import model_card
from gptq_belle.checkpoint.reader import CheckpointReader, read_json
from gptq_belle.checkpoint.writer import CheckpointWriter
from gptq_belle.config import QuantConfig
from gptq_belle.errors import InputError
from gptq_belle.runtime.chat import chat_template, detect_style

TOKENIZER_CONFIG = "tokenizer_config.json"
AS_THEY_ARE = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json",
               "added_tokens.json", "generation_config.json", "chat_template.jinja")


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; nothing is downloaded, no code that comes with it is run.

    Raises:
        InputError: there is none, it is damaged, or it knows no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # for damaged files the tokenizers library raises bare Exceptions, or panics
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} holds no tokenizer that can be loaded: {reason}",
                         "Copy tokenizer.json and tokenizer_config.json of the model into the folder.") from error
    if tokenizer.eos_token is None:
        raise InputError(f"{path}: the tokenizer has no end-of-sequence token",
                         f"Name eos_token in {TOKENIZER_CONFIG}.")
    return tokenizer


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
    writer.write_text("README.md", model_card(source, config))


def write_configuration(writer: CheckpointWriter, config: dict[str, Any], quantization: dict[str, Any], *,
                        tied: bool) -> None:
    """config.json of a model and its quantization_config, which is quantize_config.json too."""
    writer.write_json("config.json", quantized_config(config, quantization, tied))
    writer.write_json("quantize_config.json", quantization)


def copy_tokenizer(writer: CheckpointWriter, folder: Path, tokenizer: PreTrainedTokenizerBase,
                   config: dict[str, Any]) -> None:
    """The files of a tokenizer and of generation from `folder`, with a chat template for the model that `config` is."""
    for name in AS_THEY_ARE:
        if (folder / name).is_file():
            (writer.files / name).write_bytes(_own_file(folder / name).read_bytes())
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
    config = read_json(path) if path.is_file() else {}
    if config.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name before transformers 5, still understood
    if "chat_template" not in config and not (folder / "chat_template.jinja").is_file():
        adds_bos = bool(tokenizer("")["input_ids"])  # templates are tokenized without what it adds by itself
        config["chat_template"] = chat_template(detect_style(model), bos=adds_bos)
    return {key: value for key, value in config.items() if key != "auto_map"}
