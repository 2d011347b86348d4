"""The model card that a quantized directory carries as README.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from gptq_belle import __version__
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.config import QuantConfig

CARD = """---
{front}
---

# {name}, {bits} bits

{made} by gptq_belle {version} from `{name}` ({model_type}): {method}, {bits} bits, {group}, {sym}{order}.
The linear layers of the blocks are packed in the GPTQ format (`{checkpoint_format}`); embeddings, norms, biases and
the head are float16.{report}

## Use

    gptq-belle chat .
    python -c "import gptq_belle; print(gptq_belle.load('.').generate('你好'))"

The files are standard: every reader of the GPTQ format takes them (for BLOOM, of those that know BLOOM).

## Licence

A quantized model stays under the licence of its source. BELLE's models are published for research only; those
built on LLaMA carry Meta's terms as well.
"""


REPORT = " `quantization_report.json` holds the error of every layer and the calibration's hash."


def model_card(source: CheckpointReader, config: QuantConfig) -> str:
    """The text of the card of a model that was quantized here, front matter included."""
    method = {"gptq": "GPTQ", "rtn": "round to nearest"}[config.method]
    return _card(source.path, source.config["model_type"], config.to_dict(), made="Quantized", method=method,
                 report=REPORT)


def converted_card(source: Path, model_type: str, quantization: Mapping[str, Any]) -> str:
    """The text of the card of a model that others quantized.

    Args:
        source: what was converted; its name is shown.
        model_type: as in config.json.
        quantization: the quantization_config that was written.
    """
    return _card(source, model_type, quantization, made="Converted", method="GPTQ codes as they were", report="")


def _card(source: Path, model_type: str, quantization: Mapping[str, Any], **words: str) -> str:
    bits, group = quantization["bits"], quantization["group_size"]
    front = ModelCardData(language=["zh", "en"], library_name="transformers", pipeline_tag="text-generation",
                          tags=["gptq", f"{bits}-bit", "belle", model_type])
    return CARD.format(
        front=front.to_yaml().strip(), name=source.resolve().name, version=__version__, model_type=model_type,
        bits=bits, group="one scale a row" if group == -1 else f"groups of {group}",
        sym="symmetric" if quantization["sym"] else "asymmetric",
        order=", act-order" if quantization["desc_act"] else "", checkpoint_format=quantization["format"], **words)
