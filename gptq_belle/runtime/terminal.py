"""`chat` in a terminal: several turns in BELLE's wording, streamed, and stopped where the model would ask itself.

Works with a keyboard and with lines piped in; then nothing but answers goes to stdout.
"""

import sys
import time
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, TextIO

from gptq_belle import console
from gptq_belle.errors import UsageError
from gptq_belle.runtime.chat import Turn, render, style_named
from gptq_belle.runtime.engine import Model

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."
ANSWER_ROOM = 128  # tokens kept free for an answer where its length has no limit


@dataclass(slots=True)
class Exchange:
    """One turn as it was shown: `tokens` counts those of the answer's text, `seconds` its whole time."""

    question: str
    answer: str = ""
    tokens: int = 0
    seconds: float = 0.0
    stopped: bool = False


class Conversation:
    """Turns with a model; the oldest are forgotten when the context is full.

    Args:
        model: from `gptq_belle.load`.
        style: "auto" or a key of `runtime.chat.STYLES`.
        sampling: fields of `runtime.sampling.SamplingParams`.
    Raises:
        UsageError: no such style.
    """

    def __init__(self, model: Model, style: str = "auto", **sampling: Any) -> None:
        self.model, self.sampling = model, sampling
        self.name = model.prompt_style if style == "auto" else style
        self.style = style_named(self.name)
        self.turns: list[Turn] = []

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer in pieces. Closed early, what came so far counts as the answer; a turn without any is forgotten.

        Raises:
            UsageError: the question alone does not fit into the context.
        """
        self.turns.append(Turn(question))
        answer = ""
        try:
            for piece in self.model.stream(self._prompt(), **self.sampling, stop=self.style.stops):
                answer += piece
                yield piece
        finally:
            self.turns[-1:] = [Turn(question, answer)] if answer else []

    def _prompt(self) -> list[int]:
        """Token ids of the turns; old ones are dropped until an answer has room."""
        tokenizer = self.model.tokenizer
        room = self.sampling.get("max_new_tokens") or ANSWER_ROOM
        while True:
            text = render(self.turns, self.name, tokenizer.eos_token)
            ids: list[int] = tokenizer(text, add_special_tokens=self.style.special_tokens)["input_ids"]
            limit = self.model.context
            if limit is None or len(ids) + room <= limit or len(self.turns) == 1:
                return ids
            del self.turns[0]


def chat(conversation: Conversation, answers: TextIO, questions: TextIO | None = None) -> list[Exchange]:
    """Read questions until the end of input or /exit, and answer them.

    Args:
        conversation: its turns are those that /reset forgets.
        answers: where answers are streamed to.
        questions: lines to answer; None reads stdin, with a prompt where that is a terminal.
    Returns:
        what was said.
    """
    interactive = questions is None and sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
        console.note(f"{conversation.model.path}, prompt style {conversation.name}. {HELP}")
    said: list[Exchange] = []
    while (line := _next_line(interactive, questions or sys.stdin)) is not None:
        match line.strip():
            case "":
                continue
            case "/exit" | "/quit":
                break
            case "/reset":
                conversation.turns.clear()
                console.note("The conversation is forgotten.")
            case command if command.startswith("/"):
                console.note(f"There is no command {command.split()[0]}. {HELP}")
            case question:
                said.append(_answer(conversation, question, answers))
    return said


def _next_line(interactive: bool, questions: TextIO) -> str | None:
    """The next line; None at the end of input. Ctrl-C gives up the line that is being typed."""
    if not interactive:
        return questions.readline() or None
    while True:
        try:
            return input("> ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            console.note(HELP)


def _answer(conversation: Conversation, question: str, answers: TextIO) -> Exchange:
    exchange = Exchange(question)
    began = time.perf_counter()
    try:
        with closing(conversation.ask(question)) as pieces:
            for piece in pieces:
                exchange.answer += piece
                answers.write(piece)
                answers.flush()
    except KeyboardInterrupt:
        exchange.stopped = True
    except UsageError as error:
        console.note(str(error), style=None)
        return exchange
    exchange.seconds = time.perf_counter() - began
    answers.write("\n")
    answers.flush()
    tokenizer = conversation.model.tokenizer
    exchange.tokens = len(tokenizer(exchange.answer, add_special_tokens=False)["input_ids"])
    speed = f"{exchange.tokens} tokens, {exchange.tokens / max(exchange.seconds, 1e-9):.1f} tokens/s"
    console.note(f"[stopped; {speed}]" if exchange.stopped else f"[{speed}]")
    return exchange
