"""Perplexity of a model on a text, per token, byte and character.

The text is split into windows. Every token but the first is scored exactly once, so that results of different window
lengths and tokenizers are comparable.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptq_belle.common.text import count
from gptq_belle.errors import InputError, UsageError
from gptq_belle.prompts.conversation import ChatFormat
from gptq_belle.quantization.calibration.data_files import read_documents
from gptq_belle.quantization.calibration.messages import Document
from gptq_belle.quantization.calibration.rows import first_token_ids

LOGGER = logging.getLogger("gptq_belle")
CHUNK = 64  # positions scored at a time: with BLOOM's 250,880 tokens, 64 rows of float64 are 128 MB
LogitsFunction = Callable[[Tensor], Tensor]  # (B, T) token ids -> (B, T, V) float32
Progress = Callable[[int, int], None]  # called with (done, total)


class TextWindow(NamedTuple):
    """A piece of the text of which only the last tokens are scored; those before them are context."""

    ids: Tensor  # (T,) int64
    scored: int  # number of scored tokens, 1 .. T - 1


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity of a model on a text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per token (natural logarithm).
        standard_error: of `perplexity`, with tokens taken as independent.
        per_byte: the same per UTF-8 byte of the text; comparable between tokenizers. Special tokens have no bytes;
            a character whose bytes are cut at the end of the text counts as three.
        per_character: the same per character.
        tokens: number of scored tokens.
        windows: number of windows.
    """

    perplexity: float
    standard_error: float
    per_byte: float
    per_character: float
    tokens: int
    windows: int


def split_windows(ids: Tensor, length: int, stride: int | None = None) -> Iterator[TextWindow]:
    """Split token ids (L,) into windows of at most `length` tokens; each scores the next `stride` tokens.

    Args:
        ids: (L,) int64, at least two.
        length: tokens per window, context included.
        stride: scored tokens per window after the first. The default, length - 1, is the fastest; a smaller stride
            gives every scored token at least length - stride tokens of context.
    Raises:
        UsageError: a length below 2, or a stride outside 1 .. length - 1.
        InputError: fewer than two tokens.
    """
    step = check_windows(length, stride)
    if len(ids) < 2:
        raise InputError(f"the text has {len(ids)} tokens", "Perplexity needs at least 2; give a longer text.")
    end = min(length, len(ids))
    yield TextWindow(ids[:end], end - 1)
    while end < len(ids):
        start, end = end, min(end + step, len(ids))
        yield TextWindow(ids[max(0, end - length) : end], end - start)


def check_windows(length: int, stride: int | None) -> int:
    """The stride of windows, length - 1 by default; raises UsageError as `split_windows`."""
    step = length - 1 if stride is None else stride
    if length < 2 or not 1 <= step < length:
        raise UsageError(f"a window of {length} tokens with stride {step} is not allowed",
                         "Choose a window of at least 2 tokens and a stride from 1 to the window less 1.")
    return step


def scored_rows(logits: Tensor, window: TextWindow) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of logits (T, V) that predict a window's scored tokens, with those tokens, CHUNK at a time."""
    first = len(window.ids) - window.scored
    rows = logits[first - 1 : -1].split(CHUNK)
    targets = window.ids[first:].to(logits.device).split(CHUNK)
    return zip(rows, targets, strict=True)


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p(target) of each row: logits (S, V), targets (S,) -> (S,) float64."""
    picked = logits.gather(1, targets[:, None]).squeeze(1)
    return logits.double().logsumexp(1) - picked.double()


def perplexity(logits: LogitsFunction, tokenizer: Any, text: str, *, length: int = 512, stride: int | None = None,
               limit: int | None = None, progress: Progress = lambda done, total: None) -> Perplexity:
    """Compute the perplexity of a text.

    Args:
        logits: a model's function from ids (1, T) to logits (1, T, V).
        length, stride: as in `split_windows`.
        limit: use only the first `limit` tokens.
        progress: called with (windows done, number of windows).
    Raises:
        UsageError, InputError: as `split_windows`; InputError also if the logits are not finite.
    """
    ids = encode(tokenizer, text, limit)
    windows = list(split_windows(ids, length, stride))
    losses = []
    for done, window in enumerate(windows, 1):
        output = check_finite(logits(window.ids[None])[0])
        losses += [negative_log_likelihood(rows, targets).cpu() for rows, targets in scored_rows(output, window)]
        progress(done, len(windows))
    return summarize_losses(torch.cat(losses), tokenizer.decode(ids[1:], skip_special_tokens=True), len(windows))


def summarize_losses(losses: Tensor, text: str, windows: int) -> Perplexity:
    """Perplexity from the losses (S,) of the tokens of `text`, computed in `windows` windows."""
    total, mean = float(losses.sum()), float(losses.mean())
    return Perplexity(
        perplexity=exp_or_inf(mean),
        standard_error=exp_or_inf(mean) * standard_error(losses),
        per_byte=exp_or_inf(total / max(1, len(text.encode()))),
        per_character=exp_or_inf(total / max(1, len(text))),
        tokens=len(losses),
        windows=windows,
    )


def format_perplexity(found: Perplexity) -> list[tuple[str, str]]:
    """The results as (name, value) texts."""
    return [
        ("perplexity", f"{found.perplexity:.4f} ± {found.standard_error:.4f}"),
        ("per byte", f"{found.per_byte:.4f}"),
        ("per character", f"{found.per_character:.4f}"),
        ("tokens", f"{found.tokens} in {count(found.windows, 'window')}"),
    ]


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of values (S,); 0 for a single value."""
    return float(values.double().std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def encode(tokenizer: Any, text: str, limit: int | None = None) -> Tensor:
    """Token ids (L,) int64 of a text without special tokens; at most `limit`."""
    ids, _ = first_token_ids(tokenizer, text, len(text) if limit is None else limit)
    return torch.tensor(ids[:limit], dtype=torch.int64)


def check_finite(logits: Tensor) -> Tensor:
    """Return the logits.

    Raises:
        InputError: they contain NaN or infinity: the model is damaged, or its dtype is too narrow.
    """
    if not torch.isfinite(logits).all():
        raise InputError("the model's logits hold NaN or infinity",
                         "The checkpoint is damaged, or its activations overflow: try --precision exact.")
    return logits


def read_text(path: str | Path, chat: ChatFormat) -> str:
    """Read a file in any form that calibration accepts (`read_documents`); chats are rendered as prompts.

    Raises:
        InputError: the file does not exist, is empty or not UTF-8, or contains a row in an unknown form.
    """
    return join_documents(read_text_documents(path), chat)


def read_text_documents(path: str | Path) -> list[Document]:
    """The documents of `read_text`; raises the same errors, and logs what is not used of the file."""
    if not Path(path).is_file():
        raise InputError(f"text file {path} does not exist", "Give a UTF-8 text or JSONL file.")
    documents, notes = read_documents(path)
    for note in notes:
        LOGGER.warning(note)
    return list(documents)


def join_documents(documents: Iterable[Document], chat: ChatFormat) -> str:
    """Concatenate documents; chats are rendered with their answers."""
    return "".join(text if isinstance(text, str) else chat.render_turns(text) for text in documents)


def exp_or_inf(value: float) -> float:
    """exp(value); infinity if a float cannot represent it."""
    return math.exp(value) if value < 700 else math.inf
