"""The quantization_config of a checkpoint: which bits, group size and format each linear has."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import regex

from gptq_belle.errors import InputError
from gptq_belle.formats.zero_points import V1

MOST_SECONDS = 1.0  # for one expression of a file on one name; a malicious one could take for ever
WRONG_CONFIG = "The configuration belongs to other files: fetch the directory again, or correct the figure."
BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class Quantization:
    """What the configuration of a checkpoint says about its packed weights.

    Attributes:
        bits: bits a weight.
        group_size: inputs that share a scale; -1 for all of a row.
        sym: one fixed zero point; None where the file does not say.
        desc_act: groups follow act-order (``g_idx`` says how in any case).
        checkpoint_format: "gptq" (v1) or "gptq_v2".
        producer: the program that wrote it, or "" where the file does not say.
        rules: of ``dynamic``, expressions and what they set, in the file's order; None where nothing is quantized.
    """

    bits: int
    group_size: int
    sym: bool | None
    desc_act: bool
    checkpoint_format: str
    producer: str
    rules: tuple[tuple[str, dict[str, Any] | None], ...] = ()

    def of(self, name: str) -> "Quantization | None":
        """What holds for one linear, by its full name: the first rule counts that matches from the name's start, as
        GPTQModel and vLLM have it. None where the linear is not quantized.

        Raises:
            InputError: a rule that no regular expression engine takes.
        """
        for pattern, values in self.rules:
            if _matches(pattern, name):
                return None if values is None else replace(self, rules=(), **values)
        return replace(self, rules=())

    @property
    def zero_offset(self) -> int:
        """What is added to a stored zero point: 1 in v1, 0 in v2."""
        return 1 if self.checkpoint_format == V1 else 0


def _matches(pattern: str, name: str) -> bool:
    try:
        return regex.match(pattern, name, timeout=MOST_SECONDS) is not None
    except (regex.error, TimeoutError, RecursionError, OverflowError) as error:
        raise InputError(f"the expression {pattern[:80]!r} of dynamic cannot be used: {str(error)[:80]}",
                         WRONG_CONFIG) from error


def _producer(stated: dict[str, Any]) -> str:
    meta = stated.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    names = quantizer if isinstance(quantizer, list) else [quantizer or ""]
    return ", ".join(map(str, names))


def written_by_us(quantization_config: Mapping[str, Any]) -> bool:
    """True where the dictionary of a checkpoint says that gptq_belle produced it."""
    meta = quantization_config.get("meta")
    names = meta.get("quantizer") if isinstance(meta, Mapping) else None
    return isinstance(names, list) and any(str(name).startswith("gptq_belle:") for name in names)
