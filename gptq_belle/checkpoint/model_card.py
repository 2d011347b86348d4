"""The model card (README.md) of a quantized directory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from gptq_belle import __version__
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.formats.quantize_config import has_channel_scales
from gptq_belle.formats.readers import Reader, conditions, kinds_of, refusers, takers

CARD = """---
{front}
---

# {name}, {all_bits} bits

{made} by gptq_belle {version} from `{name}` ({model_type}): {method}, {bits} bits, {group}, {sym}{order}.
The linear layers of the blocks are packed in the GPTQ format (`{checkpoint_format}`); embeddings, norms, biases and
the head are {head}.{report}
{overrides}
## Use

    gptq-belle chat .
    python -c "import gptq_belle; print(gptq_belle.load('.').generate('你好'))"

{readers}

## Licence

A quantized model stays under the licence of its source. BELLE's models are published for research only; those
built on LLaMA carry Meta's terms as well.
"""
READ_BY = "gptq_belle reads these files, and so do, in the versions that were examined:"
ONLY = "**Only gptq_belle reads these files**, of all programs that were examined."
NOT_BY = "These refuse or misread them:"
PACKED = """gptq_belle reads these files. Other programs must support a quantized lm_head (`lm_head` in
`quantize_config.json`), as GPTQModel does."""
MODULES = "modules_in_block_to_quantize"  # written if the same linears are skipped in all blocks
RESULTS = ("<!-- results -->", "<!-- end of results -->")
CHANNEL_SCALES = """ Where it lowers the error, channel scales are folded into norms: LoRA adapters of the source
do not fit this model, merge them into the source first."""
REPORT = " `quantization_report.json` contains the error of every layer and the hash of the calibration data."


def model_card(source: CheckpointReader, quantization: Mapping[str, Any]) -> str:
    """Render the card of a model that gptq_belle quantized, including front matter.

    Args:
        quantization: the written quantization_config, with the settings of the job under ``meta``.
    """
    settings = quantization["meta"]["settings"]
    scaled = has_channel_scales(quantization) and any(source.arch.norms)
    method = {"gptq": "GPTQ", "rtn": "round to nearest"}[settings["method"]]
    every = sorted({settings["bits"], *(override["bits"] for override in settings["overrides"] if override["bits"])})
    return _card(source.path, source.config["model_type"], quantization, every, made="Quantized", method=method,
                 report=REPORT + CHANNEL_SCALES * scaled, overrides=_overrides(settings["overrides"]),
                 readers=_readers(settings, source.config["model_type"], MODULES in quantization),
                 head="float16" if settings["head_bits"] == 16 else f"packed in {settings['head_bits']} bits")


def converted_card(source: Path, model_type: str, quantization: Mapping[str, Any]) -> str:
    """Render the card of a converted model.

    Args:
        source: path of the converted checkpoint; its name is shown.
    """
    rules = quantization.get("dynamic", {}).values()
    settings = {"bits": quantization["bits"], "sym": quantization["sym"], "act_order": quantization["desc_act"],
                "overrides": [{"skip": False, "bits": rule.get("bits"), "sym": rule.get("sym")} for rule in rules],
                "auto_bits": None, "head_bits": 16}
    return _card(source, model_type, quantization, [quantization["bits"]], made="Converted",
                 method="codes unchanged", report="", overrides="",
                 readers=PACKED if quantization["lm_head"] else _readers(settings, model_type, alike=False),
                 head="packed too" if quantization["lm_head"] else "float16")


def _card(source: Path, model_type: str, quantization: Mapping[str, Any], every: Sequence[int], **words: str) -> str:
    bits, group = quantization["bits"], quantization["group_size"]
    front = ModelCardData(language=["zh", "en"], library_name="transformers", pipeline_tag="text-generation",
                          tags=["gptq", *(f"{one}-bit" for one in every), "belle", model_type])
    return CARD.format(
        front=front.to_yaml().strip(), name=source.resolve().name, version=__version__, model_type=model_type,
        bits=bits, all_bits=" and ".join(map(str, every)),
        group="one scale per output channel" if group == -1 else f"groups of {group}",
        sym="symmetric" if quantization["sym"] else "asymmetric",
        order=", act-order" if quantization["desc_act"] else "", checkpoint_format=quantization["format"], **words)


def _readers(settings: Mapping[str, Any], model_type: str, alike: bool) -> str:
    """The programs that read the files and those that do not, by the table of `formats.readers`."""
    kinds = kinds_of(settings, model_type, alike=alike)
    taking = ["- " + ", ".join([_named(reader), *conditions(reader, kinds)]) for reader in takers(kinds)]
    refusing = [f"- {_named(reader)}: {why}" for reader, why in refusers(kinds)]
    return "\n".join([READ_BY, "", *taking] if taking else [ONLY]) + "\n".join(
        ["", "", NOT_BY, "", *refusing] if refusing else [])


def _named(reader: Reader) -> str:
    return f"{reader.name} ({reader.version})" if reader.version else reader.name


def _overrides(overrides: Sequence[Mapping[str, Any]]) -> str:
    """Table of the overrides; empty if there are none."""
    if not overrides:
        return ""
    rows = []
    for override in overrides:
        changed = ", ".join(f"{key} {override[key]}" for key in ("bits", "group_size", "sym")
                            if override[key] is not None)
        pattern = override["pattern"].replace("|", "&#124;")
        rows.append(f"| `{pattern}` | {'float16' if override['skip'] else changed} |")
    return "\n".join(["", "| linears | settings |", "|---|---|", *rows, ""])


def with_results(card: str, results: str) -> str:
    """Insert a section of results into a card: replacing an earlier one, else before "Use", else at the end."""
    section = f"{RESULTS[0]}\n{results}\n{RESULTS[1]}\n"
    start, end = (card.find(mark) for mark in RESULTS)
    if 0 <= start < end:
        return card[:start] + section + card[end + len(RESULTS[1]) :].removeprefix("\n")
    place = card.find("\n## Use\n") + 1 or len(card)
    return card[:place] + ("" if card[:place].endswith("\n") else "\n") + section + "\n" + card[place:]
