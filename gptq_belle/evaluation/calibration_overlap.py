"""Refuses to evaluate a checkpoint on text that it was calibrated on: the figures would be better than they are."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from gptq_belle.checkpoint.reader import read_json
from gptq_belle.errors import InputError
from gptq_belle.quantization.calibration_keys import Document, overlapping
from gptq_belle.quantization.report import REPORT

SHOWN = 5  # row numbers that a refusal names


def refuse_overlap(paths: Iterable[str | Path], text: str | Path, documents: Sequence[Document]) -> None:
    """Hold a text against what checkpoints say of their calibration; those that say nothing pass.

    Args:
        paths: model directories.
        text: what the documents came from, for the message.
        documents: chats and plain texts (see `overlap.overlapping`).
    Raises:
        InputError: some of the text was calibrated on; says how many rows, and which are the first.
    """
    for path in paths:
        seen = calibration_keys(Path(path))
        if seen is None:
            continue
        try:
            rows, total = overlapping(seen, documents)
        except ValueError as error:
            raise InputError(f"{Path(path) / REPORT}: calibration.seen is damaged: {error}",
                             "Fetch the file again, or insist with --allow-overlap.") from error
        if rows:
            first = ", ".join(map(str, rows[:SHOWN])) + (", ..." if len(rows) > SHOWN else "")
            raise InputError(f"{len(rows)} of {total} rows of {text} were calibrated on in {path}: row {first}",
                             "Leave those rows out, or insist with --allow-overlap.")


def calibration_keys(path: Path) -> str | None:
    """What a quantized directory says it was calibrated on; None where it says nothing."""
    if not (path / REPORT).is_file():
        return None
    calibration = read_json(path / REPORT).get("calibration")
    seen = calibration.get("seen") if isinstance(calibration, dict) else None
    return seen if isinstance(seen, str) else None
