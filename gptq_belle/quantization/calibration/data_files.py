"""Read a data file, as rows or as documents: JSON Lines, a JSON array or Parquet, recognised by content; else plain
text. Remarks name everything that is not used."""

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from gptq_belle.errors import InputError, one_line
from gptq_belle.quantization.calibration.messages import Document, RowError, row_content
from gptq_belle.quantization.calibration.text_files import decode_text, read_bytes

BUILTIN = "builtin"
SHOWN = 8  # names of unused fields in a remark
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson", ".jsonlines")
TEXT_SUFFIXES = (".txt", ".text", ".md", "")
TABLE_SUFFIXES = (".csv", ".tsv")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz")
SPACE = re.compile("[ \t\n\r\ufeff]*")  # files that were concatenated have byte order marks inside
OBJECT_START = re.compile(r"""\s*(\[\s*)?\{\s*["']""")
COLUMNS = frozenset(("text", "instruction", "input", "output", "target", "question", "answer", "std_answer", "prompt",
                     "response", "completion", "query", "system", "history", "messages", "conversations"))


class DataRow(NamedTuple):
    """A row, and where it is in its file, such as "line 7"; plain text is one row that is a string."""

    where: str
    value: Any


class DataFile(NamedTuple):
    """The rows of a file, and remarks on how it was read."""

    rows: list[DataRow]
    notes: list[str]


class Documents(NamedTuple):
    """The documents of a source, in its order, and remarks for the user, each a line."""

    documents: list[Document]
    notes: list[str]


def read_data_file(path: Path) -> DataFile:
    """Read all rows of a file.

    Raises:
        InputError: the file cannot be read, is neither text nor Parquet, is a table, or holds invalid JSON.
    """
    data = read_bytes(path)
    if data.startswith(b"PAR1") and data.endswith(b"PAR1"):
        return DataFile(_parquet_rows(path, data), [])
    text = decode_text(path, data)
    suffix = next((end for end in map(str.lower, reversed(path.suffixes)) if end not in COMPRESSED_SUFFIXES), "")
    if suffix in JSON_SUFFIXES or OBJECT_START.match(text):
        return DataFile(list(_json_rows(path, text)), [])
    if suffix in TABLE_SUFFIXES or _has_table_header(text):
        raise InputError(f"{path} is a table of columns (CSV or TSV), which is not read",
                         "Convert its rows to JSON Lines, or give a .txt file without a header for plain text.")
    if text.lstrip().startswith("[") and (rows := _array_rows(path, text)):
        return DataFile(rows, [])
    notes = [] if suffix in TEXT_SUFFIXES else [f"{path.name} is read as plain text, as one document"]
    return DataFile([DataRow("the text", text)] if text.strip() else [], notes)


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


def _json_rows(path: Path, text: str) -> Iterator[DataRow]:
    """The rows of a JSON array, or the values that follow one another: JSON Lines, or objects over several lines."""
    for number, (line, value, is_last) in enumerate(_json_values(path, text)):
        rows = _wrapped_rows(value) if number == 0 and is_last else None
        if rows is not None:
            yield from (DataRow(f"row {place}", row) for place, row in enumerate(rows, 1))
        else:
            yield DataRow(f"line {line}", value)


def _wrapped_rows(value: Any) -> list[Any] | None:
    """The rows of an array, or of an object with one list of rows, such as {"data": [...]}; None for a row."""
    if isinstance(value, list):
        return None if _is_conversation(value) else value
    if not isinstance(value, dict) or any(isinstance(value.get(name), str) for name in COLUMNS):
        return None
    lists = [item for item in value.values() if isinstance(item, list) and item and not _is_conversation(item)]
    return lists[0] if len(lists) == 1 else None


def _is_conversation(values: list[Any]) -> bool:
    """Whether a list is one conversation, and not a list of rows."""
    return bool(values) and all(isinstance(value, dict) and not {"role", "from", "human"}.isdisjoint(value)
                                for value in values)


def _json_values(path: Path, text: str) -> Iterator[tuple[int, Any, bool]]:
    """The first line of each JSON value, the value, and whether it is the last."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    place = _skip_space(text, 0)
    while place < len(text):
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, end = decoder.raw_decode(text, place)
        except RecursionError as error:
            raise InputError(f"{path}, line {line} is nested too deeply", "Correct or delete it.") from error
        except ValueError as error:
            raise InputError(f"{path}, line {line} is not valid JSON: {one_line(error)}",
                             'Correct or delete it; a row of plain text is {"text": "..."}.') from error
        place = _skip_space(text, end)
        yield line, value, place == len(text)


def _skip_space(text: str, place: int) -> int:
    match = SPACE.match(text, place)
    return match.end() if match else place


def _array_rows(path: Path, text: str) -> list[DataRow]:
    """The rows of a JSON array of texts or conversations; none if the text is not one: it may start with a footnote."""
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise InputError(f"{path}, line 1 is nested too deeply", "Correct or delete it.") from error
    except ValueError:
        return []
    usable = all(isinstance(row, str | list | dict) for row in found)
    return [DataRow(f"row {place}", row) for place, row in enumerate(found, 1)] if usable else []


def _has_table_header(text: str) -> bool:
    """Whether the first line holds nothing but names of columns."""
    names = [name.strip(" \"'").lower() for name in re.split("[,;\t]", text.lstrip().partition("\n")[0][:400])]
    return len(names) > 1 and COLUMNS.issuperset(names)


def _parquet_rows(path: Path, data: bytes) -> list[DataRow]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path} is a Parquet file, and pyarrow, which reads it, is not installed",
                         "Install it with pip install pyarrow, or convert the file to JSON Lines.") from error
    try:
        rows = parquet.read_table(io.BytesIO(data)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} is a damaged Parquet file: {error}", "Fetch it again.") from error
    return [DataRow(f"row {place}", row) for place, row in enumerate(rows, 1)]
