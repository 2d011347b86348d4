"""Trust, then verify: the weights that a converted directory stands for are those of its source."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from gptq_belle.checkpoint.legacy import own_quantization
from gptq_belle.checkpoint.packing import QuantizedWeight, dequantize, unpack_rows
from gptq_belle.checkpoint.quantization import Quantization, read_quantization
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.conversion.zeros import read_zeros, repaired
from gptq_belle.errors import GptqBelleError
from gptq_belle.kernels import reference
from gptq_belle.kernels.layout import canonical

COLUMNS = 1024  # outputs compared at a time: a multiple of what fills words of zero points in any number of bits
HALF_ULP, HALF_SUBNORMAL = 2.0**-11, 2.0**-25  # of rounding a scale to float16


def largest_deviation(old: CheckpointReader, files: Path, packed: Quantization, linears: Sequence[str],
                      group_index: Callable[[str], Tensor], repair: bool, step: Callable[[int], None]) -> float:
    """Compare every dequantized weight of old and new.

    The new one goes through the kernels' reading of the words, the old one through the packing module's.

    Args:
        old: the source.
        files: the directory that was written.
        packed: how the source is packed.
        linears: their names, in order.
        group_index: gives the group of each input (K,) of a linear of the source.
        repair: whether zero points of 2**bits were to become 0.
        step: called with how many blocks are done, after each.
    Returns:
        The largest difference, as a share of the largest weight of its linear.
    Raises:
        GptqBelleError: one is larger than the rounding of scales to float16 explains.
    """
    new = CheckpointReader(files)
    worst = 0.0
    blocks = [name[len(old.arch.blocks) + 1 :].split(".")[0] for name in linears]
    for place, name in enumerate(linears):
        worst = max(worst, _deviation(old, new, packed, name, group_index(name), repair))
        if place + 1 == len(linears) or blocks[place + 1] != blocks[place]:
            step(int(blocks[place]) + 1)
    return worst


def _deviation(old: CheckpointReader, new: CheckpointReader, packed: Quantization, name: str, g_idx: Tensor,
               repair: bool) -> float:
    stated = read_quantization(new)
    assert stated is not None
    ours, packed = own_quantization(stated, name), own_quantization(packed, name)
    words, scales = old.tensor(f"{name}.qweight"), old.tensor(f"{name}.scales").float()
    zeros = read_zeros(old.tensor(f"{name}.qzeros"), packed.bits, packed.checkpoint_format)
    zeros = repaired(zeros, packed.bits) if repair else zeros
    written = [new.tensor(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")]
    worst = largest = 0.0
    for begin in range(0, words.shape[1], COLUMNS):
        part = slice(begin, begin + COLUMNS)
        packed_part = slice(begin * ours.bits // 32, (begin + COLUMNS) * ours.bits // 32)
        theirs = dequantize(QuantizedWeight(unpack_rows(words[:, part], packed.bits).t().contiguous(),
                                            scales[:, part].t(), zeros[:, part].t(), g_idx.int()))
        again = reference.dequantize(canonical(written[0][:, part], written[1][:, packed_part], written[2][:, part],
                                               written[3], ours.bits, ours.zero_offset)).t()
        difference = (again - theirs).abs_()
        allowed = theirs.abs() * HALF_ULP * 1.0001 + HALF_SUBNORMAL * (1 << packed.bits)
        if not bool((difference <= allowed).all()):
            raise GptqBelleError(f"{name} read back differs by up to {float(difference.max()):.3g}",
                                 "The files were removed. Check disk and memory; if it stays, report it.")
        worst, largest = max(worst, float(difference.max())), max(largest, float(theirs.abs().max()))
    return worst / largest if largest else 0.0
