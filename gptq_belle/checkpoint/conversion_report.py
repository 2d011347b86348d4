"""Report of a conversion, and the comparison of the written weights with the source."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from gptq_belle.checkpoint.packed_reader import read_packed_linear, read_quantization
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.errors import GptqBelleError
from gptq_belle.formats.gptq_weight import QuantizedWeight, dequantize
from gptq_belle.formats.packing import unpack_rows
from gptq_belle.formats.quantize_config import Quantization
from gptq_belle.formats.zero_points import repair_wrapped_zeros, unpack_zeros
from gptq_belle.kernels import reference
from gptq_belle.kernels.layout import CanonicalWeight
from gptq_belle.models.architectures import LM_HEAD


@dataclass(slots=True)
class ConversionReport:
    """Properties of the source, and changes that the conversion made.

    Attributes:
        source, out: paths as passed to `convert`.
        kind: kind of the source: "state dictionary", or "GPTQ directory", "AWQ directory", ...
        architecture: model_type.
        linears: number of packed linears.
        bits, group_size: settings of most linears; group size -1 means one group per output channel.
        symmetric: whether all zero points are 2**(bits - 1).
        act_order: whether a group index is out of order.
        read_format, written_format: "gptq" (v1) or "gptq_v2".
        wrapped_zeros: number of zero points that read as 2**bits: usually a 0 that an old packer wrapped around.
        overwritten_zeros: number of these that follow another one in the same word, so their true value is lost.
        repaired_zeros: number of zero points written as 0 instead.
        vanished_scales: number of scales too small for float16, written as 0.
        dropped_biases: number of all-zero biases of linears that have no bias in the model.
        mixed: number of linears with other bits or another group size.
        corrected_ids: special token ids of config.json that contradicted the tokenizer, with the written values.
        tied: the lm_head is the embedding and was written once.
        deviation: largest difference of a dequantized weight, relative to the largest weight of its linear.
        bytes_read, bytes_written: size of the weight files in bytes.
        seconds: wall time in seconds.
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
    corrected_ids: dict[str, int | None] = field(default_factory=dict)
    tied: bool = False
    deviation: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0


def summary_rows(found: ConversionReport) -> list[tuple[str, str]]:
    """Format a report as (name, value) pairs."""
    group = "one output channel" if found.group_size == -1 else str(found.group_size)
    order = ", act-order" if found.act_order else ""
    mixed = f"; {found.mixed} linears differ" if found.mixed else ""
    symmetric = "symmetric" if found.symmetric else "asymmetric"
    head = "tied" if found.tied else "untied"
    rows = [
        ("source", f"{found.kind}, {found.bytes_read / 1e6:,.2f} MB"),
        ("model", f"{found.architecture}, {found.linears} packed linears, {head} lm_head"),
        ("weights", f"{found.bits} bits, group size {group}, {symmetric}{order}{mixed}"),
        ("format", found.written_format + ("" if found.read_format == found.written_format
                                           else f", was {found.read_format}")),
        ("written", f"{found.bytes_written / 1e6:,.2f} MB in {found.seconds:.1f} s"),
        ("verified", f"every weight within {found.deviation:.1e} of the largest of its linear" if found.deviation
         else "every weight identical"),
    ]
    if found.dropped_biases:
        rows.append(("biases", f"{found.dropped_biases} omitted: all zero, and the model has none there"))
    if found.corrected_ids:
        ids = ", ".join(f"{key} {value}" for key, value in found.corrected_ids.items())
        rows.append(("tokens", f"corrected in config.json to match the tokenizer: {ids}"))
    if found.vanished_scales:
        rows.append(("scales", f"{found.vanished_scales} too small for float16, written as 0"))
    if found.wrapped_zeros:
        what = "written as 0" if found.repaired_zeros else "kept; --repair-zeros writes 0"
        rows.append(("zero points", f"{found.wrapped_zeros} wrapped around by an old packer, {what}"))
    if found.overwritten_zeros:
        rows.append(("", f"{found.overwritten_zeros} of them may have had another value that a neighbour overwrote"))
    return rows


COLUMNS = 1024  # outputs compared at a time; their zero points fill whole words for any number of bits
HALF_ULP, HALF_SUBNORMAL = 2.0**-11, 2.0**-25  # largest relative and absolute error of rounding a scale to float16


def largest_deviation(old: CheckpointReader, files: Path, quantization: Quantization, linears: Mapping[str, nn.Linear],
                      repair: bool, progress: Callable[[int], None]) -> float:
    """Compare every dequantized weight of the source and the output.

    The output is dequantized by the reference kernel, the source by `formats.packing`: two independent decoders.

    Args:
        quantization: how the source is packed.
        linears: its packed linears by name, in order.
        repair: whether zero points of 2**bits were written as 0.
        progress: called with the number of completed blocks after each block.
    Returns:
        The largest difference, relative to the largest weight of its linear.
    Raises:
        GptqBelleError: a difference is larger than rounding the scales to float16 explains.
    """
    new = CheckpointReader(files)
    new_quantization, worst = read_quantization(new), 0.0
    blocks = [name[len(old.arch.blocks) + 1 :].split(".")[0] for name in linears if name != LM_HEAD]
    for place, (name, linear) in enumerate(sorted(linears.items(), key=lambda item: item[0] == LM_HEAD)):
        expected, found = (read_packed_linear(reader, settings, name, linear.in_features, linear.out_features)
                           for reader, settings in ((old, quantization), (new, new_quantization)))
        worst = max(worst, _deviation(name, expected, found, quantization.checkpoint_format, repair))
        if place < len(blocks) and blocks[place + 1 : place + 2] != [blocks[place]]:
            progress(int(blocks[place]) + 1)
    return worst


def _deviation(name: str, old: CanonicalWeight, new: CanonicalWeight, old_format: str, repair: bool) -> float:
    """Largest difference of one linear, relative to its largest weight."""
    zeros = unpack_zeros(old.qzeros, old.bits, old_format)
    zeros, scales = (repair_wrapped_zeros(zeros, old.bits) if repair else zeros).t(), old.scales.float().t()
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
            raise GptqBelleError(f"{name} differs from the source by up to {float(difference.max()):.3g}",
                                 "The files were removed. Check disk and memory; if it happens again, report it.")
        worst, largest = max(worst, float(difference.max())), max(largest, float(expected.abs().max()))
    return worst / largest if largest else 0.0
