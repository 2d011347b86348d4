"""Refusal of evaluation text that a checkpoint was calibrated on, which would make the results too good.

The report of a job records keys of its calibration documents in a few kilobytes, and evaluations compare with them.
A chat is identified by its questions and plain text by its sentences, each by 40 bits of a SHA-256. Two different texts
share a key with probability 10^-12; comparing a thousand rows with three thousand gives a false match in one of 350,000
cases. A follow-up question such as "And on Tuesday?" is identified together with its answer. Spaces, case, full and
half width and a final full stop make no difference; a rewritten text is not detected.
"""

import base64
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy

from gptq_belle.checkpoint.reader import read_json
from gptq_belle.errors import InputError
from gptq_belle.prompts.styles import Turn
from gptq_belle.quantization.calibration.messages import Document
from gptq_belle.quantization.report import REPORT

KEY_BYTES = 5
SHOWN = 5  # row numbers in the message of `refuse_overlap`
SHORT_QUESTION = 8  # characters; a shorter question is identified together with its answer
SHORT_SENTENCE = 12  # characters; shorter ones are headings and phrases that many texts share
SENTENCE = re.compile(r"[。！？!?\n]+|\.\s")
ROLE = re.compile(r"^(human|assistant):")


def document_keys(documents: Iterable[Document]) -> str:
    """The keys of all documents in base64, 7 characters each, sorted."""
    keys = sorted({key for document in documents for row in _rows(document) for key in row})
    return base64.b64encode(b"".join(keys)).decode("ascii")


def overlapping_rows(seen: str, documents: Iterable[Document]) -> tuple[list[int], int]:
    """Find the rows of documents that are among the keys of other documents.

    Args:
        seen: result of `document_keys`.
        documents: chats, one row each, and plain texts, one row per sentence.
    Returns:
        The numbers of the matching rows, counted from 1, and the total number of rows.
    Raises:
        ValueError: `seen` is malformed.
    """
    data = base64.b64decode(seen, validate=True)
    if len(data) % KEY_BYTES:
        raise ValueError(f"{len(data)} bytes are not a whole number of keys")
    known = {bytes(key) for key in numpy.frombuffer(data, numpy.uint8).reshape(-1, KEY_BYTES)}
    rows = [row for document in documents for row in _rows(document)]
    return [number for number, row in enumerate(rows, 1) if not known.isdisjoint(row)], len(rows)


def refuse_overlap(paths: Iterable[str | Path], text: str | Path, documents: Sequence[Document]) -> None:
    """Compare a text with the recorded calibration data of checkpoints; those without a record are accepted.

    Args:
        paths: model directories.
        text: source of the documents, for the message.
        documents: chats and plain texts (see `overlapping_rows`).
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


def _rows(document: Document) -> Iterator[list[bytes]]:
    """The keys of each row of a document."""
    if isinstance(document, str):
        sentences = (_plain(sentence) for sentence in SENTENCE.split(document))
        yield from ([_key(sentence)] for sentence in sentences if len(sentence) >= SHORT_SENTENCE)
    else:
        yield [_key(text) for place, turn in enumerate(document) if (text := _identifying_text(turn, first=place == 0))]


def _identifying_text(turn: Turn, *, first: bool) -> str:
    """The text that identifies a turn; "" for a short follow-up question."""
    question, answer = _plain(turn.question), _plain(turn.answer or "")
    if len(question) >= SHORT_QUESTION:
        return question if first else f"{question}\n{answer}"
    return f"{question}\n{answer}" if first else ""


def _plain(text: str) -> str:
    folded = "".join(unicodedata.normalize("NFKC", text).lower().split())
    return ROLE.sub("", folded).rstrip("。.!?")


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:KEY_BYTES]
