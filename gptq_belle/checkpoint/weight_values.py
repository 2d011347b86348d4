"""Check the values of a checkpoint's tensors: finite, within float16, and consistent in packed linears."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from gptq_belle.checkpoint.packed_reader import check_packed_linear
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.errors import InputError
from gptq_belle.formats.packing import unpack_rows
from gptq_belle.formats.quantize_config import Quantization
from gptq_belle.formats.zero_points import V1
from gptq_belle.models.dimensions import LinearShape

READERS = 4  # threads; each holds one chunk of a tensor
LARGEST_FLOAT16 = torch.finfo(torch.float16).max


def weight_value_problems(reader: CheckpointReader, *, half: bool) -> Iterator[InputError]:
    """Floating-point tensors with NaN or infinity, or with values that an output in float16 cannot hold.

    Every tensor is read once. The minimum and maximum of float16 take a core 1 ms per 23 MB, less than reading them.

    Args:
        reader: the directory.
        half: whether values beyond float16 are problems.
    """
    names = [name for name in reader if reader.dtype(name).is_floating_point]
    with ThreadPoolExecutor(READERS) as pool:
        extremes = pool.map(lambda name: largest_magnitude(reader, name), names)
        for name, largest in zip(names, extremes, strict=True):
            if not largest < float("inf"):
                yield InputError(f"tensor {name} of {reader.path} contains NaN or infinity",
                                 "The file is damaged: fetch it again.")
            elif half and largest > LARGEST_FLOAT16:
                yield InputError(f"tensor {name} of {reader.path} has values up to {largest:.3g}, more than 65504",
                                 "The standard format stores float16 only; this model cannot be written in it.")


def check_values(reader: CheckpointReader) -> None:
    """Raise the first problem of `weight_value_problems` of a model that will be written in float16."""
    for problem in weight_value_problems(reader, half=True):
        raise problem


def largest_magnitude(reader: CheckpointReader, name: str) -> float:
    """Largest absolute value of a tensor; NaN if it contains one, and 0 if it is empty."""
    ends = [torch.stack(torch.aminmax(chunk if chunk.itemsize > 1 else chunk.half())).double().abs().amax()
            for chunk in reader.chunks(name) if chunk.numel()]
    return float(torch.stack(ends).amax()) if ends else 0.0  # amax propagates NaN


def packed_value_problems(reader: CheckpointReader, linears: Mapping[str, LinearShape],
                          quantization: Quantization | None) -> Iterator[InputError]:
    """Inconsistent zero points, scales and group indices of packed linears.

    Args:
        reader: the directory.
        linears: (K, N) of all linears by full name.
        quantization: settings of the directory.
    """
    for name, shape in linears.items():
        if not reader.is_packed(name):
            continue
        try:
            stated = check_packed_linear(reader, quantization, name, *shape)
        except InputError:
            continue  # `validation` names it
        yield from (InputError(text, "Fetch the file again, or convert it.") for text in _values(stated, reader, name))


def _values(stated: Quantization, reader: CheckpointReader, name: str) -> Iterator[str]:
    groups = reader.shape(f"{name}.scales")[0]
    if f"{name}.g_idx" in reader:
        g_idx = reader.tensor(f"{name}.g_idx")
        if len(g_idx) == 0 or int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
            yield f"{name}: g_idx names groups outside of 0..{groups - 1}"
    elif stated.desc_act:
        yield f"{name}: the configuration says act-order, but there is no g_idx"
    zeros = unpack_rows(reader.tensor(f"{name}.qzeros").t(), stated.bits).int() + stated.zero_offset
    middle = 1 << (stated.bits - 1)
    if stated.sym and bool((zeros != middle).any()):
        other = "gptq_v2" if stated.checkpoint_format == V1 else "gptq (v1)"
        off_by_one = bool((zeros == middle + (1 if stated.checkpoint_format == V1 else -1)).all())
        yield f"{name}: zero points are not the {middle} of symmetric weights" + (
            f"; they would be under format {other}, so the file is probably labelled wrongly" if off_by_one else "")
