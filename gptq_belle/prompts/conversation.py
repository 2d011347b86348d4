"""From the messages of a conversation to a model's prompt, for calibration, the command line, the API and the page.

A model is asked in the wording that it was trained with: by the chat template of its tokenizer, rendered in jinja2's
sandbox as transformers does, else by one of BELLE's prompt styles.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from functools import cached_property
from typing import Any, NamedTuple

from gptq_belle.errors import InputError, UsageError, one_line
from gptq_belle.prompts.messages import Message, merge_messages, messages_from_turns, turns_from_messages
from gptq_belle.prompts.styles import (
    STYLES,
    TEMPLATE,
    Turn,
    default_template,
    detect_style,
    get_style,
    render_conversation,
)
from gptq_belle.prompts.tool_calls import (
    PLAIN_FORM,
    CallForm,
    Tool,
    ToolForm,
    plain_messages,
    template_call_form,
    template_messages,
    uses_tools,
)

OTHER_STYLE = f"Choose a prompt style instead: --prompt-style {', '.join(STYLES)}."
QUESTION, ANSWER, NEXT_QUESTION = "question-0", "answer-1", "question-2"  # to find what a template puts between them
DATE_CODES = (*"YymbBdejaAHIpMSFDxXc", "-m", "-d")  # of strftime


class Prompt(NamedTuple):
    """A prompt for the answer to the last message of a conversation."""

    text: str  # the prompt; special tokens that the tokenizer adds are not in it
    ids: list[int]  # token ids, including special tokens
    stops: tuple[str, ...]  # strings that end the answer


class ChatFormat:
    """How conversations with a model become prompts.

    Args:
        name: a key of `prompts.styles.STYLES`, or "template" for the chat template of the tokenizer.
        today: the date for templates that print one; default: the day of the call.
    Raises:
        UsageError: the name is unknown, or there is no chat template.
        InputError: the chat template cannot be rendered for a single question, or leaves it out.
    """

    def __init__(self, tokenizer: Any, name: str, today: date | None = None) -> None:
        self.tokenizer, self.name = tokenizer, name
        self._template = default_template(tokenizer.chat_template) if name == TEMPLATE else None
        if self._template is not None and today is not None:
            self._template = _stopped_clock(today) + self._template
        if self._template is None:
            self._style = get_style(name)
            return
        try:
            text = self.render([{"role": "user", "content": QUESTION}])
        except UsageError as error:
            raise InputError(error.cause, OTHER_STYLE) from error
        if QUESTION not in text:
            raise InputError("the model's chat template leaves out the user's message", OTHER_STYLE)

    @property
    def special_tokens(self) -> bool:
        """Whether the tokenizer's special tokens precede a prompt; a template writes them itself."""
        return self._template is None and self._style.special_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        return self._style.stops if self._template is None else self._template_stops[0]

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer besides the model's eos."""
        return frozenset() if self._template is None else self._template_stops[1]

    @property
    def _tool_form(self) -> ToolForm:
        return PLAIN_FORM if self._template is not None else self._style.tools

    @property
    def call_form(self) -> CallForm:
        """How answers call tools."""
        return self._template_calls or self._tool_form.call

    def prompt(self, messages: Sequence[Message], continue_final: bool = False, tools: Sequence[Tool] = ()) -> Prompt:
        """The prompt for an answer to the last message, or for the rest of it.

        Args:
            messages: the conversation, in the form of OpenAI's API, also with calls of tools and their results.
            continue_final: the last message is the beginning of the answer (vLLM's ``continue_final_message``).
            tools: what the answer may call, in the form of OpenAI's API; see `call_form`.
        Raises:
            UsageError: the last message is not the user's or a result, or with `continue_final` the assistant's; or
                see `render`.
        """
        found = self._prepared(messages, tools)
        if continue_final and found and found[-1] == {"role": "assistant", "content": ""}:
            found, continue_final = found[:-1], False
        needed, role = ("assistant",) if continue_final else ("user", "tool"), found[-1]["role"] if found else "none"
        if role not in needed or (continue_final and uses_tools(messages[-1])):
            raise UsageError(f"the last message must have the role {needed[0]!r}, not {role!r}",
                             "End the messages with the beginning of the answer." if continue_final else
                             "End the messages with a question.")
        text = self._render_open_answer(found, tools) if continue_final else self._rendered(found, tools)
        return Prompt(text, self.encode(text), self.stops)

    def question(self, text: str) -> Prompt:
        """The prompt for a single question."""
        return self.prompt([{"role": "user", "content": text}])

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered conversation."""
        return list(self.tokenizer(text, add_special_tokens=self.special_tokens)["input_ids"])

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, open for an answer if the last message is the user's.

        Raises:
            UsageError: the messages cannot be expressed: a role or their order.
        """
        return self._rendered(self._prepared(messages, ()), ())

    def _prepared(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[dict[str, Any]]:
        """Messages that the template or the style expresses."""
        if self._template_calls is not None:
            return template_messages(messages, merge_messages)
        return merge_messages(plain_messages(messages, tools, self._tool_form))

    def _rendered(self, messages: list[dict[str, Any]], tools: Sequence[Tool]) -> str:
        if self._template is None:
            return render_conversation(turns_from_messages(messages), self.name, self.tokenizer.eos_token)
        is_open = bool(messages) and messages[-1]["role"] in ("user", "tool")
        return self._rendered_template(messages, add_generation_prompt=is_open, tools=self._template_tools(tools))

    def _render_open_answer(self, messages: list[dict[str, Any]], tools: Sequence[Tool]) -> str:
        """The text of a conversation up to the end of its last message, without what follows an answer."""
        if self._template is None:
            return self._rendered(messages, ()).removesuffix(self.tokenizer.eos_token)
        return self._rendered_template(messages, continue_final_message=True, tools=self._template_tools(tools))

    def _template_tools(self, tools: Sequence[Tool]) -> list[Tool] | None:
        return list(tools) if tools and self._template_calls is not None else None

    @cached_property
    def _template_calls(self) -> CallForm | None:
        """How the template writes calls; None without a template that does."""
        if self._template is None or "tools" not in self._template:
            return None
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        try:
            return template_call_form(self._rendered_template, special)
        except UsageError:  # such as a template for other roles
            return None

    def render_turns(self, turns: Iterable[Turn]) -> str:
        """The same for turns of question and answer."""
        return self.render(messages_from_turns(turns))

    def _rendered_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, chat_template=self._template, tokenize=False,
                                                          **options))
        except Exception as error:  # a template is a program, which jinja2 runs in a sandbox; it can raise anything
            raise UsageError(f"the model's chat template does not accept the messages: {one_line(error)}",
                             "Change their roles or order, or choose a prompt style: --prompt-style "
                             f"{', '.join(STYLES)}.") from error

    @cached_property
    def _template_stops(self) -> tuple[tuple[str, ...], frozenset[int]]:
        """What the template writes after an answer: a special token, or else the first line of text."""
        after = self._after_answer().strip()
        added = sorted(self.tokenizer.get_added_vocab().items(), key=lambda item: -len(item[0]))
        first = next((index for token, index in added if after.startswith(token)), None)
        if first is not None:
            return (), frozenset({first})
        text = after[: min((after.find(token) for token, _ in added if token in after), default=len(after))]
        text = text.partition("\n")[0].strip()
        return ((text,) if len(text) > 1 else ()), frozenset()

    def _after_answer(self) -> str:
        conversation = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER},
                        {"role": "user", "content": NEXT_QUESTION}]
        try:
            text = self._rendered_template(conversation)
        except UsageError:  # a template for a single question
            return ""
        start, end = text.find(ANSWER), text.find(NEXT_QUESTION)
        return text[start + len(ANSWER) : end] if 0 <= start < end else ""


def _stopped_clock(today: date) -> str:
    """A jinja macro that takes the place of transformers' `strftime_now`: functions cannot be passed to a template."""
    codes = "".join(f"|replace('%{code}', '{today.strftime('%' + code)}')" for code in DATE_CODES)
    return "{% macro strftime_now(format) %}{{ format" + codes + " }}{% endmacro %}"


def chat_format(config: Mapping[str, Any], tokenizer: Any, prompt_style: str = "auto") -> ChatFormat:
    """The chat format of a model.

    Args:
        prompt_style: "auto", or as `ChatFormat`.
    Raises:
        UsageError, InputError: as `ChatFormat` and `detect_style`.
    """
    name = detect_style(config, tokenizer.chat_template) if prompt_style == "auto" else prompt_style
    return ChatFormat(tokenizer, name)
