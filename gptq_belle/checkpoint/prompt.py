"""What a model directory's prompts look like: the style that it answers in, and the chat template that others read."""

from dataclasses import dataclass
from pathlib import Path

from gptq_belle.checkpoint.directory import load_tokenizer
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.errors import InputError
from gptq_belle.runtime.chat import Turn, detect_style, render, style_named

QUESTION = "你好"


@dataclass(frozen=True, slots=True)
class Prompt:
    """How a question is asked.

    Attributes:
        style: the key of `runtime.chat.STYLES` that `generate` takes.
        text: a question as the model gets it, special tokens shown.
        stops: strings that end an answer.
        chat_template: the directory's own, for other programs; None where it has none.
        templated: the same question through that template; None where there is none.
    """

    style: str
    text: str
    stops: tuple[str, ...]
    chat_template: str | None
    templated: str | None

    @property
    def agrees(self) -> bool:
        """Whether other programs ask as `generate` does."""
        return self.templated is None or self.templated == self.text


def prompt_of(path: str | Path) -> Prompt:
    """Look at a directory's prompts.

    Raises:
        InputError: no configuration or tokenizer, an unknown style, a template that cannot be rendered.
    """
    reader = CheckpointReader(path)
    tokenizer = load_tokenizer(reader.path)
    template = getattr(tokenizer, "chat_template", None)
    name = detect_style(reader.config, template)
    style = style_named(name)
    asked = render([Turn(QUESTION)], name, tokenizer.eos_token)
    ids = tokenizer(asked, add_special_tokens=style.special_tokens)["input_ids"]
    templated = None
    if template:
        try:
            templated = str(tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False,
                                                          add_generation_prompt=True))
        except Exception as error:  # a template is a program of whoever wrote it, run by jinja in a sandbox
            raise InputError(f"{path}: the chat template cannot be rendered: {str(error)[:200]}",
                             "Choose another: gptq-belle convert SRC OUT --prompt-style bloom.") from error
    text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    return Prompt(name, text, style.stops, template, templated)


def lines(found: Prompt) -> list[tuple[str, str]]:
    """(name, value) pairs for reading."""
    rows = [("prompt style", found.style), ("a question", repr(found.text)), ("ends an answer", repr(found.stops[-1]))]
    if found.chat_template is None:
        return [*rows, ("chat template", "none")]
    if not found.agrees:
        rows.append(("its template gives", repr(found.templated)))
    return [*rows, ("chat template", found.chat_template)]
