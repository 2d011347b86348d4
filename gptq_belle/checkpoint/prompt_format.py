"""The prompt format of a model directory: how `generate` asks a question, and how its chat template does."""

from dataclasses import dataclass
from pathlib import Path

from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.checkpoint.tokenizer_files import load_tokenizer
from gptq_belle.errors import InputError
from gptq_belle.prompts.styles import Turn, detect_style, get_style, render_conversation

QUESTION = "你好"


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """Prompt format of a model directory.

    Attributes:
        style: a key of `prompts.styles.STYLES`, used by `generate`.
        text: the prompt of an example question, including special tokens.
        stops: strings that end an answer.
        chat_template: chat template of the directory, for other programs; None if it has none.
        templated: the example question rendered by that template; None if there is none.
    """

    style: str
    text: str
    stops: tuple[str, ...]
    chat_template: str | None
    templated: str | None

    @property
    def agrees(self) -> bool:
        """Whether the chat template gives the same prompt as `generate`."""
        return self.templated is None or self.templated == self.text


def read_prompt_format(path: str | Path) -> PromptFormat:
    """Read the prompt format of a model directory.

    Raises:
        InputError: config.json or tokenizer is missing, the style is unknown, or the template cannot be rendered.
    """
    reader = CheckpointReader(path)
    tokenizer = load_tokenizer(reader.path)
    template = getattr(tokenizer, "chat_template", None)
    name = detect_style(reader.config, template)
    style = get_style(name)
    asked = render_conversation([Turn(QUESTION)], name, tokenizer.eos_token)
    ids = tokenizer(asked, add_special_tokens=style.special_tokens)["input_ids"]
    templated = None
    if template:
        try:
            templated = str(tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False,
                                                          add_generation_prompt=True))
        except Exception as error:  # a template is a program, which jinja runs in a sandbox
            raise InputError(f"{path}: the chat template cannot be rendered: {str(error)[:200]}",
                             "Choose another: gptq-belle convert SRC OUT --prompt-style bloom.") from error
    text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    return PromptFormat(name, text, style.stops, template, templated)


def summary_rows(found: PromptFormat) -> list[tuple[str, str]]:
    """Format a prompt format as (name, value) pairs."""
    rows = [("prompt style", found.style), ("prompt", repr(found.text)), ("stop string", repr(found.stops[-1]))]
    if found.chat_template is None:
        return [*rows, ("chat template", "none")]
    if not found.agrees:
        rows.append(("prompt of the template", repr(found.templated)))
    return [*rows, ("chat template", found.chat_template)]
