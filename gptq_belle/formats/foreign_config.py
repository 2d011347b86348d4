"""The quantization_config of other methods whose weights GPTQ's tensors can hold, as the one that GPTQ would state.

auto-round writes GPTQ's tensors under settings of its own, llm-compressor (compressed-tensors) and AutoAWQ other
tensors of the same codes, scales and zero points; `formats.foreign_linears` makes GPTQ's tensors of those.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptq_belle.errors import InputError
from gptq_belle.formats.zero_points import V1, V2
from gptq_belle.models.architectures import LM_HEAD

GPTQ, PACK_QUANTIZED, AWQ = "gptq", "pack-quantized", "awq"  # how the tensors of a linear are laid out
METHODS = {"gptq": "GPTQ", "auto-round": "auto-round", "compressed-tensors": "compressed-tensors", "awq": "AWQ"}
# auto-round's packing_format: the format of the zero points, and the layout.
AUTO_ROUND = {"auto_round:auto_gptq": (V1, GPTQ), "auto_round:gptqmodel": (V2, GPTQ), "auto_round": (V2, GPTQ),
              "auto_round:auto_awq": (V2, AWQ)}
ONLY_WEIGHTS = "Only weights of 2, 3, 4 or 8 bits under activations of 16 or 32 bits can be read; use the tool itself."
Rules = dict[str, dict[str, Any]]


def linear_layout(stated: object) -> str:
    """How a directory with this quantization_config lays out its packed linears."""
    if not isinstance(stated, Mapping):
        return GPTQ
    method = stated.get("quant_method")
    if method == "auto-round":
        return AUTO_ROUND.get(str(stated.get("packing_format")), (V1, GPTQ))[1]
    return {"compressed-tensors": PACK_QUANTIZED, "awq": AWQ}.get(str(method), GPTQ)


def as_gptq(stated: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The quantization_config in GPTQ's terms; unchanged where it is GPTQ's.

    Args:
        path: directory of the checkpoint, for error messages.
    Raises:
        InputError: a setting for which GPTQ's format has no place.
    """
    _allow(path, "quant_method", stated.get("quant_method", "gptq"), tuple(METHODS))
    translate = {"auto-round": _auto_round, "compressed-tensors": _compressed_tensors, "awq": _awq}.get(
        stated.get("quant_method", ""))
    return dict(stated) if translate is None else {"quant_method": "gptq"} | translate(stated, path)


def _auto_round(stated: Mapping[str, Any], path: Path) -> dict[str, Any]:
    packing, rules = stated.get("packing_format"), Rules()
    _allow(path, "packing_format", packing, tuple(AUTO_ROUND))
    _allow(path, "data_type", stated.get("data_type", "int"), ("int",))
    _wide_activations(path, stated.get("act_bits"))
    for name, values in _object(path, stated, "extra_config").items():
        if not isinstance(values, Mapping):
            raise _malformed(path, "extra_config")
        # Names are exact, or regular expressions that may match anywhere.
        pattern = f"{re.escape(name)}$" if re.fullmatch(r"[\w.]+", name) else f".*(?:{name})"
        if values.get("bits") in (16, 32):
            _add_rule(rules, pattern, None)
            continue
        _allow(path, "data_type", values.get("data_type") or "int", ("int",))
        _wide_activations(path, values.get("act_bits"))
        _add_rule(rules, pattern, values)
    return _settings(stated, AUTO_ROUND[str(packing)][0], rules, f"auto-round:{stated.get('autoround_version', '')}")


def _awq(stated: Mapping[str, Any], path: Path) -> dict[str, Any]:
    _allow(path, "version", str(stated.get("version") or stated.get("format")).lower(), ("gemm",))
    _allow(path, "bits", stated.get("bits"), (4,))
    skipped, rules = stated.get("modules_to_not_convert") or [], Rules()
    if not isinstance(skipped, list):
        raise _malformed(path, "modules_to_not_convert")
    for name in map(str, skipped):  # a part of the name suffices
        _add_rule(rules, f".*{re.escape(name)}", None)
    return _settings(stated, V2, rules, "AWQ")


def _compressed_tensors(stated: Mapping[str, Any], path: Path) -> dict[str, Any]:
    _allow(path, "format", stated.get("format"), (PACK_QUANTIZED,))
    rules, every = Rules(), list(_object(path, stated, "config_groups").values())
    groups = [_scheme(group, path) for group in every]
    if not groups:
        raise InputError(f"{path}: config_groups names no linears", "Fetch the directory again.")
    for name in stated.get("ignore") or []:
        _add_rule(rules, _target(str(name)), None)
    for group, settings in zip(every, groups, strict=True):
        for target in map(str, group.get("targets") or []):
            if target != "Linear":
                _add_rule(rules, _target(target), settings)
    default = next((settings for group, settings in zip(every, groups, strict=True)
                    if "Linear" in (group.get("targets") or [])), groups[0])
    return _settings(default, V2, rules, f"compressed-tensors:{stated.get('version', '')}")


def _scheme(group: object, path: Path) -> dict[str, Any]:
    """Settings of a config group: integer weights per group or output channel, nothing else quantized."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(group, Mapping) or not isinstance(weights, Mapping):
        raise _malformed(path, "config_groups")
    for other in ("input_activations", "output_activations"):
        if group.get(other) is not None:
            raise InputError(f"{path}: {other} are quantized", ONLY_WEIGHTS)
    _allow(path, "format", group.get("format") or PACK_QUANTIZED, (PACK_QUANTIZED,))
    _allow(path, "type", weights.get("type"), ("int",))
    _allow(path, "strategy", weights.get("strategy"), ("group", "channel"))
    return {"bits": weights.get("num_bits"), "sym": weights.get("symmetric"),
            "group_size": weights.get("group_size") if weights["strategy"] == "group" else -1,
            "desc_act": weights.get("actorder") == "group"}


def _target(name: str) -> str:
    """A target of compressed-tensors, a full name or "re:" and an expression, as a pattern from the name's start."""
    return name.removeprefix("re:") if name.startswith("re:") else f"{re.escape(name)}$"


def _add_rule(rules: Rules, pattern: str, values: Mapping[str, Any] | None) -> None:
    """Add a rule in GPTQModel's form. Nothing is said of an lm_head that is left out: GPTQ leaves it out unasked."""
    if values is None and LM_HEAD in pattern:
        return
    kept = {name: value for name in ("bits", "group_size", "sym") if (value := (values or {}).get(name)) is not None}
    rules.setdefault(f"{'-' if values is None else '+'}:{pattern}", kept)


def _settings(stated: Mapping[str, Any], zeros: str, rules: Rules, producer: str) -> dict[str, Any]:
    return {"bits": stated.get("bits"), "group_size": stated.get("group_size"), "sym": stated.get("sym"),
            "desc_act": bool(stated.get("desc_act")), "checkpoint_format": zeros, "format": zeros,
            **({"dynamic": rules} if rules else {}), "meta": {"quantizer": [producer]}}


def _wide_activations(path: Path, bits: object) -> None:
    if bits not in (None, 16, 32):
        raise InputError(f"{path}: activations are quantized to {str(bits)[:20]} bits", ONLY_WEIGHTS)


def _object(path: Path, stated: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = stated.get(key) or {}
    if not isinstance(value, Mapping):
        raise _malformed(path, key)
    return value


def _malformed(path: Path, key: str) -> InputError:
    return InputError(f"{path}: {key} of the quantization is not of the documented form", "Fetch the directory again.")


def _allow(path: Path, key: str, value: object, allowed: tuple[object, ...]) -> None:
    if isinstance(value, bool) or value not in allowed:
        raise InputError(f"{path}: {key} {str(value)[:60]!r} of the quantization is not supported",
                         f"It must be one of {', '.join(map(str, allowed))}.")
