"""The command `models`."""

import math
from collections.abc import Iterator
from typing import Any

from gptq_belle.cli import console, options


def models(device: options.UnusedDevice = "auto", as_json: options.Json = False,
           verbose: options.Verbose = False) -> None:
    """List the BELLE family: names that stand for a download wherever MODEL or PATH is asked for."""
    rows = list(listed())
    if as_json:
        console.print_json(rows)
        return
    head = ["name", "model_type", "prompt", "published as", "GiB", "billions", "4 bit, GB", "8 bit, GB"]
    keys = ("name", "architecture", "prompt_style", "kind", "published", "billions", "gb_4_bit", "gb_8_bit")
    console.print_table("", head, [[_shown(row[key]) for key in keys] for row in rows], text=5)
    for licence in dict.fromkeys(row["licence"] for row in rows):
        names = ", ".join(row["name"] for row in rows if row["licence"] == licence)
        console.print_line(f"{licence}: {names}")
    console.print_line("On the hub they stand under BelleGroup/. Sizes in 4 and 8 bits are as quantize writes them.")


def listed() -> Iterator[dict[str, Any]]:
    """Every member with what is known of it, ready for JSON."""
    from gptq_belle.models.architectures import architecture
    from gptq_belle.models.belle_catalogue import FAMILY

    for each in FAMILY:
        sizes = {f"gb_{bits}_bit": round(packed_bytes(each.config, bits) / 1e9, 1) for bits in (4, 8)}
        yield {"name": each.name, "hub_id": each.hub_id, "architecture": each.architecture,
               "prompt_style": architecture(each.architecture).prompt_style, "kind": each.kind,
               "published": each.published, "billions": round(_parameters(each.config) / 1e9, 2), **sizes,
               "licence": each.licence, "files": each.files, "next_step": each.next_step}


def packed_bytes(config: str, bits: int) -> int:
    """Bytes of weights of a quantized directory: words, scales, zero points and group indices in groups of 128, and the
    rest in float16."""
    from gptq_belle.models.belle_catalogue import CONFIGS, GROUP_SIZE
    from gptq_belle.models.dimensions import dimensions, linear_shapes

    d = dimensions(CONFIGS[config])
    packed = weights = 0
    for inputs, outputs in linear_shapes(d).values():
        groups = -(-inputs // GROUP_SIZE)
        packed += (inputs * outputs + groups * outputs) * bits // 8 + 2 * groups * outputs + 4 * inputs
        weights += inputs * outputs
    return d.num_layers * packed + 2 * (_parameters(config) - d.num_layers * weights)


def _parameters(config: str) -> int:
    from gptq_belle.models.belle_catalogue import CONFIGS
    from gptq_belle.models.dimensions import dimensions, linear_shapes, outer_shapes, vector_shapes

    d = dimensions(CONFIGS[config])
    block = sum(math.prod(shape) for shape in (*linear_shapes(d).values(), *vector_shapes(d).values()))
    return d.num_layers * block + sum(math.prod(shape) for shape in outer_shapes(d).values())


def _shown(value: Any) -> str:
    return "" if value is None else str(value)
