"""Perplexity of a model on a text: how many tokens, bytes or characters it wavers between, on average.

The text is cut into windows. Every token but the very first is scored exactly once, so figures of different window
lengths and tokenizers are about the same text.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptq_belle.errors import InputError, UsageError
from gptq_belle.prompts.styles import render_conversation
from gptq_belle.quantization.calibration import read_documents
from gptq_belle.quantization.calibration_keys import Document

CHUNK = 64  # positions scored at a time: with BLOOM's 250,880 tokens, 64 rows of float64 are 128 MB
Logits = Callable[[Tensor], Tensor]  # (B, T) token ids -> (B, T, V) float32


class Window(NamedTuple):
    """A piece of the text, of which only the last tokens are scored; those before are context."""

    ids: Tensor  # (T,) int64
    scored: int  # 1 .. T - 1


@dataclass(frozen=True, slots=True)
class Perplexity:
    """What a text costs a model.

    Attributes:
        perplexity: exp of the mean negative log-likelihood a token (natural logarithm).
        standard_error: of `perplexity`, tokens taken as independent.
        per_byte: the same per UTF-8 byte of the text; comparable between tokenizers. Special tokens have no bytes;
            a character whose bytes are cut at the text's end counts as three.
        per_character: the same per character.
        tokens: how many tokens were scored.
        windows: how many windows there were.
    """

    perplexity: float
    standard_error: float
    per_byte: float
    per_character: float
    tokens: int
    windows: int


def windows(ids: Tensor, length: int, stride: int | None = None) -> Iterator[Window]:
    """Cut token ids (L,) into windows of at most `length` tokens; each scores `stride` tokens that none before did.

    Args:
        ids: (L,) int64, at least two.
        length: tokens a window, context included.
        stride: scored tokens a window behind the first; length - 1 (the default) is the fastest, less gives every
            scored token at least length - stride tokens of context.
    Raises:
        UsageError: a length below 2, or a stride outside 1 .. length - 1.
        InputError: fewer than two tokens.
    """
    step = length - 1 if stride is None else stride
    if length < 2 or not 1 <= step < length:
        raise UsageError(f"a window of {length} tokens with stride {step} is not allowed",
                         "Choose a window of at least 2 tokens and a stride from 1 to the window less 1.")
    if len(ids) < 2:
        raise InputError(f"the text has {len(ids)} tokens", "Perplexity needs at least 2; give a longer text.")
    end = min(length, len(ids))
    yield Window(ids[:end], end - 1)
    while end < len(ids):
        start, end = end, min(end + step, len(ids))
        yield Window(ids[max(0, end - length) : end], end - start)


def scored_rows(logits: Tensor, window: Window) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of logits (T, V) that predict a window's scored tokens, with those tokens, CHUNK at a time."""
    first = len(window.ids) - window.scored
    rows = logits[first - 1 : -1].split(CHUNK)
    targets = window.ids[first:].to(logits.device).split(CHUNK)
    return zip(rows, targets, strict=True)


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p(target) of each row: logits (S, V), targets (S,) -> (S,) float64."""
    picked = logits.gather(1, targets[:, None]).squeeze(1)
    return logits.double().logsumexp(1) - picked.double()


def perplexity(logits: Logits, tokenizer: Any, text: str, *, length: int = 512, stride: int | None = None,
               limit: int | None = None, progress: Callable[[int, int], None] | None = None) -> Perplexity:
    """Score a text.

    Args:
        logits: a model's function from ids (1, T) to logits (1, T, V).
        tokenizer: its transformers tokenizer.
        length, stride: as in `windows`.
        limit: look at the first so many tokens only.
        progress: called with (windows done, windows in all).
    Raises:
        UsageError, InputError: as `windows`; InputError too where the logits are not finite.
    """
    ids = encode(tokenizer, text, limit)
    cut = list(windows(ids, length, stride))
    losses = []
    for done, window in enumerate(cut, 1):
        output = finite(logits(window.ids[None])[0])
        losses += [negative_log_likelihood(rows, targets).cpu() for rows, targets in scored_rows(output, window)]
        if progress:
            progress(done, len(cut))
    return summarize(torch.cat(losses), tokenizer.decode(ids[1:], skip_special_tokens=True), len(cut))


def summarize(losses: Tensor, text: str, count: int) -> Perplexity:
    """Losses (S,) of the tokens that make up `text`, seen in `count` windows, to figures."""
    total, mean = float(losses.sum()), float(losses.mean())
    return Perplexity(
        perplexity=exponential(mean),
        standard_error=exponential(mean) * standard_error(losses),
        per_byte=exponential(total / max(1, len(text.encode()))),
        per_character=exponential(total / max(1, len(text))),
        tokens=len(losses),
        windows=count,
    )


def lines(figures: Perplexity) -> list[tuple[str, str]]:
    """Figures as (name, value) pairs for reading."""
    return [
        ("perplexity", f"{figures.perplexity:.4f} ± {figures.standard_error:.4f}"),
        ("per byte", f"{figures.per_byte:.4f}"),
        ("per character", f"{figures.per_character:.4f}"),
        ("tokens", f"{figures.tokens} in {figures.windows} windows"),
    ]


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of values (S,); 0 for a single one."""
    return float(values.double().std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def encode(tokenizer: Any, text: str, limit: int | None = None) -> Tensor:
    """Token ids (L,) int64 of a text, without special tokens; at most `limit`."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[:limit], dtype=torch.int64)


def finite(logits: Tensor) -> Tensor:
    """The logits, unless they hold NaN or infinity.

    Raises:
        InputError: they do; the model is damaged, or its dtype too narrow.
    """
    if not torch.isfinite(logits).all():
        raise InputError("the model's logits hold NaN or infinity",
                         "The checkpoint is damaged, or its activations overflow: try --precision exact.")
    return logits


def read_text(path: str | Path, style: str, eos: str) -> str:
    """A text file, or the rows of a JSON Lines file of any form that calibration takes, chats in their prompt.

    Args:
        path: UTF-8 text, .json or .jsonl.
        style: prompt style of chat rows.
        eos: put behind every document.
    Raises:
        InputError: it is not there, empty, not UTF-8, or holds a row of no known form.
    """
    return joined(text_documents(path), style, eos)


def text_documents(path: str | Path) -> list[Document]:
    """The documents of `read_text`; raises the same."""
    if not Path(path).is_file():
        raise InputError(f"text file {path} does not exist", "Give a UTF-8 text or JSONL file.")
    return list(read_documents(path))


def joined(documents: Iterable[Document], style: str, eos: str) -> str:
    """Documents as one text, chats in their prompt, each answer followed by eos."""
    return "".join(text if isinstance(text, str) else render_conversation(text, style, eos) for text in documents)


def exponential(value: float) -> float:
    """exp, infinity where a float cannot hold it."""
    return math.exp(value) if value < 700 else math.inf
