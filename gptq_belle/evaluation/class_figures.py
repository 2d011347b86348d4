"""Every measure of the answers of one class of questions. Pure functions."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.evaluation.perplexity import standard_error
from gptq_belle.evaluation.score import character_f1, exact_match, rouge_l


class Scored(NamedTuple):
    """One question with its answer, and what the model thinks of other answers to it."""

    cls: str
    answer: str
    expected: str  # "" where there is no reference
    loss: Tensor  # (L,) float64, -ln p of the reference's tokens, eos included
    same_top: Tensor | None  # (L,) bool, of the base's greedy answer; None without a base


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """Measures over the questions of a class; None where there was nothing to measure on.

    Attributes:
        questions, references: how many there are, and how many of them have a reference answer.
        exact, f1, rouge_l: percent, means over the answers that have a reference (see `score`).
        nll, nll_error: mean negative log-likelihood of the references' tokens, in nats, and its standard error,
            tokens taken as independent.
        agreement: percent of the tokens of the full-precision model's greedy answers that are this model's likeliest
            too, each behind the same tokens.
        identical: percent of those answers of which all tokens are, so that both models give the same answer.
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


def figures(rows: Iterable[Scored]) -> ClassFigures:
    """All measures of some rows."""
    rows = list(rows)
    referenced = [row for row in rows if row.expected]
    losses = torch.cat([row.loss for row in rows]) if rows else torch.zeros(0)
    agreed = [row.same_top for row in rows if row.same_top is not None and len(row.same_top)]
    return ClassFigures(
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
