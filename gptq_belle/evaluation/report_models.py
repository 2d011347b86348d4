"""What a report shows of each model, apart from evaluations: its parts, and the record of how it was made."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gptq_belle.checkpoint.inspection import Inspection, inspect
from gptq_belle.checkpoint.reader import CheckpointReader, read_json
from gptq_belle.common.files import file_checksum
from gptq_belle.errors import InputError
from gptq_belle.evaluation.report_evaluations import Results
from gptq_belle.quantization.report import REPORT, format_tuning

BLOCK = re.compile(r"^.*?\.(\d+)\.(.+)$")
SCALARS = (str, int, float, bool)


class Cell(NamedTuple):
    """The error of one linear."""

    block: int
    linear: str
    error: float


@dataclass(frozen=True, slots=True)
class Variant:
    """One model of a report.

    Attributes:
        label: short and unique.
        path: its directory.
        full: whether it is the full-precision model.
        inspection: see `checkpoint.inspection`.
        record: its quantization_report.json; empty where there is none.
        hashes: SHA-256 of its weight files by name; empty for the full-precision model.
        results: of its evaluations.
    """

    label: str
    path: Path
    full: bool
    inspection: Inspection
    record: Mapping[str, Any]
    hashes: Mapping[str, str]
    results: Results

    @property
    def bits(self) -> str:
        """What the linears' weights take, as a word."""
        found = self.inspection.quantization
        return str(found.bits) if found else next(iter(self.inspection.dtypes), "?")

    @property
    def linears(self) -> list[dict[str, Any]]:
        """The record's rows, those that are objects with a name."""
        rows = self.record.get("linears")
        found = rows if isinstance(rows, list) else []
        return [row for row in found if isinstance(row, dict) and isinstance(row.get("name"), str)]

    def cells(self) -> list[Cell]:
        """Errors by block and linear, as far as the record has them."""
        places = ((BLOCK.match(row["name"]), row.get("error")) for row in self.linears)
        return [Cell(int(place[1]), place[2], float(error)) for place, error in places
                if place and isinstance(error, int | float) and error >= 0]


def variants(results: Mapping[Path, Results], base: Path | None) -> list[Variant]:
    """Every model of a report.

    Raises:
        InputError: a directory that is no sound model.
    """
    labels = _labels(list(results))
    return [_variant(label, path, path == base, results[path])
            for label, path in zip(labels, results, strict=True)]


def _variant(label: str, path: Path, full: bool, results: Results) -> Variant:
    found = inspect(path)
    if found.problems:
        raise InputError(f"{path}: {found.problems[0]}", f"Run `gptq-belle inspect {path}`.")
    record = read_json(path / REPORT) if (path / REPORT).is_file() else {}
    hashes = {} if full else {file.name: file_checksum(file).sha256 for file in CheckpointReader(path).files}
    return Variant(label, path, full, found, record, hashes, results)


def _labels(paths: Sequence[Path]) -> list[str]:
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def settings(variant: Variant) -> dict[str, str]:
    """How a model was made, flat and readable; what a later version adds to the record is shown as it is."""
    record = dict(variant.record)
    calibration = record.pop("calibration", None)
    seen = calibration.get("seen") if isinstance(calibration, dict) else None
    rows = {key: _shown(value) for key, value in record.items() if isinstance(value, SCALARS)}
    for name in ("settings", "versions"):
        part = record.get(name)
        rows |= {key: _shown(value) for key, value in part.items()} if isinstance(part, dict) else {}
    if isinstance(calibration, dict):
        rows |= {f"calibration {key}": _shown(value) for key, value in calibration.items() if key != "seen"}
    if isinstance(seen, str):
        rows["calibration documents"] = f"{len(seen) * 3 // 4 // 5:,}"
    notes = record.get("notes")
    if isinstance(notes, list) and notes:
        rows["notes"] = "; ".join(map(str, notes))
    winners, tuning = record.get("winners"), record.get("tuning")
    if isinstance(winners, dict) and winners:
        rows["held-out rows chose"] = ", ".join(f"{name}: {count}" for name, count in winners.items())
    if isinstance(tuning, dict):
        rows["tuning"] = format_tuning(tuning)
    return rows | {f"sha256 {name}": digest for name, digest in variant.hashes.items()}


def extra_tables(variant: Variant) -> dict[str, list[dict[str, Any]]]:
    """Lists of rows in the record that this version knows nothing of, by name."""
    known = ("linears", "phases")
    return {key: value for key, value in variant.record.items() if key not in known and isinstance(value, list)
            and value and all(isinstance(row, dict) for row in value)}


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
