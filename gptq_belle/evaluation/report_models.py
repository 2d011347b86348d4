"""The models of a report: checkpoint, quantization record, and results of the evaluations."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gptq_belle.checkpoint.inspection import Inspection, inspect
from gptq_belle.checkpoint.reader import CheckpointReader, read_json
from gptq_belle.common.files import file_checksum
from gptq_belle.common.text import short_names
from gptq_belle.errors import InputError
from gptq_belle.evaluation.report_results import ModelResults
from gptq_belle.quantization.report import REPORT

BLOCK = re.compile(r"^.*?\.(\d+)\.(.+)$")
SCALARS = (str, int, float, bool)
DASH = "–"


class LinearError(NamedTuple):
    """Relative squared error of one linear's output."""

    block: int
    linear: str
    error: float


@dataclass(frozen=True, slots=True)
class ReportModel:
    """One model of a report."""

    label: str  # short unique name
    path: Path
    full: bool  # whether it is the full-precision model
    inspection: Inspection  # see `checkpoint.inspection`
    record: Mapping[str, Any]  # its quantization_report.json; empty if there is none
    hashes: Mapping[str, str]  # SHA-256 of its weight files by name; empty for the full-precision model
    results: ModelResults

    @property
    def bits(self) -> str:
        """Bits per weight of the linears, or the dtype of a full-precision model."""
        found = self.inspection.quantization
        return str(found.bits) if found else next(iter(self.inspection.dtypes), "?")

    @property
    def linears(self) -> list[dict[str, Any]]:
        """The record's rows of linears; rows without a name are ignored."""
        rows = self.record.get("linears")
        found = rows if isinstance(rows, list) else []
        return [row for row in found if isinstance(row, dict) and isinstance(row.get("name"), str)]

    def linear_errors(self) -> list[LinearError]:
        """The errors that the record contains, by block and linear."""
        places = ((BLOCK.match(row["name"]), row.get("error")) for row in self.linears)
        return [LinearError(int(place[1]), place[2], float(error)) for place, error in places
                if place and isinstance(error, int | float) and error >= 0]


def read_models(results: Mapping[Path, ModelResults], base: Path | None) -> list[ReportModel]:
    """Read all models of a report.

    Raises:
        InputError: a model directory has problems.
    """
    return [_read_model(label, path, path == base, results[path])
            for label, path in zip(short_names(list(results)), results, strict=True)]


def _read_model(label: str, path: Path, full: bool, results: ModelResults) -> ReportModel:
    found = inspect(path)
    if found.problems:
        raise InputError(f"{path}: {found.problems[0]}", f"Run `gptq-belle inspect {path}`.")
    record = read_json(path / REPORT) if (path / REPORT).is_file() else {}
    hashes = {} if full else {file.name: file_checksum(file).sha256 for file in CheckpointReader(path).files}
    return ReportModel(label, path, full, found, record, hashes, results)


def quantization_settings(model: ReportModel) -> dict[str, str]:
    """The settings in a model's record as texts by key; entries that this version does not know are included."""
    record = dict(model.record)
    calibration = record.pop("calibration", None)
    seen = calibration.get("seen") if isinstance(calibration, dict) else None
    rows = {key: _text(key, value) for key, value in record.items() if isinstance(value, SCALARS)}
    for name in ("settings", "versions"):
        part = record.get(name)
        rows |= {key: _text(key, value) for key, value in part.items()} if isinstance(part, dict) else {}
    if isinstance(calibration, dict):
        rows |= {f"calibration {key}": _text(key, value) for key, value in calibration.items() if key != "seen"}
    if isinstance(seen, str):
        rows["calibration documents"] = f"{len(seen) * 3 // 4 // 5:,}"
    notes = record.get("notes")
    if isinstance(notes, list) and notes:
        rows["notes"] = "; ".join(map(str, notes))
    winners = record.get("winners")
    if isinstance(winners, dict) and winners:
        rows["held-out rows chose"] = ", ".join(f"{name}: {count}" for name, count in winners.items())
    return rows | {f"SHA-256 {name}": digest for name, digest in model.hashes.items()}


def unknown_tables(model: ReportModel) -> dict[str, list[dict[str, Any]]]:
    """Tables in the record that this version does not know, by name."""
    known = ("linears", "phases")
    return {key: value for key, value in model.record.items() if key not in known and isinstance(value, list)
            and value and all(isinstance(row, dict) for row in value)}


def shown_path(path: str | Path) -> str:
    """A path for readers on other machines: only the name of an absolute one."""
    return Path(path).name if Path(path).is_absolute() else str(path)


def _text(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "✓" if value else "✗"
    if value is None or value == []:
        return DASH
    if key in ("peak_memory", "bytes_on_disk") and isinstance(value, int):
        return f"{value / 1e6:,.1f} MB"
    if isinstance(value, float):
        return f"{value:,.1f} s" if key == "seconds" else f"{value:.3g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return shown_path(value) if isinstance(value, str) else str(value)
