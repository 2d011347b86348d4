"""BELLE's prompts, and the way from tokens to text that may be shown: whole characters, and never a stop string.

The models were tuned on one of three wordings. Answers end with eos; where a model runs on into the next question
instead, ``Human:`` is taken as its end.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gptq_belle.errors import InputError, UsageError
from gptq_belle.models.architectures import architecture

EXTENDED_VOCABULARY = 79458  # tokens of BELLE-LLaMA-EXT-7B and -13B, which were tuned on the style with line breaks


@dataclass(frozen=True, slots=True)
class PromptStyle:
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
    "bloom": PromptStyle("Human: ", "\n\nAssistant:"),
    "llama": PromptStyle("Human: ", " \n\nAssistant: "),
    "newline": PromptStyle("Human: \n", "\n\nAssistant: \n", special_tokens=False),
}


class Turn(NamedTuple):
    """A question and its answer; None where the model is to give it."""

    question: str
    answer: str | None = None


def get_style(name: str) -> PromptStyle:
    """The row of STYLES.

    Raises:
        UsageError: no such style.
    """
    if name not in STYLES:
        raise UsageError(f"prompt style {name!r} is not known", f"Choose one of {', '.join(STYLES)}.")
    return STYLES[name]


def render_conversation(turns: Iterable[Turn], style: str, eos: str) -> str:
    """The text of a conversation, without BOS; each answer is followed by eos.

    Raises:
        UsageError: no such style.
    """
    frame = get_style(style)
    answers = ((turn, "" if turn.answer is None else turn.answer + eos) for turn in turns)
    return "".join(frame.before + turn.question + frame.after + answer for turn, answer in answers)


def turns_from_messages(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
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
    frame = get_style(style)
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


def set_prompt_style(config: dict[str, Any], name: str | None) -> None:
    """Write a style that the user names into a config.json, where `detect_style` finds it first; None chooses nothing.

    Raises:
        UsageError: no such style.
    """
    if name is not None:
        get_style(name)
        config["prompt_style"] = name


def _quoted(text: str) -> str:
    """A jinja string literal."""
    return "'" + text.replace("\n", "\\n") + "'"


def _names() -> str:
    return ", ".join(STYLES)
