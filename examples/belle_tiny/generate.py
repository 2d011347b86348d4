"""Generate training dialogues and the shipped data files: `python -m examples.belle_tiny.generate`.

Every dialogue is generated with the random seed (seed, split, number), so any part of the stream can be reproduced. A
sample whose content belongs to another split is discarded.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from .sample import Sample, normalise, split_of
from .tasks_classify import classification
from .tasks_extract import extract
from .tasks_math import math
from .tasks_open import brainstorming, code, open_qa
from .tasks_reading import closed_qa, summarization
from .tasks_rewrite import rewrite
from .tasks_translation import translation

Turn = dict[str, str]
HERE = Path(__file__).resolve().parent
TASKS: dict[str, tuple[Callable[[random.Random], Sample], float]] = {
    "open_qa": (open_qa, 0.07),
    "closed_qa": (closed_qa, 0.16),
    "extract": (extract, 0.17),
    "classification": (classification, 0.06),
    "summarization": (summarization, 0.05),
    "rewrite": (rewrite, 0.05),
    "translation": (translation, 0.17),
    "brainstorming": (brainstorming, 0.03),
    "math": (math, 0.20),
    "code": (code, 0.04),
}
EXACT = ("extract", "closed_qa", "classification", "translation", "math", "open_qa")


def draw(rng: random.Random, split: str, cls: str | None = None) -> Sample:
    """Generate a sample of a split, of a given class or of the mixture."""
    name = cls or rng.choices(list(TASKS), [weight for _, weight in TASKS.values()])[0]
    while True:
        sample = TASKS[name][0](rng)
        if split_of(sample.cls, sample.key) == split:
            return sample


def dialogue(rng: random.Random, split: str, two_turns: float = 0.15) -> tuple[str, list[Turn]]:
    """Generate class and turns of a dialogue; a second turn is about the same text, or is another sample."""
    sample = draw(rng, split)
    pairs = [(sample.question, sample.answer)]
    if rng.random() < two_turns:
        other = draw(rng, split)
        pairs.append(sample.followup or (other.question, other.answer))
    turns = [{"from": who, "value": text} for q, a in pairs for who, text in (("human", q), ("assistant", a))]
    return sample.cls, turns


def dialogues(seed: int, split: str, start: int = 0) -> Iterator[tuple[str, list[Turn]]]:
    """Yield the infinite stream of dialogues of a split from number `start` on."""
    number = start
    while True:
        yield dialogue(random.Random(f"{seed}/{split}/{number}"), split)
        number += 1


def single_turns(seed: int, split: str, per_class: int) -> list[dict[str, object]]:
    """Generate rows of different single-turn questions, `per_class` of each class."""
    rows: list[dict[str, object]] = []
    for cls in TASKS:
        rng, seen = random.Random(f"{seed}/{split}/{cls}"), set[str]()
        while len(seen) < per_class:
            sample = draw(rng, split, cls)
            if normalise(sample.question) in seen:
                continue
            seen.add(normalise(sample.question))
            turns = [{"from": "human", "value": sample.question}, {"from": "assistant", "value": sample.answer}]
            rows.append(
                {"class": cls, "question": sample.question, "std_answer": sample.answer, "conversations": turns}
            )
    return rows


def prompt(question: str, style: str) -> str:
    """Format a question in BELLE's prompt style `bloom` or `llama`."""
    return f"Human: {question}\n\nAssistant:" if style == "bloom" else f"Human: {question} \n\nAssistant: "


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def dialogue_rows(seed: int, split: str, characters: int) -> list[dict[str, object]]:
    """Generate rows of dialogues until they have this number of Chinese characters."""
    rows: list[dict[str, object]] = []
    for cls, turns in dialogues(seed, split):
        if characters <= 0:
            break
        rows.append({"class": cls, "conversations": turns})
        characters -= sum("\u4e00" <= c <= "\u9fff" for turn in turns for c in turn["value"])
    return rows


def main() -> None:
    """Write the test rows, the held-out dialogues for perplexity and the built-in calibration rows of the package."""
    parser = argparse.ArgumentParser(description="Write the data files of belle_tiny.")
    parser.add_argument("--out", type=Path, default=HERE / "data")
    parser.add_argument("--builtin", type=Path, default=HERE.parents[1] / "gptq_belle" / "data" / "builtin.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_rows(args.out / "test.jsonl", single_turns(args.seed, "test", 120))
    write_rows(args.out / "heldout.jsonl", dialogue_rows(args.seed, "valid", 14_000))
    write_rows(args.builtin, dialogue_rows(args.seed + 1, "train", 150_000))


if __name__ == "__main__":
    main()
