"""Ids of special tokens that the configurations of early 2023 state wrongly.

Conversions of LLaMA from before transformers 4.28 say ``bos_token_id`` 0, ``eos_token_id`` 1 and ``pad_token_id`` -1,
while the tokenizer's are 1 and 2: whoever believes them never stops.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from gptq_belle.models.settings import token_ids


def mended(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """What of config.json (or generation_config.json) has to be written otherwise: key to id; mostly nothing.

    Raises:
        InputError: an id that is no whole number.
    """
    changed: dict[str, int | None] = {}
    for key in ("bos_token_id", "eos_token_id"):
        stated, known = token_ids(config, key), getattr(tokenizer, key)
        if stated and known is not None and known not in stated:
            changed[key] = known
    if any(token < 0 for token in token_ids(config, "pad_token_id")):
        changed["pad_token_id"] = tokenizer.pad_token_id
    return changed
