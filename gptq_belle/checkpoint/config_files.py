"""Write the configuration files of a quantized model directory."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from gptq_belle.checkpoint.model_card import model_card
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.checkpoint.tokenizer_files import copy_tokenizer
from gptq_belle.checkpoint.writer import CheckpointWriter
from gptq_belle.models.decoder_config import token_ids


def write_metadata_files(writer: CheckpointWriter, source: CheckpointReader, quantization: dict[str, Any],
                         tokenizer: PreTrainedTokenizerBase, *, tied: bool) -> None:
    """Write all files of a quantized directory except weights and report: configuration, tokenizer and model card.

    Args:
        writer: the output directory.
        source: the full-precision model.
        quantization: the quantization_config.
        tokenizer: tokenizer of the source.
        tied: whether the lm_head is the embedding.
    """
    write_configuration(writer, source.config, quantization, tied=tied)
    copy_tokenizer(writer, source.path, tokenizer, source.config)
    writer.write_text("README.md", model_card(source, quantization, tied=tied))


def write_configuration(writer: CheckpointWriter, config: dict[str, Any], quantization: dict[str, Any], *,
                        tied: bool) -> None:
    """Write config.json with a quantization_config, and the latter as quantize_config.json."""
    writer.write_json("config.json", quantized_config(config, quantization, tied))
    writer.write_json("quantize_config.json", quantization)


def quantized_config(source: dict[str, Any], quantization: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Build the config.json of the quantized model, with the keys of both transformers 4 and 5."""
    result = {key: value for key, value in source.items() if key != "auto_map"}
    result |= {"dtype": "float16", "torch_dtype": "float16", "tie_word_embeddings": tied,
               "quantization_config": quantization}
    rope = source.get("rope_parameters")
    if isinstance(rope, dict):
        result.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        if rope.get("rope_type", "default") != "default":
            result.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    return result


def corrected_token_ids(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """Find special token ids of config.json (or generation_config.json) that contradict the tokenizer.

    Returns:
        The corrected ids by key; empty if there is no contradiction.
    Raises:
        InputError: an id is not an integer.
    """
    changed: dict[str, int | None] = {}
    for key in ("bos_token_id", "eos_token_id"):
        stated, known = token_ids(config, key), getattr(tokenizer, key)
        if stated and known is not None and known not in stated:
            changed[key] = known
    if any(token < 0 for token in token_ids(config, "pad_token_id")):
        changed["pad_token_id"] = tokenizer.pad_token_id
    return changed
