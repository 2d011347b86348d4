"""Read the documents of a data file, for calibration and evaluation, with remarks on everything that is not used."""

from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from gptq_belle.errors import InputError
from gptq_belle.quantization.calibration.data_files import read_data_file
from gptq_belle.quantization.calibration.messages import Document, RowError, row_content

BUILTIN = "builtin"
SHOWN = 8  # names of unused fields in a remark


class Documents(NamedTuple):
    """The documents of a source, in its order, and remarks for the user, each a line."""

    documents: list[Document]
    notes: list[str]


def read_documents(source: str | Path) -> Documents:
    """Read a file: plain text (one document), JSON Lines, a JSON array or Parquet; gzip, bzip2 and xz are unpacked.

    Rows in the forms of `messages` become documents. Rows without text are left out and counted.

    Raises:
        InputError: the file is missing, empty, neither UTF-8 text nor Parquet, or has an unusable row; it is named.
    """
    path = Path(str(files("gptq_belle") / "data" / "builtin.jsonl")) if source == BUILTIN else Path(source)
    rows, notes = read_data_file(path)
    documents, empty, cut, unused = [], 0, 0, Counter[str]()
    for where, value in rows:
        try:
            content = row_content(value)
        except RowError as error:
            cause, remedy = error.args
            raise InputError(f"{path}, {where}: {cause}", remedy) from error
        unused.update(content.unused)
        if content.document is None:
            empty += 1
        else:
            documents.append(content.document)
            cut += content.cut
    if not documents:
        raise InputError(f"{path} holds no text", "Give a file with text, or with questions and answers.")
    remarks = [] if source == BUILTIN else _remarks(path, len(rows), empty, cut, unused)
    return Documents(documents, [*notes, *remarks])


def _remarks(path: Path, rows: int, empty: int, cut: int, unused: Counter[str]) -> list[str]:
    notes = []
    if empty:
        notes.append(f"{path.name}: {empty} of {rows} rows are skipped, because they have no text, question or answer")
    if cut:
        notes.append(f"{path.name}: {cut} messages at the start or end of conversations are left out, because they "
                     "have no question or no answer")
    if unused:
        names = ", ".join(f"{name} ({count})" for name, count in unused.most_common(SHOWN))
        notes.append(f"{path.name}: fields that are not used, with their number of rows: "
                     f"{names}{', ...' * (len(unused) > SHOWN)}")
    return notes


def without_repeats(documents: list[Document]) -> list[Document]:
    """The documents without those that are equal to an earlier one."""
    return list({text if isinstance(text, str) else tuple(text): text for text in documents}.values())
