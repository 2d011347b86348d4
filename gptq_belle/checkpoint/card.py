"""The model card that a quantized directory carries as README.md."""

from huggingface_hub import ModelCardData

from gptq_belle import __version__
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.config import QuantConfig

CARD = """---
{front}
---

# {name}, {all_bits} bits

Quantized by gptq_belle {version} from `{name}` ({model_type}): {method}, {bits} bits, {group}, {sym}{order}.
The linear layers of the blocks are packed in the GPTQ format (`{checkpoint_format}`); embeddings, norms, biases and
the head are float16. `quantization_report.json` holds the error of every layer and the calibration's hash.
{overrides}
## Use

    gptq-belle chat .
    python -c "import gptq_belle; print(gptq_belle.load('.').generate('你好'))"

{readers}

## Licence

A quantized model stays under the licence of its source. BELLE's models are published for research only; those
built on LLaMA carry Meta's terms as well.
"""

UNIFORM = "The files are standard: every reader of the GPTQ format takes them (for BLOOM, of those that know BLOOM)."
MIXED = """Linears have different settings, stated in the `dynamic` of `quantize_config.json`: GPTQModel and vLLM read
it (vLLM takes symmetric 4 and 8 bits only), AutoGPTQ and transformers by itself do not."""

RESULTS = ("<!-- results -->", "<!-- end of results -->")


def model_card(source: CheckpointReader, config: QuantConfig) -> str:
    """The card's text, front matter included."""
    name = source.path.resolve().name
    every = sorted({config.bits, *(override.bits for override in config.overrides if override.bits)})
    front = ModelCardData(language=["zh", "en"], library_name="transformers", pipeline_tag="text-generation",
                          tags=["gptq", *(f"{bits}-bit" for bits in every), "belle", source.config["model_type"]])
    return CARD.format(
        front=front.to_yaml().strip(), name=name, version=__version__, model_type=source.config["model_type"],
        method={"gptq": "GPTQ", "rtn": "round to nearest"}[config.method], bits=config.bits,
        group="one scale a row" if config.group_size == -1 else f"groups of {config.group_size}",
        sym="symmetric" if config.sym else "asymmetric", order=", act-order" if config.act_order else "",
        checkpoint_format=config.checkpoint_format, all_bits=" and ".join(map(str, every)),
        overrides=_overrides(config), readers=MIXED if config.overrides else UNIFORM)


def _overrides(config: QuantConfig) -> str:
    """A table of them, in the place of nothing where there are none."""
    if not config.overrides:
        return ""
    rows = []
    for override in config.overrides:
        told = "float16" if override.skip else ", ".join(f"{key} {value}" for key, value in override.values().items())
        rows.append(f"| `{override.pattern.replace('|', '&#124;')}` | {told} |")
    return "\n".join(["", "| linears | have instead |", "|---|---|", *rows, ""])


def with_results(card: str, results: str) -> str:
    """A card with a section of results: in place of an earlier one, else in front of "Use", else at the end."""
    section = f"{RESULTS[0]}\n{results}\n{RESULTS[1]}\n"
    start, end = (card.find(mark) for mark in RESULTS)
    if 0 <= start < end:
        return card[:start] + section + card[end + len(RESULTS[1]) :].removeprefix("\n")
    place = card.find("\n## Use\n") + 1 or len(card)
    return card[:place] + ("" if card[:place].endswith("\n") else "\n") + section + "\n" + card[place:]
