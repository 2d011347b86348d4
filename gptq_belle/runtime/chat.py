"""BELLE's prompts, and the way from tokens to text that may be shown: whole characters, and never a stop string.

The models were tuned on one of three wordings. Answers end with eos; where a model runs on into the next question
instead, ``Human:`` is taken as its end.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gptq_belle.errors import InputError, UsageError
from gptq_belle.models.registry import architecture

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
EXTENDED_VOCABULARY = 79458  # tokens of BELLE-LLaMA-EXT-7B and -13B, which were tuned on the style with line breaks
MOST_HELD = 32  # bytes in a row that are no characters yet; SentencePiece's decoder holds back whole runs of them


@dataclass(frozen=True, slots=True)
class Style:
    """One wording of the prompt.

    Attributes:
        before: what stands in front of a question.
        after: what stands between a question and its answer.
        special_tokens: whether the tokenizer adds what it usually adds (LLaMA's BOS) in front of a conversation.
        stops: strings that end an answer and are not shown; the line breaks in front of ``Human:`` go with it.
    """

    before: str
    after: str
    special_tokens: bool = True
    stops: tuple[str, ...] = ("\n\nHuman:", "\nHuman:", "Human:")


STYLES = {
    "bloom": Style("Human: ", "\n\nAssistant:"),
    "llama": Style("Human: ", " \n\nAssistant: "),
    "newline": Style("Human: \n", "\n\nAssistant: \n", special_tokens=False),
}


class Turn(NamedTuple):
    """A question and its answer; None where the model is to give it."""

    question: str
    answer: str | None = None


def style_named(name: str) -> Style:
    """The row of STYLES.

    Raises:
        UsageError: no such style.
    """
    if name not in STYLES:
        raise UsageError(f"prompt style {name!r} is not known", f"Choose one of {', '.join(STYLES)}.")
    return STYLES[name]


def render(turns: Iterable[Turn], style: str, eos: str) -> str:
    """The text of a conversation, without BOS; each answer is followed by eos.

    Raises:
        UsageError: no such style.
    """
    frame = style_named(style)
    answers = ((turn, "" if turn.answer is None else turn.answer + eos) for turn in turns)
    return "".join(frame.before + turn.question + frame.after + answer for turn, answer in answers)


def from_messages(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Turns of a list of ``{"role": ..., "content": ...}``; a system text opens the next question.

    Raises:
        UsageError: roles other than system, user, assistant, or an answer without a question.
    """
    turns: list[Turn] = []
    system = ""
    for message in messages:
        role, content = message.get("role"), str(message.get("content", ""))
        if role == "system":
            system += content + "\n"
        elif role == "user":
            turns.append(Turn(system + content))
            system = ""
        elif role == "assistant" and turns and turns[-1].answer is None:
            turns[-1] = Turn(turns[-1].question, content)
        else:
            raise UsageError(f"a message of role {role!r} cannot stand here",
                             "Alternate user and assistant; system texts come before a question.")
    return turns


def chat_template(style: str, *, bos: bool = False) -> str:
    """The same wording as a jinja template for transformers and other runtimes.

    Args:
        style: a key of STYLES.
        bos: begin with the tokenizer's BOS: for tokenizers that add it to every text (templates are tokenized without).
    Raises:
        UsageError: no such style.
    """
    frame = style_named(style)
    return (
        ("{{ bos_token }}" if bos and frame.special_tokens else "")
        + "{% set ns = namespace(system='') %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set ns.system = ns.system + message['content'] + '\\n' %}"
        "{% elif message['role'] == 'user' %}"
        f"{{{{ {_quoted(frame.before)} + ns.system + message['content'] + {_quoted(frame.after)} }}}}"
        "{% set ns.system = '' %}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        "{% else %}{{ raise_exception('roles are system, user and assistant') }}{% endif %}"
        "{% endfor %}"
    )


def detect_style(config: Mapping[str, Any], template: str | None = None) -> str:
    """The prompt style of a model: what config.json's ``prompt_style`` says, else our chat template, else model_type
    and vocabulary.

    Raises:
        InputError: the hint is not a known style, or the architecture is not known.
    """
    hint = config.get("prompt_style")
    if hint is not None:
        if hint not in STYLES:
            raise InputError(f"config.json's prompt_style {hint!r} is not known", f"It must be one of {_names()}.")
        return str(hint)
    ours = {chat_template(style, bos=bos): style for style in STYLES for bos in (False, True)}
    usual = "newline" if config.get("vocab_size") == EXTENDED_VOCABULARY else architecture(
        config.get("model_type")).prompt_style
    return ours.get(template or "") or usual


def choose_style(config: dict[str, Any], name: str | None) -> None:
    """Write a style that the user names into a config.json, where `detect_style` finds it first; None chooses nothing.

    Raises:
        UsageError: no such style.
    """
    if name is not None:
        style_named(name)
        config["prompt_style"] = name


class WholeText:
    """Tokens in, text out, as soon as it can no longer change: byte-level tokens split Chinese characters.

    Args:
        decode: token ids to text, special tokens left out.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # the window that is decoded: some tokens of context (LLaMA drops a first space), and new ones
        self._mark = 0  # where the last whole text ended
        self._shown = ""  # the part of the window's text that was given out

    def feed(self, ids: Iterable[int]) -> str:
        """The text that is now certain and was not before."""
        self._ids += ids
        text = self._decode(self._ids[self._start:])
        whole = text.rstrip(REPLACEMENT)
        if len(text) - len(whole) > MOST_HELD:
            whole = text
        new = whole[len(self._shown):]
        self._shown = whole
        if whole == text and len(self._ids) > self._mark:
            self._start, self._mark = self._mark, len(self._ids)
            self._shown = self._decode(self._ids[self._start:])
        return new

    def finish(self) -> str:
        """What was held back: bytes that never became a character, as replacement characters."""
        text = self._decode(self._ids[self._start:])
        new, self._shown = text[len(self._shown):], text
        return new


class StopStrings:
    """Text in, text out up to the stop string that is complete first; a possible beginning of one is held back.

    Attributes:
        stopped: a stop string was met; nothing comes out any more.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The text that may be shown now."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)[1]]
        return self._release(len(self._held) - max(map(self._beginning, self._stops), default=0))

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _beginning(self, stop: str) -> int:
        """How many of the last characters are the beginning of `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)


class TextStream:
    """Tokens in, text that may be shown out: `WholeText` followed by `StopStrings`."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Iterable[str] = ()) -> None:
        self._whole = WholeText(decode)
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> bool:
        """True once a stop string was met: generation should end."""
        return self._stops.stopped

    def feed(self, ids: Iterable[int]) -> str:
        """Text that can be shown after these tokens."""
        return self._stops.feed(self._whole.feed(ids))

    def finish(self) -> str:
        """The rest, behind the last token."""
        return self._stops.feed(self._whole.finish()) + self._stops.finish()


def _quoted(text: str) -> str:
    """A jinja string literal."""
    return "'" + text.replace("\n", "\\n") + "'"


def _names() -> str:
    return ", ".join(STYLES)
