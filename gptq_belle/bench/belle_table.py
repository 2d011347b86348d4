"""`bench --table belle`: the table that BELLE published of its quantized models, with our columns beside it.

From github.com/LianjiaTech/BELLE. Its sizes are GiB (for the .pt files, shapes and dtypes give 6.84 and 9.67); ours are
given in the same unit. A figure of ours is measured where a directory is given, and else the arithmetic of `plan`, and
says which.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptq_belle.bench import footprint
from gptq_belle.bench.plan import FULL, Setting, matrix_bytes, needs
from gptq_belle.checkpoint.reader import read_config, weight_files
from gptq_belle.errors import UsageError
from gptq_belle.models.dimensions import Dimensions, dimensions, linear_shapes, outer_shapes, vector_shapes

GIB = 2**30
GROUP = 128


@dataclass(frozen=True, slots=True)
class Published:
    """A row of BELLE's table: sizes in GiB, None where it states none; `config` is a key of `CONFIGS`."""

    model: str
    config: str
    bits: int
    file: float | None
    memory: float | None


TABLE = (
    Published("BELLE-7B-2M, base", "belle-7b", FULL, 27.0, 28.2),
    Published("bloom7b-2m-8bit-128g.pt", "belle-7b", 8, 9.7, 11.4),
    Published("bloom7b-2m-4bit-128g.pt", "belle-7b", 4, 6.9, 8.4),
    Published("bloom7b-0.2m-8bit-128g.pt", "belle-7b", 8, 9.7, 11.4),
    Published("bloom7b-0.2m-4bit-128g.pt", "belle-7b", 4, 6.9, 8.4),
    Published("llama7b-2m-4bit-128g.pt", "llama-7b", 4, None, 5.5),  # on an RTX 2070; the others on an A100
)


@dataclass(frozen=True, slots=True)
class Ours:
    """What stands beside a row: bytes, and the directory they were measured of; None for arithmetic."""

    file: int
    memory: int
    measured: Path | None


def file_bytes(d: Dimensions, bits: int, head_bits: int = FULL, group: int = GROUP) -> int:
    """Of the standard checkpoint's tensors. A packed linear: K N bits / 8 of codes, G N (bits / 8 + 2) of zero points
    and scales, 4 K of group index; all else in float16. With `head_bits` below FULL the embedding is packed, too, as
    in memory."""
    linears = 0
    for k, n in linear_shapes(d).values():
        groups = math.ceil(k / group)
        linears += 2 * k * n if bits == FULL else k * n * bits // 8 + groups * n * bits // 8 + 2 * groups * n + 4 * k
    vectors = sum(math.prod(shape) for shape in vector_shapes(d).values())
    outer = sum(2 * math.prod(shape) for shape in outer_shapes(d).values() if len(shape) == 1)
    matrices = 1 if d.tied else 2
    head = matrix_bytes(d.hidden_size, d.vocab_size, head_bits, Setting()) if head_bits != FULL else (
        2 * d.hidden_size * d.vocab_size)
    return d.num_layers * (linears + 2 * vectors) + outer + matrices * head


def belle_table(paths: Sequence[Path], context: int, device: str,
                progress: Callable[[str], None] = lambda text: None) -> list[tuple[Published, Ours]]:
    """Every published row with ours beside it.

    Args:
        paths: directories of models in the table; each is measured once, in a process of its own.
        context: tokens of prompt and answer that memory is counted with.
        device: as for `gptq_belle.load`.
        progress: told what begins.
    Raises:
        UsageError: a directory that belongs to no row.
        InputError, HardwareError: as `footprint.fresh`.
    """
    found: dict[tuple[str, int], Ours] = {}
    for path in paths:
        progress(f"measuring {path}")
        measured = footprint.fresh(path, device=device, prompt=context - footprint.STEPS)
        memory = measured.process_bytes if measured.cuda_bytes is None else measured.cuda_bytes
        size = sum(file.stat().st_size for file in weight_files(path))
        found[_row_of(path)] = Ours(size, memory or 0, path)
    return [(row, found.get((row.config, row.bits)) or _arithmetic(row, context, device)) for row in TABLE]


def cells(rows: Sequence[tuple[Published, Ours]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for printing."""
    columns = ["model", "file, published", "file, ours", "memory, published", "memory, ours", "ours are"]
    return columns, [[row.model, _gib(row.file), _gib(ours.file / GIB), _gib(row.memory), _gib(ours.memory / GIB),
                      "by arithmetic" if ours.measured is None else f"measured, {ours.measured}"]
                     for row, ours in rows]


def _row_of(path: Path) -> tuple[str, int]:
    config = read_config(path)
    stated = config.get("quantization_config")
    bits = int(stated.get("bits", 0)) if isinstance(stated, dict) else FULL
    d = dimensions(config)
    for row in TABLE:
        other = dimensions(read_config(row.config))
        same = (d.model_type, d.num_layers, d.hidden_size, d.vocab_size) == (
            other.model_type, other.num_layers, other.hidden_size, other.vocab_size)
        if same and row.bits == bits:
            return row.config, bits
    raise UsageError(f"{path} is none of the models in BELLE's table",
                     "Its rows are BLOOM-7B1 unquantized, in 8 and in 4 bits, and LLaMA-7B in 4 bits.")


def _arithmetic(row: Published, context: int, device: str) -> Ours:
    d = dimensions(read_config(row.config))
    kind = "cuda" if device.startswith("cuda") else "cpu"
    head = 8 if d.tied and row.bits != FULL else FULL  # the defaults of loading
    setting = Setting(row.bits, head, GROUP, device=kind)
    return Ours(file_bytes(d, row.bits), needs(d, setting, context, 1).total, None)


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size:.1f}"
