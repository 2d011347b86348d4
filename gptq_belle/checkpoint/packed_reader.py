"""Read packed linears and a packed lm_head, and check their tensors against the configuration.

K = in_features, N = out_features, G = groups. All loading of packed linears goes through this module.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptq_belle.checkpoint.prefetch import prefetch
from gptq_belle.checkpoint.reader import CheckpointReader, read_json
from gptq_belle.errors import InputError
from gptq_belle.formats.foreign_config import as_gptq
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
    """Read the quantization_config of config.json, else quantize_config.json; None if there is neither.

    Other methods' settings are returned in GPTQ's terms, which describe the tensors that the reader returns.

    Raises:
        InputError: it is not a JSON object; see `as_gptq`.
    """
    path = reader.path / "quantize_config.json"
    stated = reader.config.get("quantization_config")
    if stated is None and path.is_file():
        stated = read_json(path)
    if stated is not None and not isinstance(stated, dict):
        raise InputError(f"{reader.path}: quantization_config is not an object", WRONG_CONFIG)
    return None if stated is None else as_gptq(stated, reader.path)


def read_quantization(reader: CheckpointReader) -> Quantization | None:
    """Read and validate the quantization settings of a directory; None if it has none.

    Raises:
        InputError: see `parse_quantization`.
    """
    stated = raw_quantization_config(reader)
    return None if stated is None else parse_quantization(stated, reader.path)


def check_packed_linear(reader: CheckpointReader, quantization: Quantization | None, name: str, in_features: int,
                        out_features: int) -> Quantization:
    """Check one packed linear against the configuration by the headers of the files.

    Args:
        name: full name of the linear.
        in_features, out_features: sizes according to config.json.
    Returns:
        The settings of this linear.
    Raises:
        InputError: there is no configuration, it excludes this linear, a tensor is missing, or bits, group size, shapes
            or dtypes contradict it; the message states both values.
    """
    own = linear_quantization(reader, quantization, name)
    rows, columns = _matrix_shape(reader, f"{name}.qweight")
    groups, _ = _matrix_shape(reader, f"{name}.scales")
    if columns != out_features:
        raise InputError(f"{name} has {columns} outputs, but config.json requires {out_features}", WRONG_CONFIG)
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
    """Return the settings of one packed linear.

    Raises:
        InputError: there is no configuration, or it excludes this linear.
    """
    if quantization is None:
        raise InputError(f"{reader.path} contains packed weights, but no quantization_config",
                         "Add the quantize_config.json that belongs to it.")
    own = quantization.for_linear(name)
    if own is None:
        raise InputError(f"{reader.path}: dynamic excludes {name} from quantization, but it is packed", WRONG_CONFIG)
    return own


def read_packed_linear(reader: CheckpointReader, quantization: Quantization | None, name: str, in_features: int,
                       out_features: int, read: Callable[[str], Tensor] | None = None) -> CanonicalWeight:
    """Load one packed linear, without its bias, in the layout of the file.

    Args:
        reader, quantization, name, in_features, out_features: see `check_packed_linear`.
        read: function that reads a tensor by name; default: `reader.tensor`.
    Raises:
        InputError: see `check_packed_linear` and `CheckpointReader.tensor`; a group is out of range, or the scales
            contain NaN or infinity.
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
        tensors: qweight, qzeros, scales and optionally g_idx; default: g_idx[k] = k // group size.
        quantization: settings of this linear.
        in_features: K.
        where: start of the error message.
    Raises:
        InputError: inconsistent shapes, a group out of range, or NaN or infinity in the scales.
    """
    g_idx, qweight = tensors.get("g_idx"), tensors["qweight"]
    if g_idx is None and quantization.group_size != -1:
        g_idx = torch.arange(in_features, device=qweight.device) // quantization.group_size
    try:
        return checked_weight(qweight, tensors["qzeros"], tensors["scales"], g_idx, quantization.bits,
                              quantization.zero_offset)
    except ValueError as error:
        raise InputError(f"{where}: {error}", "The file is damaged, or not in the GPTQ format.") from error


def _expected_parts(bits: int, in_features: int, out_features: int,
                    groups: int) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Shapes and allowed dtypes of the tensors of a packed linear."""
    return {"qweight": ((in_features * bits // 32, out_features), (torch.int32,)),
            "qzeros": ((groups, out_features * bits // 32), (torch.int32,)),
            "scales": ((groups, out_features), FLOATS),
            "g_idx": ((in_features,), (torch.int32, torch.int64)),
            "bias": ((out_features,), FLOATS)}


def _matrix_shape(reader: CheckpointReader, name: str) -> tuple[int, int]:
    shape = reader.shape(name)
    if len(shape) != 2:
        raise InputError(f"tensor {name} of shape {shape} is not a matrix",
                         "The file is damaged, or not in the GPTQ format.")
    return shape[0], shape[1]


def packed_lm_head_bits(reader: CheckpointReader, vocabulary: int, width: int) -> int | None:
    """Bits of the packed lm_head of a directory; None if it has none.

    Args:
        vocabulary, width: shape of the matrix according to config.json.
    Raises:
        InputError: its tensors do not match this shape.
    """
    if HEAD_CODES not in reader:
        return None
    shape, group = reader.shape(HEAD_CODES), head_group_size(width)
    bits = next((bits for bits in PACKED_HEAD_BITS if shape == (vocabulary, width * bits // 8)), None)
    if bits is None or group is None or reader.shape(HEAD_SCALES) != (vocabulary, width // group) or (
            reader.dtype(HEAD_CODES), reader.dtype(HEAD_SCALES)) != (torch.uint8, torch.float16):
        raise InputError(f"{reader.path}: {HEAD_CODES} of shape {shape} is not a packed head of {vocabulary} x {width}",
                         "config.json belongs to other files, or the file is damaged: fetch the directory again.")
    return bits


def packed_lm_head_rows(reader: CheckpointReader, bits: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Read codes (n, H) and scales (n, groups) of the packed lm_head, `step` rows at a time.

    Raises:
        ValueError: the scales contain NaN or infinity.
    """
    count, memory = reader.shape(HEAD_CODES)[0], MemoryPool()
    parts = (range(begin, min(begin + step, count)) for begin in range(0, count, step))
    for codes, scales in prefetch(partial(_head_rows, reader, part, memory) for part in parts):
        if not all_finite(scales):
            raise ValueError(f"{HEAD_SCALES} contains NaN or infinity")
        yield unpack_head_codes(codes, bits), scales


def _head_rows(reader: CheckpointReader, rows: range, allocator: Allocator) -> tuple[Tensor, Tensor]:
    return reader.rows(HEAD_CODES, rows, allocator), reader.rows(HEAD_SCALES, rows, allocator)
