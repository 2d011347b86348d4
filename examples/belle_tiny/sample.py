"""One generated instruction, and the rule that puts it into train, validation or test."""

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
    """A question with its one expected answer.

    `key` is the content without its wording (operands, passage, sentence): the split hangs on it alone, so no
    other wording of a test content, nor its mirror image (translation both ways), can be met in training.
    """

    cls: str
    question: str
    answer: str
    key: str
    followup: tuple[str, str] | None = field(default=None)


def normalise(text: str) -> str:
    """Text without spaces, sentence punctuation and case: prompts that differ in these alone count as the same."""
    return re.sub(r"[\s，。！？、：；“”《》,.!?:;\"']+", "", text).lower()


def split_of(cls: str, key: str) -> str:
    """The split a content belongs to: 85 % train, 5 % validation, 10 % test, by a stable hash."""
    digest = hashlib.blake2b(f"{cls}|{normalise(key)}".encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 20
    return "valid" if bucket == 0 else "test" if bucket <= 2 else "train"


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """One of the options; random.choice without its generality, which is twice as slow."""
    return options[int(rng.random() * len(options))]


def words(text: str) -> list[str]:
    """A word bank from its words with spaces between."""
    return text.split()


def wrap(rng: random.Random, instructions: Sequence[str], text: str) -> str:
    """An instruction with its text: after a colon, on a new line, or before the instruction."""
    instruction = pick(rng, instructions)
    form = rng.random()
    if form < 0.5:
        return f"{instruction}：{text}"
    if form < 0.8:
        return f"{instruction}。\n{text}"
    return f"{text}\n{instruction}。"
