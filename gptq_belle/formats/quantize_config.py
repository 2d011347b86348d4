"""The quantization_config of a checkpoint: bits, group size and format of every linear."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import regex

from gptq_belle.errors import InputError
from gptq_belle.formats.foreign_config import as_gptq
from gptq_belle.formats.zero_points import V1, V2

MATCH_TIMEOUT = 1.0  # seconds per match; a malicious regular expression could run forever
LARGEST_GROUP = 1 << 24  # larger than in_features of any linear
WRONG_CONFIG = "The configuration belongs to other files: fetch the directory again, or correct the value."
BITS = (2, 3, 4, 8)
HEAD_BITS = (16, 8, 4)  # of the lm_head in memory


@dataclass(frozen=True, slots=True)
class Quantization:
    """Quantization settings of the linears of a checkpoint.

    Attributes:
        bits: bits per weight.
        group_size: inputs per scale; -1 for one group per output channel.
        sym: whether weights are symmetric; None if the file does not state it.
        desc_act: whether groups follow the activation order (``g_idx`` contains the groups in any case).
        checkpoint_format: "gptq" (v1) or "gptq_v2".
        producer: program that wrote the checkpoint; "" if the file does not state it.
        rules: rules of ``dynamic`` in the order of the file: a regular expression and the settings that it changes,
            or None if matching linears are not quantized.
    """

    bits: int
    group_size: int
    sym: bool | None
    desc_act: bool
    checkpoint_format: str
    producer: str
    rules: tuple[tuple[str, dict[str, Any] | None], ...] = ()

    def for_linear(self, name: str) -> "Quantization | None":
        """Settings of one linear by its full name; None if it is not quantized.

        The first rule that matches the start of the name applies, as in GPTQModel and vLLM.

        Raises:
            InputError: a rule is not a valid regular expression, or matching takes too long.
        """
        for pattern, values in self.rules:
            if _matches(pattern, name):
                return None if values is None else replace(self, rules=(), **values)
        return replace(self, rules=())

    @property
    def zero_offset(self) -> int:
        """Difference of true and stored zero points: 1 in v1, 0 in v2."""
        return 1 if self.checkpoint_format == V1 else 0


def _matches(pattern: str, name: str) -> bool:
    try:
        return regex.match(pattern, name, timeout=MATCH_TIMEOUT) is not None
    except (regex.error, TimeoutError, RecursionError, OverflowError) as error:
        raise InputError(f"the regular expression {pattern[:80]!r} of dynamic cannot be used: {str(error)[:80]}",
                         WRONG_CONFIG) from error


def parse_quantization(stated: Mapping[str, Any], path: Path) -> Quantization:
    """Validate and parse a quantization_config dictionary, of GPTQ or of a method that `foreign_config` translates.

    ``quant_method`` is optional, as in AutoGPTQ; ``format`` takes precedence over ``checkpoint_format``; the default
    is v1.

    Args:
        path: directory of the checkpoint, for error messages.
    Raises:
        InputError: the method is not known, or a value is missing or not supported.
    """
    stated = as_gptq(stated, path)
    _expect(path, "pack_dtype", stated.get("pack_dtype", "int32"), ("int32",))
    checkpoint_format = stated.get("format") or stated.get("checkpoint_format") or V1
    _expect(path, "format", checkpoint_format, (V1, V2))
    _expect(path, "bits", stated.get("bits"), BITS)
    _expect_group_size(path, stated.get("group_size"))
    return Quantization(stated["bits"], stated["group_size"], stated.get("sym"), bool(stated.get("desc_act")),
                        checkpoint_format, _producer(stated), _rules(path, stated.get("dynamic")))


def _expect(path: Path, key: str, value: object, allowed: tuple[object, ...]) -> None:
    if isinstance(value, bool) or value not in allowed:
        raise InputError(f"{path}: {key} {value!r} of the quantization is not supported",
                         f"It must be one of {', '.join(map(str, allowed))}.")


def _expect_group_size(path: Path, value: object) -> None:
    if type(value) is not int or not (value == -1 or 1 <= value <= LARGEST_GROUP):
        raise InputError(f"{path}: group_size {str(value)[:40]!r} is not supported",
                         "It must be -1 or a positive integer.")


def _rules(path: Path, dynamic: object) -> tuple[tuple[str, dict[str, Any] | None], ...]:
    """Parse GPTQModel's ``dynamic``: keys are regular expressions with an optional prefix "+:" or "-:" (skip)."""
    if dynamic is None:
        return ()
    if not isinstance(dynamic, dict) or not all(isinstance(values, dict) for values in dynamic.values()):
        raise InputError(f"{path}: dynamic is not an object of objects", WRONG_CONFIG)
    rules: list[tuple[str, dict[str, Any] | None]] = []
    for key, values in dynamic.items():
        if "bits" in values:
            _expect(path, "bits", values["bits"], BITS)
        if "group_size" in values:
            _expect_group_size(path, values["group_size"])
        kept = {name: values[name] for name in ("bits", "group_size", "sym", "desc_act") if name in values}
        rules.append((key.removeprefix("-:").removeprefix("+:"), None if key.startswith("-:") else kept))
    return tuple(rules)


def _producer(stated: Mapping[str, Any]) -> str:
    meta = stated.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    names = quantizer if isinstance(quantizer, list) else [quantizer or ""]
    return ", ".join(map(str, names))


def has_channel_scales(quantization_config: Mapping[str, Any]) -> bool:
    """Whether norms differ from the source's because channel scales are folded into them."""
    meta = quantization_config.get("meta")
    return isinstance(meta, Mapping) and meta.get("channel_scales") is True


def written_by_gptq_belle(quantization_config: Mapping[str, Any]) -> bool:
    """Whether a quantization_config dictionary names gptq_belle as its producer."""
    meta = quantization_config.get("meta")
    names = meta.get("quantizer") if isinstance(meta, Mapping) else None
    return isinstance(names, list) and any(str(name).startswith("gptq_belle:") for name in names)
