"""Overrides of settings for some linears: parsing, validation, and completion so that every reader agrees on them.

On disk they are GPTQModel's ``dynamic``. GPTQModel and vLLM try its expressions in order, from the start of a linear's
name, and use the first one that matches. vLLM fuses the linears of a stage (q, k and v; gate and up) and looks them up
under the name of the fused linear; older versions under that name alone.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import regex

from gptq_belle.errors import UsageError
from gptq_belle.models.architectures import Architecture
from gptq_belle.quantization.config import OVERRIDABLE, REGEX_REMEDY, Override, QuantConfig

OVERRIDE_REMEDY = "Write REGEX=bits:8, REGEX=bits:8,group_size:64, REGEX=sym:false or REGEX=skip."
START, END = ".*(?:", ")"  # enclose an expression so that it may match anywhere
BOOLEANS = {"true": True, "false": False}


def parse_override(text: str) -> Override:
    """Parse an override of `quantize --override`; its expression may match anywhere in a linear's full name.

    Raises:
        UsageError: an unknown form, key or value, or an invalid regular expression.
    """
    expression, equals, assignments = text.rpartition("=")  # an expression may contain an equals sign too: (?=...)
    if not equals or not expression:
        raise UsageError(f"override {text!r} does not start with REGEX=", OVERRIDE_REMEDY)
    try:
        re.compile(expression)
    except re.error as error:
        raise UsageError(f"override {text!r}: {expression!r} is not a regular expression: {error}",
                         REGEX_REMEDY) from error
    pattern = f"{START}{expression}{END}"
    if assignments == "skip":
        return Override(pattern, skip=True)
    values: dict[str, int | bool] = {}
    for assignment in assignments.split(","):
        key, _, value = assignment.partition(":")
        if key not in OVERRIDABLE or key in values:
            wrong = "given twice" if key in values else "not a setting of a linear"
            raise UsageError(f"override {text!r}: {key!r} is {wrong}", OVERRIDE_REMEDY)
        values[key] = _value(text, key, value)
    return Override(pattern, **values)  # type: ignore[arg-type]


def resolve_overrides(config: QuantConfig, arch: Architecture, blocks: int) -> QuantConfig:
    """Validate the overrides for a model, and complete them for readers that fuse the linears of a stage.

    Returns:
        The config with the overrides to write.
    Raises:
        UsageError: an override matches no linear, two match the same linear, or the linears of a stage differ.
    """
    if not config.overrides:
        return config
    names = [f"{arch.blocks}.{index}.{name}" for index in range(blocks) for name in arch.linears]
    for override in config.overrides:
        if not any(re.match(override.pattern, name) for name in names):
            raise UsageError(f"override {_given(override)!r} matches no linear",
                             f"The linears are {arch.blocks}.0 to {blocks - 1} with {', '.join(arch.linears)}.")
    for name in names:
        _check_one(name, config.overrides)
    for index in range(blocks):
        for stage in arch.stages:
            _check_stage(config, f"{arch.blocks}.{index}.", stage)
    effective = (replace(override, sym=None) if override.sym == config.sym and len(override.values()) > 1 else override
                 for override in config.overrides)  # a redundant sym must not make the format gptq_v2
    complete = tuple(_with_fused(override, arch, blocks) for override in effective)
    resolved = replace(config, overrides=complete)
    _check_fused(resolved, arch, blocks)
    return resolved


def quantized_modules(config: QuantConfig, arch: Architecture, blocks: int) -> list[list[str]] | None:
    """The linears of a block that are quantized, by stage, for ``modules_in_block_to_quantize``.

    transformers and vLLM read this key; transformers does not read ``dynamic``. None if all linears are quantized, or
    if the blocks differ, which the key cannot state.
    """
    kept = [{name for name in arch.linears if config.for_linear(f"{arch.blocks}.{index}.{name}") is not None}
            for index in range(blocks)]
    if len(kept[0]) == len(arch.linears) or any(other != kept[0] for other in kept):
        return None
    return [names for stage in arch.stages if (names := [name for name in stage if name in kept[0]])]


def _given(override: Override) -> str:
    """The expression of an override as `parse_override` received it."""
    inner = override.pattern.removeprefix(START).removesuffix(END)
    return inner if override.pattern == f"{START}{inner}{END}" else override.pattern


def _value(text: str, key: str, value: str) -> int | bool:
    if key == "sym" and value in BOOLEANS:
        return BOOLEANS[value]
    if key != "sym" and re.fullmatch(r"-?\d+", value):
        return int(value)
    raise UsageError(f"override {text!r}: {key} {value!r} is not allowed", OVERRIDE_REMEDY)


def _check_one(name: str, overrides: Sequence[Override]) -> None:
    """Check that at most one override matches a linear, in the libraries re and regex alike.

    The order of overrides must not matter, because transformers sorts the keys of a config.json that it saves.
    GPTQModel and vLLM match with different libraries.
    """
    found = [override.pattern for override in overrides if re.match(override.pattern, name)]
    if len(found) > 1:
        raise UsageError(f"overrides {found[0]!r} and {found[1]!r} both match {name}",
                         "Write more specific expressions, so that each linear is matched by one.")
    for override in overrides:
        with suppress(regex.error):
            if bool(regex.match(override.pattern, name)) == (override.pattern in found):
                continue
        raise UsageError(f"override {override.pattern!r} matches differently in the libraries re and regex, which "
                         "other programs use", "Use only syntax that means the same in both.")


def _check_stage(config: QuantConfig, prefix: str, stage: tuple[str, ...]) -> None:
    settings = [config.for_linear(prefix + name) for name in stage]
    if any(other != settings[0] for other in settings):
        raise UsageError(f"{prefix}{{{', '.join(stage)}}} would have different settings, but readers fuse them",
                         f"Override all of them alike, such as with '{'|'.join(stage)}=...'.")


def _with_fused(override: Override, arch: Architecture, blocks: int) -> Override:
    """The override, matching the fused names of the stages whose linears it matches."""
    pattern = override.pattern
    for fused, stage in zip(arch.fused, arch.stages, strict=True):
        missing = [str(index) for index in range(blocks) if fused
                   and re.match(override.pattern, f"{arch.blocks}.{index}.{stage[0]}")
                   and not re.match(override.pattern, f"{arch.blocks}.{index}.{fused}")]
        if missing:
            pattern += rf"|{re.escape(arch.blocks)}\.(?:{'|'.join(missing)})\.{re.escape(fused)}$"
    return replace(override, pattern=pattern)


def _check_fused(config: QuantConfig, arch: Architecture, blocks: int) -> None:
    for index in range(blocks):
        for fused, stage in zip(arch.fused, arch.stages, strict=True):
            prefix = f"{arch.blocks}.{index}."
            matching = [o for o in config.overrides if fused and re.match(o.pattern, prefix + fused)]
            differs = config.for_linear(prefix + fused) != config.for_linear(prefix + stage[0])
            if fused and (len(matching) > 1 or differs):
                raise UsageError(f"override {matching[0].pattern!r} also matches {prefix}{fused}, the name of vLLM's "
                                 f"fused {', '.join(stage)}", "Write a more specific expression.")
