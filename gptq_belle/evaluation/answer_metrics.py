"""Metrics of answers by class: exact match, character F1, ROUGE-L, likelihood, agreement. Pure functions."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.evaluation.perplexity import standard_error

EXACT_CLASSES = ("extract", "closed_qa", "classification", "translation", "math", "open_qa")
TARGET_CLASSES = EXACT_CLASSES[:5]  # the five whose exact match is averaged
FINAL_ANSWER = re.compile(r"答案(?:是|为|[:：])\s*(-?\d+(?:\.\d+)?)")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class ClassScore(NamedTuple):
    """Mean score of one class in percent, the number of answers, and the metric: `exact` or `f1`."""

    score: float
    answers: int
    metric: str


def normalize(text: str) -> str:
    """The text in half width (NFKC) and lower case, with single spaces, without space or full stop at the ends."""
    folded = unicodedata.normalize("NFKC", text).lower().replace("。", ".")
    return re.sub(r"\s+", " ", folded).strip(" .")


def final_number(text: str) -> str | None:
    """The number after the last `答案是`; without it the last number of the text; without a number None."""
    folded = unicodedata.normalize("NFKC", text)
    found = FINAL_ANSWER.findall(folded) or NUMBER.findall(folded)
    return found[-1] if found else None


def exact_match(answer: str, expected: str, cls: str = "") -> float:
    """1.0 if the answer equals the expected one, else 0.0; in the class `math` only the final number is compared."""
    if cls == "math":
        wanted = final_number(expected)
        return float(wanted is not None and final_number(answer) == wanted)
    return float(normalize(answer) == normalize(expected))


def character_f1(answer: str, expected: str) -> float:
    """F1 of the characters of both texts as multisets, without spaces; 1.0 for two empty texts."""
    given, wanted = (Counter(normalize(text).replace(" ", "")) for text in (answer, expected))
    if not given or not wanted:
        return float(given == wanted)
    common = (given & wanted).total()
    return 2 * common / (given.total() + wanted.total())


def rouge_l(answer: str, expected: str) -> float:
    """ROUGE-L (Lin, 2004, section 3): F1 over the longest common subsequence of characters, without spaces; 1.0 for
    two empty texts. English texts score higher by characters than by words."""
    given, wanted = (normalize(text).replace(" ", "") for text in (answer, expected))
    if not given or not wanted:
        return float(given == wanted)
    return 2 * common_subsequence(given, wanted) / (len(given) + len(wanted))


def common_subsequence(a: str, b: str) -> int:
    """Length of the longest common subsequence (Hyyro, "Bit-parallel LCS-length computation revisited", 2004).

    Each row of the dynamic programming table is one integer; a zero bit is a position where the row increases by one.
    """
    places: dict[str, int] = {}
    for place, char in enumerate(a):
        places[char] = places.get(char, 0) | 1 << place
    full = (1 << len(a)) - 1
    row = full
    for char in b:
        hit = row & places.get(char, 0)
        row = ((row + hit) | (row - hit)) & full
    return len(a) - row.bit_count()


def metric_of(cls: str) -> str:
    """The metric of a class: `exact` for the classes with one right answer, `f1` for all others."""
    return "exact" if cls in EXACT_CLASSES else "f1"


def score_answer(answer: str, expected: str, cls: str) -> float:
    """Score of one answer, 0 to 1, by the metric of its class."""
    return exact_match(answer, expected, cls) if metric_of(cls) == "exact" else character_f1(answer, expected)


def score_classes(rows: Iterable[tuple[str, str, str]]) -> dict[str, ClassScore]:
    """Scores by class of (class, answer, expected) rows, in the order of first appearance."""
    scores: dict[str, list[float]] = {}
    for cls, answer, expected in rows:
        scores.setdefault(cls, []).append(score_answer(answer, expected, cls))
    return {cls: ClassScore(100 * sum(s) / len(s), len(s), metric_of(cls)) for cls, s in scores.items()}


def overall(scores: dict[str, ClassScore], classes: Sequence[str] = TARGET_CLASSES) -> float:
    """Mean score in percent of all answers of the given classes; raises ValueError if there are none."""
    present = [scores[cls] for cls in classes if cls in scores]
    total = sum(s.answers for s in present)
    if not total:
        raise ValueError(f"no answers in the classes {', '.join(classes)}")
    return sum(s.score * s.answers for s in present) / total


class ScoredAnswer(NamedTuple):
    """An answer with the model's likelihood of two other answers to the question."""

    cls: str
    answer: str
    expected: str  # the reference answer; "" if there is none
    loss: Tensor  # (L,) float64, -ln p of the reference answer's tokens, eos included
    same_top: Tensor | None  # (L,) bool, top-1 agreement on the base's greedy answer; None without a base


@dataclass(frozen=True, slots=True)
class ClassMetrics:
    """Metrics of the questions of a class; None if there is nothing to measure.

    Attributes:
        questions, references: number of questions, and of those that have a reference answer.
        exact, f1, rouge_l: mean in percent over the answers that have a reference.
        nll, nll_error: mean negative log-likelihood in nats per token of the reference answers, and its standard error
            with tokens taken as independent.
        agreement: percent of the tokens of the full-precision model's greedy answers that are also this model's most
            likely tokens, given the same tokens before them.
        identical: percent of those answers that agree in all tokens: both models give the same answer.
    """

    questions: int
    references: int
    exact: float | None
    f1: float | None
    rouge_l: float | None
    nll: float | None
    nll_error: float | None
    agreement: float | None
    identical: float | None


def class_metrics(answers: Iterable[ScoredAnswer]) -> ClassMetrics:
    """All metrics of some answers."""
    rows = list(answers)
    referenced = [row for row in rows if row.expected]
    losses = torch.cat([row.loss for row in rows]) if rows else torch.zeros(0)
    agreed = [row.same_top for row in rows if row.same_top is not None and len(row.same_top)]
    return ClassMetrics(
        questions=len(rows),
        references=len(referenced),
        exact=_percent([exact_match(row.answer, row.expected, row.cls) for row in referenced]),
        f1=_percent([character_f1(row.answer, row.expected) for row in referenced]),
        rouge_l=_percent([rouge_l(row.answer, row.expected) for row in referenced]),
        nll=float(losses.mean()) if len(losses) else None,
        nll_error=standard_error(losses) if len(losses) else None,
        agreement=_percent(torch.cat(agreed).double().tolist()) if agreed else None,
        identical=_percent([float(same.all()) for same in agreed]),
    )


def _percent(values: list[float]) -> float | None:
    return 100 * sum(values) / len(values) if values else None
