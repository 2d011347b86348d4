"""Settings of single linears: how they are given, what is refused, and what makes every reader see the same ones.

On disk they are GPTQModel's ``dynamic``: GPTQModel and vLLM go through its expressions in order, match each from the
start of a linear's name, and stop at the first that does. vLLM runs the linears of one stage (q, k and v; gate and up)
as one, which it looks up by its own name for it, older versions by that name alone.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import regex

from gptq_belle.errors import UsageError
from gptq_belle.models.architectures import Architecture
from gptq_belle.quantization.config import EXPRESSION, OVERRIDABLE, Override, QuantConfig

FORM = "Write REGEX=bits:8, REGEX=bits:8,group_size:64, REGEX=sym:false or REGEX=skip."
START, END = ".*(?:", ")"  # around an expression that may match anywhere
TRUTHS = {"true": True, "false": False}


def parse_override(text: str) -> Override:
    """An override as `quantize --override` takes it; its expression may match anywhere in a linear's full name.

    Raises:
        UsageError: an unknown form, key or value, or no regular expression.
    """
    expression, equals, assignments = text.rpartition("=")  # an expression may hold one too: (?=...)
    if not equals or not expression:
        raise UsageError(f"override {text!r} has no REGEX= in front", FORM)
    try:
        re.compile(expression)
    except re.error as error:
        raise UsageError(f"override {text!r}: {expression!r} is not a regular expression: {error}",
                         EXPRESSION) from error
    pattern = f"{START}{expression}{END}"
    if assignments == "skip":
        return Override(pattern, skip=True)
    values: dict[str, int | bool] = {}
    for assignment in assignments.split(","):
        key, _, value = assignment.partition(":")
        if key not in OVERRIDABLE or key in values:
            wrong = "given twice" if key in values else "no setting of a linear"
            raise UsageError(f"override {text!r}: {key!r} is {wrong}", FORM)
        values[key] = _value(text, key, value)
    return Override(pattern, **values)  # type: ignore[arg-type]


def resolve_overrides(config: QuantConfig, arch: Architecture, blocks: int) -> QuantConfig:
    """Hold the overrides against a model's linears, and complete them for the readers that run a stage as one linear.

    Args:
        config: of the job.
        arch, blocks: of the model.
    Returns:
        The config whose overrides are those to write.
    Raises:
        UsageError: an override that matches nothing, two that match the same linear, a stage whose linears differ.
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
    told = (replace(override, sym=None) if override.sym == config.sym and len(override.values()) > 1 else override
            for override in config.overrides)  # what changes nothing must not make the file a v2 one
    complete = tuple(_with_fused(override, arch, blocks) for override in told)
    resolved = replace(config, overrides=complete)
    _check_fused(resolved, arch, blocks)
    return resolved


def _given(override: Override) -> str:
    """Its expression as `parse_override` was given it."""
    inner = override.pattern.removeprefix(START).removesuffix(END)
    return inner if override.pattern == f"{START}{inner}{END}" else override.pattern


def _value(text: str, key: str, value: str) -> int | bool:
    if key == "sym" and value in TRUTHS:
        return TRUTHS[value]
    if key != "sym" and re.fullmatch(r"-?\d+", value):
        return int(value)
    raise UsageError(f"override {text!r}: {key} {value!r} is not allowed", FORM)


def _check_one(name: str, overrides: Sequence[Override]) -> None:
    """transformers sorts the keys of a config.json that it saves: the order of overrides must not matter. And vLLM
    matches with another library than GPTQModel: both must find the same."""
    found = [override.pattern for override in overrides if re.match(override.pattern, name)]
    if len(found) > 1:
        raise UsageError(f"overrides {found[0]!r} and {found[1]!r} both match {name}",
                         "Let each linear be matched by one, such as by naming it more exactly.")
    for override in overrides:
        with suppress(regex.error):
            if bool(regex.match(override.pattern, name)) == (override.pattern in found):
                continue
        raise UsageError(f"override {override.pattern!r} is read differently by the libraries re and regex, of which "
                         "other programs use either", "Write it with what both have in common.")


def _check_stage(config: QuantConfig, prefix: str, stage: tuple[str, ...]) -> None:
    settings = [config.of(prefix + name) for name in stage]
    if any(other != settings[0] for other in settings):
        raise UsageError(f"{prefix}{{{', '.join(stage)}}} would not share one setting, and readers run them as one",
                         f"Override all of them alike, such as with '{'|'.join(stage)}=...'.")


def _with_fused(override: Override, arch: Architecture, blocks: int) -> Override:
    """The override, matching the fused names of the stages whose linears it matches."""
    pattern = override.pattern
    for fused, stage in zip(arch.fused, arch.stages, strict=True):
        lacking = [str(index) for index in range(blocks) if fused
                   and re.match(override.pattern, f"{arch.blocks}.{index}.{stage[0]}")
                   and not re.match(override.pattern, f"{arch.blocks}.{index}.{fused}")]
        if lacking:
            pattern += rf"|{re.escape(arch.blocks)}\.(?:{'|'.join(lacking)})\.{re.escape(fused)}$"
    return replace(override, pattern=pattern)


def _check_fused(config: QuantConfig, arch: Architecture, blocks: int) -> None:
    for index in range(blocks):
        for fused, stage in zip(arch.fused, arch.stages, strict=True):
            prefix = f"{arch.blocks}.{index}."
            matching = [o for o in config.overrides if fused and re.match(o.pattern, prefix + fused)]
            if fused and (len(matching) > 1 or config.of(prefix + fused) != config.of(prefix + stage[0])):
                raise UsageError(f"override {matching[0].pattern!r} also matches {prefix}{fused}, as which vLLM runs "
                                 f"{', '.join(stage)}", "Name the linears more exactly.")
