"""Messages for `chat`: typed on a terminal, or lines of a stream.

Lines from one that starts with three quotes to one that ends with them are one message.
"""

import os
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output
from prompt_toolkit.output.plain_text import PlainTextOutput
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.utils import is_dumb_terminal

QUOTES = '"""'


def is_open(text: str) -> bool:
    """Whether a message starts with three quotes, and the closing ones are still missing."""
    text = text.strip()
    return text.startswith(QUOTES) and not (len(text) >= 2 * len(QUOTES) and text.endswith(QUOTES))


def unquoted(text: str) -> str:
    """A message without the three quotes around it, and without white space at its ends."""
    text = text.strip()
    return text.removeprefix(QUOTES).removesuffix(QUOTES).strip() if text.startswith(QUOTES) else text


def read_message(lines: TextIO) -> str | None:
    """The next message of a stream; None at its end."""
    text = lines.readline()
    while text and is_open(text) and (line := lines.readline()):
        text += line
    return text or None


class Keyboard:
    """Messages that are typed on a terminal, with a history and completion of commands.

    Enter sends; a new line is Alt+Enter, or Enter after opening quotes. A paste is not sent before Enter is pressed.

    Args:
        commands: words to complete.
    """

    def __init__(self, commands: list[str]) -> None:
        self._session: PromptSession[str] = PromptSession(
            multiline=True, history=_history(), key_bindings=_keys(), output=_output(), prompt_continuation="  ",
            completer=WordCompleter(commands, sentence=True), complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE, reserve_space_for_menu=0)

    def read(self) -> str | None:
        """The next message; None after Ctrl-D.

        Raises:
            KeyboardInterrupt: Ctrl-C.
        """
        try:
            return self._session.prompt([("ansigreen", "> ")])
        except EOFError:
            return None


def _output() -> Output:
    """The terminal on stderr; stdout is for answers."""
    if is_dumb_terminal():
        return PlainTextOutput(sys.stderr)
    output = Vt100_Output.from_pty(sys.stderr, term=os.environ.get("TERM"))
    output.enable_cpr = False  # terminals would report the cursor's position while the model writes
    return output


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    """Messages of earlier chats, in a file that only its owner can read."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "gptq_belle"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(folder / "chat_history", os.O_RDWR | os.O_CREAT, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(folder / "chat_history")


@contextmanager
def echo_off() -> Iterator[None]:
    """Do not show keys that are pressed while the model writes; the next prompt reads them."""
    before = termios.tcgetattr(sys.stdin)
    quiet = termios.tcgetattr(sys.stdin)
    quiet[0] &= ~termios.ICRNL  # Enter stays Enter
    quiet[3] = quiet[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH  # Ctrl-C drops nothing
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
