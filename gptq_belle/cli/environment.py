"""What the process inherits: streams that are closed, a locale without UTF-8, and the width of the terminal."""

import os
import sys
from collections.abc import Sequence
from typing import TextIO

from gptq_belle.common.text import is_unicode
from gptq_belle.errors import UsageError

# Smallest usable terminal sizes: rich prints nothing into 0 columns, and pads its panels to any width.
SMALLEST_SIZE, LARGEST_SIZE = {"COLUMNS": 20, "TERMINAL_WIDTH": 20, "LINES": 1}, 10_000
# Commands whose results are files or a server: they run with stdout closed, as services often do.
WITHOUT_STDOUT = ("quantize", "convert", "decrypt", "report", "serve", "demo", "tune")
_closed: set[int] = set()  # descriptors of the standard streams that were closed at the start


def prepare_process() -> None:
    """Make streams, encodings and widths usable; call it before anything opens a file or prints."""
    _open_closed_streams()
    ignore_invalid_widths()
    _use_utf8_in_c_locale()


def ignore_invalid_widths() -> None:
    """Remove terminal sizes from the environment that are not a usable number, such as the COLUMNS=0 of containers."""
    for name, smallest in SMALLEST_SIZE.items():
        text = os.environ.get(name, "")
        if not (text.isascii() and text.isdecimal() and smallest <= int(text[:9]) <= LARGEST_SIZE):
            os.environ.pop(name, None)


def check_arguments(arguments: Sequence[str]) -> None:
    """Check the encoding of the command line.

    Raises:
        UsageError: an argument is not UTF-8; Python represents its bytes as lone surrogates, which no tokenizer takes.
    """
    for place, text in enumerate(arguments, 1):
        if not is_unicode(text):
            raise UsageError(f"argument {place} of the command line is not UTF-8: {os.fsencode(text)[:40]!r}",
                             "Convert it to UTF-8, for example with `iconv -f GBK -t UTF-8`.")


def require_stdout(command: str | None) -> None:
    """Check that a command can print its results.

    Raises:
        UsageError: stdout is closed, and the results of the command are not files.
    """
    if 1 in _closed and command not in WITHOUT_STDOUT:
        raise UsageError("stdout is closed, where the results would be printed", "Redirect stdout to a file.")


def require_stdin() -> None:
    """Check that there is an input.

    Raises:
        UsageError: stdin is closed.
    """
    if 0 in _closed or sys.stdin is None:
        raise UsageError("stdin is closed, where the questions would be read", "Redirect stdin from a file.")


def _open_closed_streams() -> None:
    """Open the null device for closed standard streams: otherwise the next file gets their descriptor, and what a C
    library prints would be written into it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            _closed.add(descriptor)
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or _stream(0, "r")
    sys.stdout = sys.stdout or _stream(1, "w")
    sys.stderr = sys.stderr or _stream(2, "w")


def _stream(descriptor: int, mode: str) -> TextIO:
    return open(descriptor, mode, encoding="utf-8", closefd=False)  # type: ignore[return-value]


def _use_utf8_in_c_locale() -> None:
    """Start Python again in its UTF-8 mode if the locale is ASCII, as Python itself does unless PYTHONUTF8 is 0."""
    if sys.getfilesystemencoding() == "ascii" and not sys.flags.utf8_mode:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
