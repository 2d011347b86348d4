"""The command `models`."""

from collections.abc import Iterator
from typing import Any

from gptq_belle.cli import console, options


def models(device: options.UnusedDevice = "auto", as_json: options.Json = False,
           verbose: options.Verbose = False) -> None:
    """List the BELLE models whose names other commands accept as MODEL or PATH and download."""
    options.import_engine("models.sizes")
    rows = list(catalogue())
    if as_json:
        console.print_json(rows)
        return
    head = ["name", "model_type", "prompt", "published as", "GiB", "billions", "4 bit, GB", "8 bit, GB"]
    keys = ("name", "architecture", "prompt_style", "kind", "published", "billions", "gb_4_bit", "gb_8_bit")
    console.print_table("", head, [[_text(row[key]) for key in keys] for row in rows], text=5)
    for licence in dict.fromkeys(row["licence"] for row in rows):
        names = ", ".join(row["name"] for row in rows if row["licence"] == licence)
        console.print_line(f"{licence}: {names}")
    console.print_line("The hub ids start with BelleGroup/. Sizes in 4 and 8 bits are those of quantized files.")
    console.print_line("Directories of other dense decoders that transformers knows are quantized and run, too: "
                       "`gptq-belle inspect` says whether one is.")


def catalogue() -> Iterator[dict[str, Any]]:
    """The catalogue's models with their sizes, as JSON-ready dictionaries."""
    from gptq_belle.models.architectures import family
    from gptq_belle.models.belle_catalogue import BELLE_MODELS, CONFIGS
    from gptq_belle.models.dimensions import dimensions
    from gptq_belle.models.sizes import file_bytes, parameter_count

    for each in BELLE_MODELS:
        d = dimensions(CONFIGS[each.config])
        sizes = {f"gb_{bits}_bit": round(file_bytes(d, bits) / 1e9, 1) for bits in (4, 8)}
        yield {"name": each.name, "hub_id": each.hub_id, "architecture": each.architecture,
               "prompt_style": family(each.architecture).prompt_style, "kind": each.kind,
               "published": each.published, "billions": round(parameter_count(d) / 1e9, 2), **sizes,
               "licence": each.licence, "files": each.files, "next_step": each.next_step}


def _text(value: Any) -> str:
    return "" if value is None else str(value)
