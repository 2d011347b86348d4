"""Refusal of evaluation text that a checkpoint was calibrated on, which would make the results too good."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from gptq_belle.checkpoint.reader import read_json
from gptq_belle.errors import InputError
from gptq_belle.quantization.calibration_keys import overlapping_rows
from gptq_belle.quantization.calibration_messages import Document
from gptq_belle.quantization.report import REPORT

SHOWN = 5  # row numbers in the message


def refuse_overlap(paths: Iterable[str | Path], text: str | Path, documents: Sequence[Document]) -> None:
    """Compare a text with the recorded calibration data of checkpoints; those without a record are accepted.

    Args:
        paths: model directories.
        text: source of the documents, for the message.
        documents: chats and plain texts (see `calibration_keys.overlapping_rows`).
    Raises:
        InputError: a checkpoint was calibrated on some of the text; names the number of rows and the first of them.
    """
    for path in paths:
        seen = recorded_keys(Path(path))
        if seen is None:
            continue
        try:
            rows, total = overlapping_rows(seen, documents)
        except ValueError as error:
            raise InputError(f"{Path(path) / REPORT}: calibration.seen is damaged: {error}",
                             "Fetch the file again, or use --allow-overlap.") from error
        if rows:
            first = ", ".join(map(str, rows[:SHOWN])) + (", ..." if len(rows) > SHOWN else "")
            raise InputError(f"{len(rows)} of {total} rows of {text} were calibrated on in {path}: row {first}",
                             "Remove those rows, or use --allow-overlap.")


def recorded_keys(path: Path) -> str | None:
    """The keys of the calibration data of a quantized directory; None if none are recorded."""
    if not (path / REPORT).is_file():
        return None
    calibration = read_json(path / REPORT).get("calibration")
    seen = calibration.get("seen") if isinstance(calibration, dict) else None
    return seen if isinstance(seen, str) else None
