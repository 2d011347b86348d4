"""Terminal output and error handling of all commands.

Results go to stdout, progress and errors to stderr. On a terminal they are formatted by rich; elsewhere they are plain
lines without line breaks.
"""

import dataclasses
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gptq_belle.cli import environment
from gptq_belle.errors import as_user_error

INTERRUPTED = 130
_verbose = False


def set_verbose(value: bool) -> bool:
    """Set whether `report` prints tracebacks."""
    global _verbose
    _verbose = value
    return value


@cache
def out() -> Console:
    """The console for results: stdout."""
    return Console(markup=False, highlight=False, emoji=False)


@cache
def err() -> Console:
    """The console for progress and errors: stderr."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


def print_line(text: str = "", style: str | None = None) -> None:
    """Print one line of results; only a terminal wraps it."""
    out().print(text, style=style, soft_wrap=not out().is_terminal)


def note(text: str, style: str | None = "dim") -> None:
    """Print one line of progress on stderr."""
    err().print(text, style=style, soft_wrap=True)


@contextmanager
def show_step(text: str) -> Iterator[None]:
    """Show the current step on stderr: a spinner on a terminal, one plain line elsewhere."""
    with show_steps() as show:
        show(text)
        yield


@contextmanager
def show_steps() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the current step on stderr: on a terminal in one line, elsewhere one line each."""
    if err().is_terminal:
        with err().status("") as status:
            yield status.update
    else:
        yield note


@contextmanager
def progress_bar(text: str, *, is_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Yield a progress callback that takes (done, total): a bar on a terminal, one line on stderr elsewhere."""
    if not err().is_terminal:
        note(text)
        yield lambda done, total: None
        return
    count = DownloadColumn() if is_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=err(), transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(value: Any) -> None:
    """Write one value as JSON to stdout: dataclasses and named tuples as objects, paths as strings, NaN as null."""
    sys.stdout.write(json.dumps(_plain(value), ensure_ascii=False, indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def print_result(value: Any, as_json: bool, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]],
                 text: int = 2) -> None:
    """Print the result of a command: as JSON, or as a table with the arguments of `print_table`."""
    print_json(value) if as_json else print_table(title, columns, rows, text)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text: int = 1) -> None:
    """Print a table on stdout: drawn on a terminal, aligned plain lines elsewhere.

    Args:
        title: one line above the table; may be empty.
        columns: column names; without any name, no header is printed.
        rows: one cell per column.
        text: number of leading columns that hold text, left-aligned; the others hold numbers, right-aligned.
    """
    if title:
        print_line(title, style="bold")
    if not out().is_terminal:
        _print_plain_table(columns, rows, text)
        return
    table = Table(show_header=any(columns), header_style="bold", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place < text else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    out().print(table)


def run(app: Callable[..., Any], args: Sequence[str] | None = None) -> NoReturn:
    """Run a typer app and exit with its exit code; an error is printed as one line of cause and one of remedy.

    Args:
        args: the command line without the program's name; None uses the command line of the process.
    """
    environment.prepare_process() if args is None else environment.ignore_invalid_widths()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # print \u4f60 on a latin-1 terminal instead of failing
    try:
        environment.check_arguments(sys.argv[1:] if args is None else args)
        app(args) if args is not None else app()
        code: int | str | None = 0
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        code = report(error)
    if code == INTERRUPTED:
        note("Interrupted.", style=None)
    sys.exit(_flush_results() or code)


def _flush_results() -> int:
    """Write what is buffered for stdout, and return an exit code: 0 if that succeeds."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes again when it exits
        return 1 if isinstance(error, BrokenPipeError) else report(error)
    return 0


def report(error: BaseException) -> int:
    """Print an error on stderr (with its traceback under -v) and return its exit code."""
    shown = as_user_error(error)
    if _verbose:
        err().print("".join(traceback.format_exception(error)), soft_wrap=True, end="")
    err().print(f"Error: {' '.join(shown.cause.split())}", style="bold red", soft_wrap=True)
    if shown.remedy:
        err().print(" ".join(shown.remedy.split()), soft_wrap=True)
    return shown.exit_code


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _print_plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], text: int) -> None:
    widths = [max(map(cell_len, column)) for column in zip(columns, *rows, strict=True)]
    for row in ([columns] if any(columns) else []) + list(rows):
        cells = []
        for place, (cell, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - cell_len(cell))
            cells.append(cell + space if place < text else space + cell)
        print_line("  ".join(cells).rstrip())
