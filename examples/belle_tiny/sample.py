"""A generated instruction, and its assignment to the training, validation or test split."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Sample:
    """A question with its only correct answer.

    `key` is the content without its wording (operands, passage, sentence). It determines the split, so neither another
    wording nor the reverse translation of a test sample occurs in training.
    """

    cls: str
    question: str
    answer: str
    key: str
    followup: tuple[str, str] | None = field(default=None)


def normalise(text: str) -> str:
    """Remove spaces, punctuation and case: prompts that differ only in these are considered equal."""
    return re.sub(r"[\s，。！？、：；“”《》,.!?:;\"']+", "", text).lower()


def split_of(cls: str, key: str) -> str:
    """Split of a content by a stable hash: 85 % train, 5 % validation, 10 % test."""
    digest = hashlib.blake2b(f"{cls}|{normalise(key)}".encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 20
    return "valid" if bucket == 0 else "test" if bucket <= 2 else "train"


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """Choose one of the options, twice as fast as random.choice."""
    return options[int(rng.random() * len(options))]


def words(text: str) -> list[str]:
    """Split a text into words."""
    return text.split()


def wrap(rng: random.Random, instructions: Sequence[str], text: str) -> str:
    """Combine an instruction with its text: after a colon, on a new line, or before the instruction."""
    instruction = pick(rng, instructions)
    form = rng.random()
    if form < 0.5:
        return f"{instruction}：{text}"
    if form < 0.8:
        return f"{instruction}。\n{text}"
    return f"{text}\n{instruction}。"
