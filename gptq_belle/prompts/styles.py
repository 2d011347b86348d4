"""BELLE's prompt styles, their chat templates, and which style a model uses.

The models were tuned on one of three styles. Answers end with eos. If a model generates the next question instead,
``Human:`` is used as a stop string.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gptq_belle.errors import InputError, UsageError
from gptq_belle.models.architectures import family
from gptq_belle.prompts.tool_calls import PLAIN_FORM, ToolForm

TEMPLATE = "template"  # the name of no style: the chat template of the model's tokenizer
EXTENDED_VOCABULARY = 79458  # vocabulary size of BELLE-LLaMA-EXT-7B and -13B, which were tuned on style "newline"


@dataclass(frozen=True, slots=True)
class PromptStyle:
    """One format of prompts.

    Attributes:
        before: text before a question.
        after: text between a question and its answer.
        special_tokens: whether the tokenizer's special tokens (LLaMA's BOS) precede a conversation.
        stops: strings that end an answer and are not shown, including line breaks before ``Human:``.
        tools: how calls of tools are described and written.
    """

    before: str
    after: str
    special_tokens: bool = True
    stops: tuple[str, ...] = ("\n\nHuman:", "\nHuman:", "Human:")
    tools: ToolForm = PLAIN_FORM


STYLES = {
    "bloom": PromptStyle("Human: ", "\n\nAssistant:"),
    "llama": PromptStyle("Human: ", " \n\nAssistant: "),
    "newline": PromptStyle("Human: \n", "\n\nAssistant: \n", special_tokens=False),
}


class Turn(NamedTuple):
    """A question and its answer; None if the model has to generate the answer. `system` is an instruction before it."""

    question: str
    answer: str | None = None
    system: str = ""


def get_style(name: str) -> PromptStyle:
    """Return a prompt style by its name in STYLES.

    Raises:
        UsageError: unknown style.
    """
    if name not in STYLES:
        raise UsageError(f"prompt style {name!r} is not known", f"Choose one of {', '.join(STYLES)}.")
    return STYLES[name]


def render_conversation(turns: Iterable[Turn], style: str, eos: str) -> str:
    """Render a conversation in one of BELLE's styles, without BOS; each answer is followed by eos.

    Raises:
        UsageError: unknown style.
    """
    frame = get_style(style)

    def text(turn: Turn) -> str:
        system = turn.system + "\n" if turn.system else ""
        answer = "" if turn.answer is None else turn.answer + eos
        return frame.before + system + turn.question + frame.after + answer

    return "".join(map(text, turns))


def chat_template(style: str, *, bos: bool = False) -> str:
    """Return a prompt style as a jinja chat template for transformers and other programs.

    Args:
        style: a key of STYLES.
        bos: whether to start with BOS, for tokenizers that add it to every text: the result of a template is tokenized
            without special tokens.
    Raises:
        UsageError: unknown style.
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


def detect_style(config: Mapping[str, Any], template: str | Mapping[str, str] | None = None) -> str:
    """Detect how a model is asked: by ``prompt_style`` of config.json, else by its chat template, else by model_type
    and vocabulary size.

    Args:
        template: the tokenizer's chat template, or several by name.
    Returns:
        A key of STYLES, also for a template that `chat_template` generated; "template" for any other template.
    Raises:
        InputError: unknown style or architecture, or several templates without a default one.
    """
    hint = config.get("prompt_style")
    if hint is not None:
        if hint not in STYLES:
            raise InputError(f"config.json's prompt_style {hint!r} is not known",
                             f"It must be one of {', '.join(STYLES)}.")
        return str(hint)
    text = default_template(template)
    if text is not None:
        generated = {chat_template(style, bos=bos): style for style in STYLES for bos in (False, True)}
        return generated.get(text, TEMPLATE)
    return "newline" if config.get("vocab_size") == EXTENDED_VOCABULARY else family(
        config.get("model_type")).prompt_style


def default_template(template: str | Mapping[str, str] | None) -> str | None:
    """The chat template of a conversation without tools; None if there is none.

    Raises:
        InputError: there are several by name, and none is called "default".
    """
    if not isinstance(template, Mapping):
        return template or None
    if len(template) == 1:
        return next(iter(template.values())) or None
    if template and "default" not in template:
        raise InputError(f"none of the chat templates {', '.join(map(repr, template))} is called 'default'",
                         "Name one of them 'default', or choose a prompt style: --prompt-style "
                         f"{', '.join(STYLES)}.")
    return template.get("default") or None


def set_prompt_style(config: dict[str, Any], name: str | None) -> None:
    """Set ``prompt_style`` of a config.json, which takes precedence in `detect_style`; None changes nothing.

    Raises:
        UsageError: unknown style.
    """
    if name is not None:
        get_style(name)
        config["prompt_style"] = name


def _quoted(text: str) -> str:
    return "'" + text.replace("\n", "\\n") + "'"
