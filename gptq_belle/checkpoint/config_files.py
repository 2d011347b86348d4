"""The configuration files of a model directory: config.json and quantize_config.json are written, and
generation_config.json is read, checked, and repaired where transformers refuses to save it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from gptq_belle.checkpoint.reader import read_json
from gptq_belle.checkpoint.writer import CheckpointWriter
from gptq_belle.errors import InputError, one_line
from gptq_belle.models.decoder_config import token_ids

GENERATION = "generation_config.json"
NUMBERS = {  # lowest and highest values with which transformers generates; 0 disables top_k and, greedy, temperature
    "temperature": (0, math.inf), "top_k": (0, math.inf), "top_p": (0, 1), "min_p": (0, 1), "typical_p": (0, 1),
    "repetition_penalty": (1e-9, math.inf), "max_length": (1, math.inf), "max_new_tokens": (1, math.inf),
    "min_length": (0, math.inf), "min_new_tokens": (0, math.inf), "num_beams": (1, math.inf),
    "num_return_sequences": (1, math.inf), "no_repeat_ngram_size": (0, math.inf)}
CORRECT_IT = "Correct the value, or remove the file."


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


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation configuration of a directory; None if it has none.

    Raises:
        InputError: the file is not a JSON object, or holds a value that transformers does not accept.
    """
    path = folder / GENERATION
    return GenerationConfig.from_dict(repaired_generation_config(read_json(path), path)) if path.is_file() else None


def repaired_generation_config(stated: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The content of a generation_config.json that transformers reads and saves.

    Two mistakes of published models are corrected, because transformers reads such a file but refuses to save it:
    sampling options without ``do_sample``, which is set, and a negative ``pad_token_id``, which is removed.

    Raises:
        InputError: transformers does not accept a value, or a token id is not an integer.
    """
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        try:
            token_ids(stated, key)
        except InputError as error:
            raise InputError(f"{path}: {error.cause}", CORRECT_IT) from error
    for key, (lowest, highest) in NUMBERS.items():
        value = stated.get(key)
        if value is not None and (type(value) not in (int, float) or not lowest <= value <= highest):
            raise InputError(f"{path}: {key} {str(value)[:40]!r} is not a number from {lowest} to {highest}",
                             CORRECT_IT)
    if not isinstance(stated.get("do_sample"), bool | None):
        raise InputError(f"{path}: do_sample {str(stated['do_sample'])[:40]!r} is not true or false", CORRECT_IT)
    reason = ""
    if any(token < 0 for token in token_ids(stated, "pad_token_id")):
        stated = {key: value for key, value in stated.items() if key != "pad_token_id"}
    for content in (dict(stated), {**stated, "do_sample": True}):
        try:
            GenerationConfig.from_dict(dict(content)).validate(strict=True)
        except (TypeError, ValueError, AttributeError) as error:
            reason = reason or one_line(error)
        else:
            return content
    raise InputError(f"{path} is not understood: {reason}", CORRECT_IT)
