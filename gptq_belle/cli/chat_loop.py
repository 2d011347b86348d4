"""Questions, commands and streamed answers of `chat`. For piped lines only the answers go to stdout."""

import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import NamedTuple, TextIO

from gptq_belle.cli import console
from gptq_belle.cli.chat_input import Keyboard, echo_off, read_message, unquoted
from gptq_belle.cli.conversation import Conversation
from gptq_belle.common.text import count, is_unicode
from gptq_belle.errors import GptqBelleError, InputError, UsageError

# A model can write control characters, which terminals obey; only new lines and tabs are shown.
NO_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
HELP = ("Enter sends a message; Alt+Enter starts a new line, as does Enter between \"\"\" and \"\"\". Ctrl-C stops an "
        "answer, Ctrl-D exits.")


@dataclass(slots=True)
class ChatTurn:
    """One turn as printed; `seconds` is the time from the question to the last token."""

    question: str
    answer: str = ""
    tokens: int = 0
    seconds: float = 0.0
    stopped: bool = False


class Command(NamedTuple):
    """A command: what it does with a chat and the text after its name, and its line of help."""

    run: Callable[["Chat", str], None]
    help: str


class Chat:
    """A chat on a terminal or with piped messages.

    Args:
        conversation: its turns are changed.
        answers: stream for the answers.
        interactive: whether a person types the messages.
    Attributes:
        turns: everything that was asked and answered.
        ended: whether /exit was given.
    """

    def __init__(self, conversation: Conversation, answers: TextIO, interactive: bool) -> None:
        self.conversation, self.answers, self.interactive = conversation, answers, interactive
        self.turns: list[ChatTurn] = []
        self.ended = False

    def handle(self, message: str) -> None:
        """Answer a question or run a command; an empty message has no effect.

        Raises:
            InputError: a piped message is not UTF-8 (or not in the encoding of the locale).
        """
        if not is_unicode(message):
            self._refuse_encoding(message)
            return
        name, _, argument = message.strip().partition(" ")
        try:
            if not name.startswith("/"):
                self.ask(unquoted(message))
            elif name in COMMANDS:
                COMMANDS[name].run(self, argument.strip())
            else:
                raise UsageError(f"{name} is not a command", f"Commands are {', '.join(COMMANDS)}.")
        except (GptqBelleError, OSError) as error:
            console.note(str(error), style=None)

    def ask(self, question: str) -> None:
        """Stream an answer, and note its speed."""
        if not question:
            return
        turn = ChatTurn(question)
        start = time.perf_counter()
        try:
            with closing(self.conversation.ask(question)) as pieces:
                for piece in pieces:
                    turn.answer += piece
                    self.answers.write(piece.translate(NO_CONTROLS) if self.interactive else piece)
                    self.answers.flush()
        except KeyboardInterrupt:
            turn.stopped = True
        turn.seconds, turn.tokens = time.perf_counter() - start, self.conversation.tokens
        self.turns.append(turn)
        self.answers.write("\n")
        self.answers.flush()
        speed = f"{count(turn.tokens, 'token')}, {turn.tokens / max(turn.seconds, 1e-9):.1f} tokens/s"
        console.note(f"[stopped; {speed}]" if turn.stopped else f"[{speed}]")

    def regenerate(self) -> None:
        """Answer the last question again; its old answer stays if there is no new one."""
        turns = self.conversation.turns
        if not turns:
            raise UsageError("there is no question yet", "Ask one.")
        last = turns.pop()
        try:
            self.ask(last.question)
        finally:
            if not turns or turns[-1].question != last.question:
                turns.append(last)

    def set_system(self, text: str) -> None:
        """Set or remove the system prompt."""
        self.conversation.set_system(unquoted(text))
        console.note("The system prompt was set." if text else "The system prompt was removed.")

    def _refuse_encoding(self, message: str) -> None:
        """Report a message that is not UTF-8: a note if a person can type it again, else an error."""
        shown = message.strip().encode("utf-8", "surrogateescape")[:40]
        error = InputError(f"the input is not {sys.stdin.encoding.upper()}: {shown!r}",
                           "Convert it to UTF-8, for example with `iconv -f GBK -t UTF-8`.")
        if not self.interactive:
            raise error
        console.note(str(error), style=None)


def _help(chat: Chat, _: str) -> None:
    for line in (HELP, *(f"{name:8} {command.help}" for name, command in COMMANDS.items())):
        console.note(line)


def _reset(chat: Chat, _: str) -> None:
    chat.conversation.turns.clear()
    console.note("The conversation was cleared.")


def _exit(chat: Chat, _: str) -> None:
    chat.ended = True


def _path(text: str) -> Path:
    if not text:
        raise UsageError("the name of a file is missing", "For example: /save chat.json")
    return Path(text).expanduser()


def _save(chat: Chat, name: str) -> None:
    chat.conversation.save(_path(name))
    console.note(f"{count(len(chat.conversation.turns), 'turn')} saved in {name}.")


def _load(chat: Chat, name: str) -> None:
    chat.conversation.load(_path(name))
    console.note(f"{count(len(chat.conversation.turns), 'turn')} loaded from {name}.")


COMMANDS = {
    "/help": Command(_help, "show this text"),
    "/regen": Command(lambda chat, _: chat.regenerate(), "answer the last question again"),
    "/system": Command(Chat.set_system, "TEXT: set the system prompt; without text, remove it"),
    "/save": Command(_save, "FILE: save the conversation"),
    "/load": Command(_load, "FILE: continue a saved conversation"),
    "/reset": Command(_reset, "clear the conversation"),
    "/exit": Command(_exit, "end the chat"),
    "/quit": Command(_exit, "end the chat"),
}


def chat_loop(conversation: Conversation, answers: TextIO, questions: TextIO | None = None) -> list[ChatTurn]:
    """Read messages until the end of input or /exit, and answer them.

    Args:
        conversation: its turns are changed.
        answers: stream for the answers.
        questions: one message per line, or between lines with three quotes; None reads stdin.
    Returns:
        All turns.
    Raises:
        InputError: a piped message is not UTF-8 (or not in the encoding of the locale).
    """
    if questions is None and isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # such messages are reported by name
    interactive = questions is None and sys.stdin.isatty()
    chat = Chat(conversation, answers, interactive)
    if not interactive:
        lines = questions or sys.stdin
        message = (read_message(lines) or "").removeprefix("\ufeff")  # byte order mark of some editors
        while message and not chat.ended:
            chat.handle(message)
            message = "" if chat.ended else read_message(lines) or ""
        return chat.turns
    console.note(f"{conversation.model.path}, prompt style {conversation.format.name}. {HELP} /help lists commands.")
    keyboard = Keyboard(list(COMMANDS))
    with echo_off():
        while not chat.ended:
            try:
                typed = keyboard.read()
                if typed is None:
                    console.note("")  # what comes next starts on a new line
                    break
                chat.handle(typed)
            except KeyboardInterrupt:  # while typing, or just after an answer
                console.note(HELP)
    return chat.turns
