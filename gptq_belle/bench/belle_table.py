"""`bench --table belle`: the table that BELLE published for its quantized models, with our columns beside it.

From github.com/LianjiaTech/BELLE. Its sizes are GiB (shapes and dtypes of the .pt files give 6.84 and 9.67), and so are
ours. Our figures are measured if a directory is given and computed as in `plan` otherwise; the table says which.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptq_belle.bench import footprint
from gptq_belle.checkpoint.reader import read_config, weight_files
from gptq_belle.errors import UsageError
from gptq_belle.models.dimensions import dimensions
from gptq_belle.models.sizes import GROUP_SIZE, UNPACKED, MemorySettings, file_bytes, memory_use

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Published:
    """A row of BELLE's table: sizes in GiB, None if not stated; `config` is a key of `CONFIGS`."""

    model: str
    config: str
    bits: int
    file: float | None
    memory: float | None


TABLE = (
    Published("BELLE-7B-2M, base", "belle-7b", UNPACKED, 27.0, 28.2),
    Published("bloom7b-2m-8bit-128g.pt", "belle-7b", 8, 9.7, 11.4),
    Published("bloom7b-2m-4bit-128g.pt", "belle-7b", 4, 6.9, 8.4),
    Published("bloom7b-0.2m-8bit-128g.pt", "belle-7b", 8, 9.7, 11.4),
    Published("bloom7b-0.2m-4bit-128g.pt", "belle-7b", 4, 6.9, 8.4),
    Published("llama7b-2m-4bit-128g.pt", "llama-7b", 4, None, 5.5),  # measured on an RTX 2070; the others on an A100
)


@dataclass(frozen=True, slots=True)
class OurFigures:
    """Our figures for a row: bytes, and the directory that was measured; None if they are computed."""

    file: int
    memory: int
    measured: Path | None


def belle_table(paths: Sequence[Path], context: int, device: str,
                progress: Callable[[str], None] = lambda text: None) -> list[tuple[Published, OurFigures]]:
    """Compare each published row with our figures.

    Args:
        paths: directories of models in the table; each is measured once, in a separate process.
        context: tokens of prompt and answer for the memory figures.
        device: as for `gptq_belle.load`.
    Raises:
        UsageError: a directory belongs to no row.
        InputError, HardwareError: see `footprint.measure_in_new_process`.
    """
    found: dict[tuple[str, int], OurFigures] = {}
    for path in paths:
        progress(f"measuring {path}")
        measured = footprint.measure_in_new_process(path, device=device, prompt=context - footprint.STEPS)
        memory = measured.process_bytes if measured.cuda_bytes is None else measured.cuda_bytes
        size = sum(file.stat().st_size for file in weight_files(path))
        found[_row_of(path)] = OurFigures(size, memory or 0, path)
    return [(row, found.get((row.config, row.bits)) or _computed(row, context, device)) for row in TABLE]


def cells(rows: Sequence[tuple[Published, OurFigures]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for printing."""
    columns = ["model", "file, published", "file, ours", "memory, published", "memory, ours", "ours are"]
    return columns, [[row.model, _gib(row.file), _gib(ours.file / GIB), _gib(row.memory), _gib(ours.memory / GIB),
                      "computed" if ours.measured is None else f"measured, {ours.measured}"]
                     for row, ours in rows]


def _row_of(path: Path) -> tuple[str, int]:
    config = read_config(path)
    stated = config.get("quantization_config")
    bits = int(stated.get("bits", 0)) if isinstance(stated, dict) else UNPACKED
    d = dimensions(config)
    for row in TABLE:
        other = dimensions(read_config(row.config))
        same = (d.model_type, d.num_layers, d.hidden_size, d.vocab_size) == (
            other.model_type, other.num_layers, other.hidden_size, other.vocab_size)
        if same and row.bits == bits:
            return row.config, bits
    raise UsageError(f"{path} is none of the models in BELLE's table",
                     "Its rows are BLOOM-7B1 unquantized, in 8 and in 4 bits, and LLaMA-7B in 4 bits.")


def _computed(row: Published, context: int, device: str) -> OurFigures:
    d = dimensions(read_config(row.config))
    kind = "cuda" if device.startswith("cuda") else "cpu"
    head = 8 if d.tied and row.bits != UNPACKED else UNPACKED  # the defaults of loading
    settings = MemorySettings(row.bits, head, GROUP_SIZE, device=kind)
    return OurFigures(file_bytes(d, row.bits), memory_use(d, settings, context, 1).total, None)


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size:.1f}"
