"""Quantized linears of a checkpoint: their configuration, checked against the tensors."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptq_belle.checkpoint.prefetch import ahead
from gptq_belle.checkpoint.reader import CheckpointReader, read_json
from gptq_belle.errors import InputError
from gptq_belle.formats.gptq_weight import all_finite
from gptq_belle.formats.packed_head import BITS as PACKED_HEAD_BITS
from gptq_belle.formats.packed_head import CODES, SCALES, from_bytes, group_of
from gptq_belle.formats.quantize_config import BITS, WRONG_CONFIG, Quantization, _producer
from gptq_belle.formats.zero_points import V1, V2
from gptq_belle.kernels.huge_pages import Allocator, MemoryPool

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_GROUP = 1 << 24  # more inputs than any linear has


def stated_quantization(reader: CheckpointReader) -> dict[str, Any] | None:
    """config.json's quantization_config as it stands there, else all of quantize_config.json, else None.

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
    """The quantization that config.json states, else quantize_config.json; None where neither does.

    Raises:
        InputError: another method than GPTQ, or a figure that is missing or not supported.
    """
    stated = stated_quantization(reader)
    if stated is None:
        return None
    # AutoGPTQ's file has no quant_method; `format` wins over `checkpoint_format`; without either it is v1.
    _expect(reader, "quant_method", stated.get("quant_method", "gptq"), ("gptq",))
    _expect(reader, "pack_dtype", stated.get("pack_dtype", "int32"), ("int32",))
    checkpoint_format = stated.get("format") or stated.get("checkpoint_format") or V1
    _expect(reader, "format", checkpoint_format, (V1, V2))
    _expect(reader, "bits", stated.get("bits"), BITS)
    _expect_group(reader, stated.get("group_size"))
    return Quantization(stated["bits"], stated["group_size"], stated.get("sym"), bool(stated.get("desc_act")),
                        checkpoint_format, _producer(stated), _rules(reader, stated.get("dynamic")))


def check_geometry(reader: CheckpointReader, name: str, quantization: Quantization, inputs: int, outputs: int) -> None:
    """Hold the configuration's bits and group size against the shapes of one packed linear (headers only).

    Args:
        name: of the linear.
        inputs, outputs: in_features and out_features that config.json gives it.
    Raises:
        InputError: they disagree; the message states both figures.
    """
    rows, columns = _matrix(reader, f"{name}.qweight")
    groups, _ = _matrix(reader, f"{name}.scales")
    if columns != outputs:
        raise InputError(f"{name} has {columns} outputs, config.json gives it {outputs}", WRONG_CONFIG)
    if rows * 32 != quantization.bits * inputs:
        raise InputError(f"the configuration says {quantization.bits} bits, but {name} has {rows} rows of words for "
                         f"{inputs} inputs: {rows * 32 / inputs:g} bits", WRONG_CONFIG)
    size = inputs if quantization.group_size == -1 else quantization.group_size
    if groups != -(-inputs // size):
        raise InputError(f"the configuration says group size {quantization.group_size}, but {name} has {groups} groups "
                         f"for {inputs} inputs: group size {inputs / max(groups, 1):g}", WRONG_CONFIG)
    for part, (shape, dtypes) in _parts(quantization.bits, inputs, outputs, groups).items():
        if f"{name}.{part}" not in reader and part in ("g_idx", "bias"):
            continue
        found, dtype = reader.shape(f"{name}.{part}"), reader.dtype(f"{name}.{part}")
        if found != shape or dtype not in dtypes:
            raise InputError(f"{name}.{part} is {dtype} {found}, expected {dtypes[0]} {shape}", WRONG_CONFIG)


def _parts(bits: int, inputs: int, outputs: int,
           groups: int) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Shape and allowed dtypes of each tensor of a packed linear."""
    return {"qweight": ((inputs * bits // 32, outputs), (torch.int32,)),
            "qzeros": ((groups, outputs * bits // 32), (torch.int32,)),
            "scales": ((groups, outputs), FLOATS),
            "g_idx": ((inputs,), (torch.int32, torch.int64)),
            "bias": ((outputs,), FLOATS)}


def _matrix(reader: CheckpointReader, name: str) -> tuple[int, int]:
    shape = reader.shape(name)
    if len(shape) != 2:
        raise InputError(f"tensor {name} of shape {shape} is not a matrix", "The file is damaged or of another kind.")
    return shape[0], shape[1]


def _expect(reader: CheckpointReader, key: str, value: object, allowed: tuple[object, ...]) -> None:
    if isinstance(value, bool) or value not in allowed:
        raise InputError(f"{reader.path}: {key} {value!r} of the quantization is not supported",
                         f"It must be one of {', '.join(map(str, allowed))}.")


def _expect_group(reader: CheckpointReader, value: object) -> None:
    if type(value) is not int or not (value == -1 or 1 <= value <= LARGEST_GROUP):
        raise InputError(f"{reader.path}: group_size {str(value)[:40]!r} is not supported", "Expected -1 or a count.")


def _rules(reader: CheckpointReader, dynamic: object) -> tuple[tuple[str, dict[str, Any] | None], ...]:
    """`Quantization.rules` from GPTQModel's ``dynamic``: "+:", "-:" or nothing, and an expression."""
    if dynamic is None:
        return ()
    if not isinstance(dynamic, dict) or not all(isinstance(values, dict) for values in dynamic.values()):
        raise InputError(f"{reader.path}: dynamic is not an object of objects", WRONG_CONFIG)
    rules: list[tuple[str, dict[str, Any] | None]] = []
    for key, values in dynamic.items():
        if "bits" in values:
            _expect(reader, "bits", values["bits"], BITS)
        if "group_size" in values:
            _expect_group(reader, values["group_size"])
        kept = {name: values[name] for name in ("bits", "group_size", "sym", "desc_act") if name in values}
        rules.append((key.removeprefix("-:").removeprefix("+:"), None if key.startswith("-:") else kept))
    return tuple(rules)


def stored_bits(reader: CheckpointReader, vocabulary: int, width: int) -> int | None:
    """Bits of a head that a directory holds packed; None where it holds none.

    Raises:
        InputError: its tensors are not those of a matrix (vocabulary, width).
    """
    if CODES not in reader:
        return None
    shape, group = reader.shape(CODES), group_of(width)
    bits = next((bits for bits in PACKED_HEAD_BITS if shape == (vocabulary, width * bits // 8)), None)
    if bits is None or group is None or reader.shape(SCALES) != (vocabulary, width // group) or (
            reader.dtype(CODES), reader.dtype(SCALES)) != (torch.uint8, torch.float16):
        raise InputError(f"{reader.path}: {CODES} of shape {shape} is no packed head of {vocabulary} x {width}",
                         "config.json belongs to other files, or the file is damaged: fetch the directory again.")
    return bits


def stored_rows(reader: CheckpointReader, bits: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes (n, H) and scales (n, groups) of a stored head, `step` rows at a time.

    Raises:
        ValueError: a scale is NaN or infinite.
    """
    count = reader.shape(CODES)[0]
    parts = (range(begin, min(begin + step, count)) for begin in range(0, count, step))
    memory = MemoryPool()
    for codes, scales in ahead(partial(_stored, reader, part, memory) for part in parts):
        if not all_finite(scales):
            raise ValueError(f"{SCALES} hold NaN or infinity")
        yield from_bytes(codes, bits), scales


def _stored(reader: CheckpointReader, rows: range, memory: Allocator) -> tuple[Tensor, Tensor]:
    return reader.rows(CODES, rows, memory), reader.rows(SCALES, rows, memory)
