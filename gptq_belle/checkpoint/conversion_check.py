"""What a conversion did, and the check that the written weights are those of the source."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from gptq_belle.checkpoint.packed_reader import read_packed, read_quantization
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.errors import GptqBelleError
from gptq_belle.formats.gptq_weight import QuantizedWeight, dequantize
from gptq_belle.formats.packing import unpack_rows
from gptq_belle.formats.quantize_config import Quantization
from gptq_belle.formats.zero_points import read_zeros, repaired
from gptq_belle.kernels import reference
from gptq_belle.kernels.layout import CanonicalWeight


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


COLUMNS = 1024  # outputs compared at a time: a multiple of what fills words of zero points in any number of bits
HALF_ULP, HALF_SUBNORMAL = 2.0**-11, 2.0**-25  # of rounding a scale to float16


def largest_deviation(old: CheckpointReader, files: Path, packed: Quantization, linears: Mapping[str, nn.Linear],
                      repair: bool, step: Callable[[int], None]) -> float:
    """Compare every dequantized weight of old and new.

    The new one goes through the kernels' reading of the words, the old one through the packing module's.

    Args:
        old: the source.
        files: the directory that was written.
        packed: how the source is packed.
        linears: its packed linears by name, in order.
        repair: whether zero points of 2**bits were to become 0.
        step: called with how many blocks are done, after each.
    Returns:
        The largest difference, as a share of the largest weight of its linear.
    Raises:
        GptqBelleError: one is larger than the rounding of scales to float16 explains.
    """
    new = CheckpointReader(files)
    stated, worst = read_quantization(new), 0.0
    blocks = [name[len(old.arch.blocks) + 1 :].split(".")[0] for name in linears]
    for place, (name, linear) in enumerate(linears.items()):
        theirs, ours = (read_packed(reader, quantization, name, linear.in_features, linear.out_features)
                        for reader, quantization in ((old, packed), (new, stated)))
        worst = max(worst, _deviation(name, theirs, ours, packed.checkpoint_format, repair))
        if place + 1 == len(linears) or blocks[place + 1] != blocks[place]:
            step(int(blocks[place]) + 1)
    return worst


def _deviation(name: str, old: CanonicalWeight, new: CanonicalWeight, old_format: str, repair: bool) -> float:
    """The largest difference of one linear, as a share of its largest weight."""
    zeros = read_zeros(old.qzeros, old.bits, old_format)
    zeros, scales = (repaired(zeros, old.bits) if repair else zeros).t(), old.scales.float().t()
    worst = largest = 0.0
    for begin in range(0, old.out_features, COLUMNS):
        part = slice(begin, begin + COLUMNS)
        words_part = slice(begin * new.bits // 32, (begin + COLUMNS) * new.bits // 32)
        codes = unpack_rows(old.qweight[:, part], old.bits).t().contiguous()
        expected = dequantize(QuantizedWeight(codes, scales[part], zeros[part], old.g_idx))
        found = reference.dequantize(new._replace(
            qweight=new.qweight[:, part], qzeros=new.qzeros[:, words_part], scales=new.scales[:, part])).t()
        difference = (found - expected).abs_()
        allowed = expected.abs() * HALF_ULP * 1.0001 + HALF_SUBNORMAL * (1 << old.bits)
        if not bool((difference <= allowed).all()):
            raise GptqBelleError(f"{name} read back differs by up to {float(difference.max()):.3g}",
                                 "The files were removed. Check disk and memory; if it stays, report it.")
        worst, largest = max(worst, float(difference.max())), max(largest, float(expected.abs().max()))
    return worst / largest if largest else 0.0
