"""Read quantized linears of a checkpoint: their configuration, checked against the tensors; and a packed lm_head.

K = in_features, N = out_features, G = groups. Everything that loads a quantized linear does it through this module.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptq_belle.checkpoint.prefetch import prefetch
from gptq_belle.checkpoint.reader import CheckpointReader, read_json
from gptq_belle.errors import InputError
from gptq_belle.formats.gptq_weight import all_finite
from gptq_belle.formats.packed_lm_head import (
    HEAD_CODES,
    HEAD_SCALES,
    PACKED_HEAD_BITS,
    head_group_size,
    unpack_head_codes,
)
from gptq_belle.formats.quantize_config import WRONG_CONFIG, Quantization, parse_quantization
from gptq_belle.kernels.huge_pages import Allocator, MemoryPool
from gptq_belle.kernels.layout import CanonicalWeight, checked_weight

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WORDS, OPTIONAL = ("qweight", "qzeros", "scales"), ("g_idx", "bias")
PARTS = (*WORDS, *OPTIONAL)  # tensors of a quantized linear, by the last part of their names


def raw_quantization_config(reader: CheckpointReader) -> dict[str, Any] | None:
    """The quantization_config of config.json, else the content of quantize_config.json, else None.

    Raises:
        InputError: it is not an object.
    """
    path = reader.path / "quantize_config.json"
    stated = reader.config.get("quantization_config")
    if stated is None and path.is_file():
        stated = read_json(path)
    if stated is not None and not isinstance(stated, dict):
        raise InputError(f"{reader.path}: quantization_config is not an object", WRONG_CONFIG)
    return stated


def read_quantization(reader: CheckpointReader) -> Quantization | None:
    """The checked quantization of a directory; None where it states none.

    Raises:
        InputError: as `parse_quantization`.
    """
    stated = raw_quantization_config(reader)
    return None if stated is None else parse_quantization(stated, reader.path)


def check_packed_linear(reader: CheckpointReader, quantization: Quantization | None, name: str, in_features: int,
                 out_features: int) -> Quantization:
    """Check one packed linear against the configuration, from the headers of the files alone.

    Args:
        reader: the directory.
        quantization: of the directory.
        name: full name of the linear.
        in_features, out_features: as config.json gives them.
    Returns:
        The settings of this linear.
    Raises:
        InputError: no configuration, one that leaves this linear unquantized, a missing tensor, or bits, group size,
            shapes or dtypes that disagree; the message states both figures.
    """
    own = linear_quantization(reader, quantization, name)
    rows, columns = _matrix_shape(reader, f"{name}.qweight")
    groups, _ = _matrix_shape(reader, f"{name}.scales")
    if columns != out_features:
        raise InputError(f"{name} has {columns} outputs, config.json gives it {out_features}", WRONG_CONFIG)
    if rows * 32 != own.bits * in_features:
        raise InputError(f"the configuration says {own.bits} bits, but {name} has {rows} rows of words for "
                         f"{in_features} inputs: {rows * 32 / in_features:g} bits", WRONG_CONFIG)
    size = in_features if own.group_size == -1 else own.group_size
    if groups != -(-in_features // size):
        raise InputError(f"the configuration says group size {own.group_size}, but {name} has {groups} groups for "
                         f"{in_features} inputs: group size {in_features / max(groups, 1):g}", WRONG_CONFIG)
    for part, (shape, dtypes) in _expected_parts(own.bits, in_features, out_features, groups).items():
        if f"{name}.{part}" not in reader and part in OPTIONAL:
            continue
        found, dtype = reader.shape(f"{name}.{part}"), reader.dtype(f"{name}.{part}")
        if found != shape or dtype not in dtypes:
            raise InputError(f"{name}.{part} is {dtype} {found}, expected {dtypes[0]} {shape}", WRONG_CONFIG)
    return own


def linear_quantization(reader: CheckpointReader, quantization: Quantization | None, name: str) -> Quantization:
    """The settings of one packed linear.

    Raises:
        InputError: no configuration states any, or it leaves this linear unquantized.
    """
    if quantization is None:
        raise InputError(f"{reader.path} holds packed weights, but no configuration says how",
                         "Add the quantize_config.json that belongs to it.")
    own = quantization.of(name)
    if own is None:
        raise InputError(f"{reader.path}: dynamic leaves {name} unquantized, but it is packed", WRONG_CONFIG)
    return own


def read_packed_linear(reader: CheckpointReader, quantization: Quantization | None, name: str, in_features: int,
                out_features: int, read: Callable[[str], Tensor] | None = None) -> CanonicalWeight:
    """Load one packed linear, without its bias, as the file stores it.

    Args:
        reader, quantization, name, in_features, out_features: as of `check_packed_linear`.
        read: gives a tensor by name; left out, `reader.tensor`.
    Raises:
        InputError: as `check_packed_linear` and `CheckpointReader.tensor`; groups out of range; NaN or infinity in the
            scales.
    """
    own, read = check_packed_linear(reader, quantization, name, in_features, out_features), read or reader.tensor
    tensors = {part: read(f"{name}.{part}") for part in WORDS}
    if f"{name}.g_idx" in reader:
        tensors["g_idx"] = read(f"{name}.g_idx")
    return canonical_weight(tensors, own, in_features, f"{reader.path}: {name}")


def canonical_weight(tensors: Mapping[str, Tensor], quantization: Quantization, in_features: int,
                     where: str) -> CanonicalWeight:
    """Check the values of one packed linear.

    Args:
        tensors: qweight, qzeros, scales and, where the file has it, g_idx; without it, group of k = k // group size.
        quantization: the settings of this linear.
        in_features: K.
        where: begins the error message.
    Raises:
        InputError: tensors that do not fit together, groups out of range, scales with NaN or infinity.
    """
    g_idx, qweight = tensors.get("g_idx"), tensors["qweight"]
    if g_idx is None and quantization.group_size != -1:
        g_idx = torch.arange(in_features, device=qweight.device) // quantization.group_size
    try:
        return checked_weight(qweight, tensors["qzeros"], tensors["scales"], g_idx, quantization.bits,
                         quantization.zero_offset)
    except ValueError as error:
        raise InputError(f"{where}: {error}", "The file is damaged, or was not written in the GPTQ format.") from error


def _expected_parts(bits: int, in_features: int, out_features: int,
                    groups: int) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Shape and allowed dtypes of each tensor of a packed linear."""
    return {"qweight": ((in_features * bits // 32, out_features), (torch.int32,)),
            "qzeros": ((groups, out_features * bits // 32), (torch.int32,)),
            "scales": ((groups, out_features), FLOATS),
            "g_idx": ((in_features,), (torch.int32, torch.int64)),
            "bias": ((out_features,), FLOATS)}


def _matrix_shape(reader: CheckpointReader, name: str) -> tuple[int, int]:
    shape = reader.shape(name)
    if len(shape) != 2:
        raise InputError(f"tensor {name} of shape {shape} is not a matrix", "The file is damaged or of another kind.")
    return shape[0], shape[1]


def packed_lm_head_bits(reader: CheckpointReader, vocabulary: int, width: int) -> int | None:
    """Bits of the packed lm_head of a directory; None where it has none.

    Raises:
        InputError: its tensors are not those of a matrix (vocabulary, width).
    """
    if HEAD_CODES not in reader:
        return None
    shape, group = reader.shape(HEAD_CODES), head_group_size(width)
    bits = next((bits for bits in PACKED_HEAD_BITS if shape == (vocabulary, width * bits // 8)), None)
    if bits is None or group is None or reader.shape(HEAD_SCALES) != (vocabulary, width // group) or (
            reader.dtype(HEAD_CODES), reader.dtype(HEAD_SCALES)) != (torch.uint8, torch.float16):
        raise InputError(f"{reader.path}: {HEAD_CODES} of shape {shape} is no packed head of {vocabulary} x {width}",
                         "config.json belongs to other files, or the file is damaged: fetch the directory again.")
    return bits


def packed_lm_head_rows(reader: CheckpointReader, bits: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes (n, H) and scales (n, groups) of the packed lm_head, `step` rows at a time.

    Raises:
        ValueError: a scale is NaN or infinite.
    """
    count, memory = reader.shape(HEAD_CODES)[0], MemoryPool()
    parts = (range(begin, min(begin + step, count)) for begin in range(0, count, step))
    for codes, scales in prefetch(partial(_head_rows, reader, part, memory) for part in parts):
        if not all_finite(scales):
            raise ValueError(f"{HEAD_SCALES} hold NaN or infinity")
        yield unpack_head_codes(codes, bits), scales


def _head_rows(reader: CheckpointReader, rows: range, memory: Allocator) -> tuple[Tensor, Tensor]:
    return reader.rows(HEAD_CODES, rows, memory), reader.rows(HEAD_SCALES, rows, memory)
