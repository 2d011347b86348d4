"""A conversation in a terminal. Answers are streamed and end where the model would start the next question.

Questions come from the keyboard or from piped lines; for piped lines only the answers go to stdout.
"""

import sys
import time
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from io import TextIOWrapper
from typing import TextIO

from gptq_belle.cli import console
from gptq_belle.common.text import count, is_unicode
from gptq_belle.engine.logits_model import DEFAULT_MAX_NEW_TOKENS
from gptq_belle.engine.model import Model
from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.errors import InputError, UsageError
from gptq_belle.prompts.conversation import messages_from_turns
from gptq_belle.prompts.stop_strings import TextStream
from gptq_belle.prompts.styles import Turn

HELP = "/reset clears the conversation, /exit or Ctrl-D exits, Ctrl-C stops an answer, /help shows this text."
ANSWER_ROOM = 128  # tokens reserved for an answer: older turns are dropped until they are free


@dataclass(slots=True)
class ChatTurn:
    """One turn as printed; `seconds` is the time from the question to the last token."""

    question: str
    answer: str = ""
    tokens: int = 0
    seconds: float = 0.0
    stopped: bool = False


class Conversation:
    """Turns with a model; the oldest are dropped when the context is full.

    Args:
        model: from `gptq_belle.load`.
        style: "auto" or a key of `prompts.styles.STYLES`.
        params: sampling parameters.
    Attributes:
        turns: completed turns.
        tokens: number of tokens of the last answer, including those of a stop string.
    Raises:
        UsageError: an unknown style.
    """

    def __init__(self, model: Model, style: str, params: SamplingParams) -> None:
        self.model, self.params = model, params
        self.format = model.chat_format(style)
        self.turns: list[Turn] = []
        self.tokens = 0

    def ask(self, question: str) -> Generator[str, None, None]:
        """Yield the answer in pieces. If closed early, the turn keeps the text so far; a turn without text is dropped.

        Raises:
            UsageError: the question leaves no room for an answer in the context.
        """
        ids, room = self._prompt(question)
        tokenizer = self.model.tokenizer
        text = TextStream(lambda new: str(tokenizer.decode(
            new, skip_special_tokens=True, clean_up_tokenization_spaces=False)), self.format.stops,
            self.params.min_tokens)
        answer, self.tokens = "", 0
        try:
            for token in self.model.tokens(ids, room, self.params):
                self.tokens += 1
                if piece := text.feed([token]):
                    answer += piece
                    yield piece
                if text.stopped:
                    break
            if piece := text.finish():
                answer += piece
                yield piece
        finally:
            if answer:
                self.turns.append(Turn(question, answer))

    def _prompt(self, question: str) -> tuple[list[int], int]:
        """Token ids of the turns and the question, and the answer's token limit; old turns are dropped to make room."""
        context = self.model.context
        limit = self.params.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        enough = min(limit, ANSWER_ROOM)
        while True:
            ids = self.format.prompt(messages_from_turns([*self.turns, Turn(question)])).ids
            room = limit if context is None else min(limit, context - len(ids))
            if room >= enough or not self.turns:
                break
            del self.turns[0]
        if room < 1:
            raise UsageError(f"a question of {len(ids)} tokens does not fit into this model's {context}",
                             "Ask a shorter one.")
        return ids, room


def chat_loop(conversation: Conversation, answers: TextIO, questions: TextIO | None = None) -> list[ChatTurn]:
    """Read questions until the end of input or /exit, and answer them.

    Args:
        conversation: /reset clears its turns.
        answers: stream for the answers.
        questions: one question per line; None reads stdin, with a prompt if it is a terminal.
    Returns:
        All turns.
    Raises:
        InputError: a piped line is not UTF-8 (or not in the encoding of the locale).
    """
    if questions is None and isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # `_refuse_encoding` reports such lines
    interactive = questions is None and sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
        console.note(f"{conversation.model.path}, prompt style {conversation.format.name}. {HELP}")
    turns: list[ChatTurn] = []
    number = 0
    while True:
        try:
            line = _next_line(interactive, questions or sys.stdin)
            if line is None or line.strip() in ("/exit", "/quit"):
                return turns
            number += 1
            if not is_unicode(line):
                _refuse_encoding(line, number, interactive)
                continue
            if number == 1:
                line = line.removeprefix("\ufeff")  # byte order mark of some editors
            _handle_line(conversation, line.strip(), answers, turns)
        except KeyboardInterrupt:  # while typing, or just after an answer
            if not interactive:
                raise
            print()
            console.note(HELP)


def _handle_line(conversation: Conversation, line: str, answers: TextIO, turns: list[ChatTurn]) -> None:
    """Answer a question or run a command; an empty line has no effect."""
    if line == "/reset":
        conversation.turns.clear()
        console.note("The conversation was cleared.")
    elif line == "/help":
        console.note(HELP)
    elif line.startswith("/"):
        console.note(f"Unknown command {line.split()[0]}. {HELP}")
    elif line:
        turns.append(_answer(conversation, line, answers))


def _refuse_encoding(line: str, number: int, interactive: bool) -> None:
    """Report a line that is not UTF-8: a note if a person can type it again, else an error."""
    shown = line.strip().encode("utf-8", "surrogateescape")[:40]
    error = InputError(f"line {number} of the input is not {sys.stdin.encoding.upper()}: {shown!r}",
                       "Convert it to UTF-8, for example with `iconv -f GBK -t UTF-8`.")
    if not interactive:
        raise error
    console.note(str(error), style=None)


def _next_line(interactive: bool, questions: TextIO) -> str | None:
    """The next line; None at the end of input."""
    if not interactive:
        return questions.readline() or None
    try:
        return input("> ")
    except EOFError:
        print()
        return None


def _answer(conversation: Conversation, question: str, answers: TextIO) -> ChatTurn:
    turn = ChatTurn(question)
    start = time.perf_counter()
    try:
        with closing(conversation.ask(question)) as pieces:
            for piece in pieces:
                turn.answer += piece
                answers.write(piece)
                answers.flush()
    except KeyboardInterrupt:
        turn.stopped = True
    except UsageError as error:
        console.note(str(error), style=None)
        return turn
    turn.seconds, turn.tokens = time.perf_counter() - start, conversation.tokens
    answers.write("\n")
    answers.flush()
    speed = f"{count(turn.tokens, 'token')}, {turn.tokens / max(turn.seconds, 1e-9):.1f} tokens/s"
    console.note(f"[stopped; {speed}]" if turn.stopped else f"[{speed}]")
    return turn
