"""What goes into the written file beside the blocks: embedding, norms, and the head, in float16 or packed."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gptq_belle.checkpoint.packed_head import CODES, SCALES, group_of, rounded, to_bytes
from gptq_belle.checkpoint.writer import CheckpointWriter
from gptq_belle.config import QuantConfig
from gptq_belle.errors import InputError, UsageError
from gptq_belle.models.registry import HEAD
from gptq_belle.quantization.stream import BlockStream


def write_rest(stream: BlockStream, writer: CheckpointWriter, config: QuantConfig) -> None:
    """Write every tensor outside of the blocks, some rows at a time.

    Raises:
        UsageError: the head is to be packed, and its rows are too odd for that.
        InputError: a tensor is missing, of another shape, or holds what float16 does not.
    """
    head = f"{stream.arch.before[0]}.weight" if stream.tied() else f"{HEAD}.weight"
    for number, name in enumerate(stream.rest()):
        rows = (stream.float16(name, chunk) for chunk in stream.reader.chunks(name))
        if name == head and config.head_bits != 16:
            _write_packed(stream, writer, name, rows, config.head_bits)
        else:
            writer.add_rows(f"rest-{number}.safetensors", name, stream.shape(name), rows)


def _write_packed(stream: BlockStream, writer: CheckpointWriter, name: str, rows: Iterator[Tensor], bits: int) -> None:
    """The matrix `name` as `checkpoint.packed_head` has it; only the scales of all rows are in memory at a time."""
    count, width = stream.shape(name)
    if (group := group_of(width)) is None:
        raise UsageError(f"{name} has {width} columns: too odd to be packed", "Leave --packed-head-only out.")
    scales: list[Tensor] = []

    def codes() -> Iterator[Tensor]:
        for piece in rows:
            try:
                found, scale = rounded(piece, bits, group)
            except ValueError as error:
                raise InputError(f"tensor {name}: {error}", "Check the source.") from error
            scales.append(scale)
            yield to_bytes(found, bits)

    writer.add_rows("rest-head-codes.safetensors", CODES, (count, width * bits // 8), codes(), torch.uint8)
    writer.add("rest-head-scales.safetensors", {SCALES: torch.cat(scales)})
