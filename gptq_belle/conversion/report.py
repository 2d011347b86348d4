"""What a conversion found and wrote."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(slots=True)
class Conversion:
    """What was found and what was written.

    Attributes:
        source, out: as given.
        kind: of the source: "state dictionary" or "GPTQ directory".
        architecture, linears, bits, group_size, symmetric, act_order: of the model; group_size is -1 for whole rows.
        read_format, written_format: "gptq" (v1) or "gptq_v2".
        wrapped_zeros: zero points that read as 2**bits, most of them a true 0 that an old packer wrapped.
        overwritten_zeros: those of them behind another in the same word, whose true value is lost.
        repaired_zeros: how many were written as 0 instead.
        vanished_scales: scales too small for float16, written as 0.
        dropped_biases: biases of zeros of layers that have none.
        mixed: linears with other bits or groups than these.
        mended_ids: ids of special tokens that config.json states otherwise than the tokenizer, as they were written.
        tied: the head is the embedding and was written once.
        deviation: largest difference of a dequantized weight, as a share of the largest weight of its linear.
        bytes_read, bytes_written: size of the weight files.
        seconds: wall time.
    """

    source: Path
    out: Path
    kind: str
    architecture: str
    linears: int
    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    read_format: str
    written_format: str
    wrapped_zeros: int
    overwritten_zeros: int
    repaired_zeros: int
    vanished_scales: int = 0
    dropped_biases: int = 0
    mixed: int = 0
    mended_ids: dict[str, int | None] = field(default_factory=dict)
    tied: bool = False
    deviation: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0


def lines(found: Conversion) -> list[tuple[str, str]]:
    """(name, value) pairs for reading."""
    group = "a whole row" if found.group_size == -1 else str(found.group_size)
    order = ", act-order" if found.act_order else ""
    mixed = f"; {found.mixed} linears otherwise" if found.mixed else ""
    symmetric = "symmetric" if found.symmetric else "asymmetric"
    head = "tied" if found.tied else "of its own"
    rows = [
        ("source", f"{found.kind}, {found.bytes_read / 1e6:,.2f} MB"),
        ("model", f"{found.architecture}, {found.linears} packed linears, head {head}"),
        ("weights", f"{found.bits} bits, group size {group}, {symmetric}{order}{mixed}"),
        ("format", f"{found.written_format}" + ("" if found.read_format == found.written_format
                                              else f", was {found.read_format}")),
        ("written", f"{found.bytes_written / 1e6:,.2f} MB in {found.seconds:.1f} s"),
        ("read back", f"every weight within {found.deviation:.1e} of its linear's largest" if found.deviation
         else "every weight the same"),
    ]
    if found.dropped_biases:
        rows.append(("biases", f"{found.dropped_biases} left out: zeros, of layers that have none"))
    if found.mended_ids:
        ids = ", ".join(f"{key} {value}" for key, value in found.mended_ids.items())
        rows.append(("tokens", f"written as the tokenizer has them, config.json said otherwise: {ids}"))
    if found.vanished_scales:
        rows.append(("scales", f"{found.vanished_scales} too small for float16, written as 0"))
    if found.wrapped_zeros:
        what = "written as 0" if found.repaired_zeros else "kept as they are; --repair-zeros writes 0"
        rows.append(("zero points", f"{found.wrapped_zeros} wrapped by an old packer, {what}"))
    if found.overwritten_zeros:
        rows.append(("", f"{found.overwritten_zeros} of them may have been others, which a neighbour overwrote"))
    return rows
