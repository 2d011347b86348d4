"""Prompts of `generate` from a file or stdin, answered in batches: JSON Lines in, JSON Lines out."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.errors import InputError, UsageError

if TYPE_CHECKING:
    from gptq_belle.engine.model import Model

STDIN = "-"
FORMAT = 'Write lines such as {"prompt": "..."}.'
Row = dict[str, Any]


def read_text(path: str) -> str:
    """The text of a file, or of stdin for "-".

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        data = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}",
                         "Give a file of JSON Lines, or - for stdin.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{'stdin' if path == STDIN else path} is not UTF-8 at byte {error.start}",
                         "Convert it to UTF-8, for example with `iconv -f GBK -t UTF-8`.") from error


def read_rows(path: str) -> list[Row]:
    """Rows of JSON Lines with a text ``prompt`` each; other fields are kept. A line can also be only the text.

    Raises:
        InputError: a line is something else; its number is given.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number} of {path} is not JSON: {error}", FORMAT) from error
        row = {"prompt": row} if isinstance(row, str) else row
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise InputError(f"line {number} of {path} has no text 'prompt'", FORMAT)
        rows.append(row)
    return rows


def answered(model: "Model", rows: list[Row], params: SamplingParams, style: str | None, batch: int) -> Iterator[Row]:
    """Yield the rows with their ``answer``, or with an ``error`` if the model cannot take the prompt.

    Args:
        style: as for `Model.generate`.
        batch: number of prompts answered at a time.
    """
    for start in range(0, len(rows), batch):
        chunk = rows[start : start + batch]
        try:
            answers = model.generate([row["prompt"] for row in chunk], params, prompt_style=style)
        except UsageError:  # one of them is too long or empty
            yield from (_answered_alone(model, row, params, style) for row in chunk)
        else:
            yield from ({**row, "answer": answer} for row, answer in zip(chunk, answers, strict=True))


def _answered_alone(model: "Model", row: Row, params: SamplingParams, style: str | None) -> Row:
    try:
        return {**row, "answer": model.generate(row["prompt"], params, prompt_style=style)}
    except UsageError as error:
        return {**row, "error": error.cause}
