"""The prompt format of a model directory: how `generate` asks a question, and how its chat template does."""

from dataclasses import dataclass
from pathlib import Path

from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.checkpoint.tokenizer_files import load_tokenizer
from gptq_belle.prompts.conversation import ChatFormat, chat_format
from gptq_belle.prompts.styles import TEMPLATE, default_template

QUESTION = "你好"


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """Prompt format of a model directory."""

    style: str  # how `generate` asks: a key of `prompts.styles.STYLES`, or "template" for the chat template
    text: str  # the prompt of an example question, including special tokens
    stops: tuple[str, ...]  # strings that end an answer
    stop_tokens: tuple[str, ...]  # tokens that end an answer
    chat_template: str | None  # chat template of the directory; None if it has none
    templated: str | None  # the example question rendered by that template; None if there is none

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
    template, chat = default_template(tokenizer.chat_template), chat_format(reader.config, tokenizer)
    prompt = chat.question(QUESTION)
    text = str(tokenizer.decode(prompt.ids, clean_up_tokenization_spaces=False))
    templated = text if chat.name == TEMPLATE else None
    if template is not None and templated is None:
        templated = ChatFormat(tokenizer, TEMPLATE).question(QUESTION).text
    stop_tokens = tokenizer.convert_ids_to_tokens(sorted({tokenizer.eos_token_id, *chat.stop_ids}))
    return PromptFormat(chat.name, text, chat.stops, tuple(stop_tokens), template, templated)


def summary_rows(found: PromptFormat) -> list[tuple[str, str]]:
    """Format a prompt format as (name, value) pairs."""
    rows = [("prompt style", found.style), ("prompt", repr(found.text)),
            ("stop string", repr(found.stops[-1]) if found.stops else "none"),
            ("stop tokens", ", ".join(found.stop_tokens))]
    if found.chat_template is None:
        return [*rows, ("chat template", "none")]
    if not found.agrees:
        rows.append(("prompt of the template", repr(found.templated)))
    return [*rows, ("chat template", found.chat_template)]
