"""`quantize --for READER`: settings that a reader takes, and what they cost."""

import re
from dataclasses import asdict, replace

from gptq_belle.errors import UsageError
from gptq_belle.formats.readers import KINDS, QUERY_KEY_VALUE, READERS, TARGETS, Reader, kinds_of
from gptq_belle.models.dimensions import Dimensions
from gptq_belle.quantization.config import Override, QuantConfig
from gptq_belle.quantization.overrides import END, START


def settings_for_reader(config: QuantConfig, d: Dimensions) -> tuple[QuantConfig, list[str]]:
    """The settings of a job whose result the readers of `config.reader` take, and notes on what they cost.

    BLOOM's query_key_value stays in 16 bits for vLLM. All other conflicts come from options of the user.

    Raises:
        UsageError: a reader does not take the settings; the reason is named.
    """
    if config.reader is None:
        return config, []
    notes, readers = [], [READERS[name] for name in TARGETS[config.reader]]
    if any(_refuses(reader, "BLOOM") for reader in readers) and "BLOOM" in _kinds(config, d):
        config = replace(config, overrides=(*config.overrides, _skip(config)))
        k, n = d.arch.shapes[f"self_attention.{QUERY_KEY_VALUE}"]
        extra = d.num_layers * k * n * (16 - config.bits) / 8
        notes.append(f"--for {config.reader} keeps {QUERY_KEY_VALUE} in 16 bits: {extra / 1e9:.2g} GB more, because "
                     f"vLLM re-packs it along the wrong dimension.")
    for reader in readers:
        for kind in _kinds(config, d):
            if _refuses(reader, kind):
                raise UsageError(f"--for {config.reader}: {_refusal(reader, kind)}", "Leave that option or --for out.")
    cpu = READERS["vLLM on a CPU"]
    if READERS["vllm"] in readers:
        notes += [f"{_refusal(cpu, kind)}; on GPUs it does." for kind in _kinds(config, d) if _refuses(cpu, kind)]
    return config, notes


def _kinds(config: QuantConfig, d: Dimensions) -> list[str]:
    kept = {linear: {index for index in range(d.num_layers) if config.for_linear(_name(d, index, linear)) is not None}
            for linear in d.arch.shapes}
    alike = all(len(blocks) in (0, d.num_layers) for blocks in kept.values())
    return kinds_of(asdict(config), d.model_type, alike=alike)


def _name(d: Dimensions, index: int, linear: str) -> str:
    return f"{d.arch.blocks}.{index}.{linear}"


def _refuses(reader: Reader, kind: str) -> bool:
    verdict = reader.verdicts.get(kind)
    return verdict is not None and not verdict.takes


def _refusal(reader: Reader, kind: str) -> str:
    return f"{reader.name} ({reader.version}) does not read {KINDS[kind][0]}: {reader.verdicts[kind].why}"


def _skip(config: QuantConfig) -> Override:
    """The override that leaves query_key_value in 16 bits.

    Raises:
        UsageError: an override of the user sets something else for it.
    """
    name = f"transformer.h.0.self_attention.{QUERY_KEY_VALUE}"
    if any(re.match(override.pattern, name) for override in config.overrides):
        raise UsageError(f"--for {config.reader} keeps {QUERY_KEY_VALUE} in 16 bits, and an --override sets other bits",
                         "Leave that --override or --for out.")
    return Override(f"{START}{QUERY_KEY_VALUE}{END}", skip=True)
