"""BELLE's evaluation set (`eval belle`): test questions by class, answered in the model's prompt style and scored."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gptq_belle.common.text import is_unicode
from gptq_belle.engine.model import Model
from gptq_belle.errors import InputError
from gptq_belle.evaluation.answer_metrics import (
    TARGET_CLASSES,
    ClassMetrics,
    ClassScore,
    ScoredAnswer,
    class_metrics,
    overall,
    score_classes,
)
from gptq_belle.evaluation.belle_answers import (
    GreedyAnswer,
    answer_likelihoods,
    answer_questions,
    prompt_ids,
    reference_ids,
)
from gptq_belle.evaluation.perplexity import Progress
from gptq_belle.quantization.calibration.data_files import read_data_file

FIELDS = ("class", "question", "std_answer")
COLUMNS = ("class", "questions", "exact, %", "F1, %", "ROUGE-L, %", "NLL per token", "tokens as base, %",
           "answers as base, %")


class BelleQuestion(NamedTuple):
    """One question of a test set; std_answer is the reference answer, empty if there is none."""

    cls: str
    question: str
    std_answer: str


@dataclass(frozen=True, slots=True)
class BelleScores:
    """Scores of one model.

    Attributes:
        classes: score in percent of each class that has reference answers, by the metric of the class.
        exact: percent of exact matches over TARGET_CLASSES; None without questions of these classes.
        answers: the answers, in the order of the questions.
        figures: all metrics, by class.
        total: all metrics over all questions.
    """

    classes: dict[str, ClassScore]
    exact: float | None
    answers: list[str]
    figures: dict[str, ClassMetrics]
    total: ClassMetrics


def evaluate(model: Model, questions: Sequence[BelleQuestion], *, limit: int = 160, batch: int = 32,
             style: str = "auto", base: Sequence[GreedyAnswer] | None = None,
             progress: Progress = lambda done, total: None) -> BelleScores:
    """Answer all questions and score the answers.

    Args:
        limit: maximum number of tokens per answer.
        batch: number of questions answered at a time.
        style: "auto" or a key of `prompts.styles.STYLES`.
        base: answers of the full-precision model (`belle_answers.answer_questions`), to measure agreement.
        progress: called with (answers done, number of questions).
    """
    answers = answer_questions(model, [row.question for row in questions], limit, batch, style, progress)
    return score_answers(model, questions, answers, style=style, base=base)


def score_answers(model: Model, questions: Sequence[BelleQuestion], answers: Sequence[GreedyAnswer], *,
                  style: str = "auto", base: Sequence[GreedyAnswer] | None = None) -> BelleScores:
    """Score answers of the model; arguments as for `evaluate`."""
    referenced = [(row, answer) for row, answer in zip(questions, answers, strict=True) if row.std_answer]
    classes = score_classes((row.cls, answer.text, row.std_answer) for row, answer in referenced)
    exact = overall(classes) if any(cls in classes for cls in TARGET_CLASSES) else None
    scored = list(_scored_answers(model, questions, answers, style, base))
    names = dict.fromkeys(row.cls for row in questions)
    by_class = {name: class_metrics(answer for answer in scored if answer.cls == name) for name in names}
    return BelleScores(classes, exact, [answer.text for answer in answers], by_class, class_metrics(scored))


def _scored_answers(model: Model, questions: Sequence[BelleQuestion], answers: Sequence[GreedyAnswer], style: str,
                    base: Sequence[GreedyAnswer] | None) -> Iterator[ScoredAnswer]:
    """Every answer with the model's likelihood of the reference answer and of the base's answer."""
    prompts = prompt_ids(model, [row.question for row in questions], style)
    texts = [row.std_answer for row in questions]
    references = [ids if text else [] for ids, text in zip(reference_ids(model, texts), texts, strict=True)]
    of_reference = answer_likelihoods(model, prompts, references)
    of_base = answer_likelihoods(model, prompts, [answer.ids for answer in base]) if base else [None] * len(questions)
    for row, answer, reference, agreement in zip(questions, answers, of_reference, of_base, strict=True):
        yield ScoredAnswer(row.cls, answer.text, row.std_answer, reference.loss,
                           agreement.same_top if agreement else None)


def format_scores(scores: BelleScores) -> list[list[str]]:
    """One row of texts per class, then one of all classes; COLUMNS names the cells."""
    rows = [[mark_target_class(name), *_cells(found)] for name, found in scores.figures.items()]
    if scores.exact is not None:
        answers = sum(found.answers for name, found in scores.classes.items() if name in TARGET_CLASSES)
        rows.append(["all with * together", str(answers), f"{scores.exact:.1f}", *["-"] * 5])
    return [*rows, ["all", *_cells(scores.total)]]


def _cells(found: ClassMetrics) -> list[str]:
    nll = "-" if found.nll is None else f"{found.nll:.4f} ± {found.nll_error:.4f}"
    percentages = (found.exact, found.f1, found.rouge_l, found.agreement, found.identical)
    cells = ["-" if value is None else f"{value:.1f}" for value in percentages]
    return [str(found.questions), *cells[:3], nll, *cells[3:]]


def mark_target_class(cls: str) -> str:
    """The name of a class, with a star if the class counts in `BelleScores.exact`."""
    return f"{cls} *" if cls in TARGET_CLASSES else cls


def normalize_class(name: str) -> str:
    """One spelling of a class: BELLE's files write "open qa", "open QA" and "closed\\xa0qa" (a no-break space)."""
    return "_".join(unicodedata.normalize("NFKC", name).lower().split())


def read_questions(path: str | Path, per_class: int | None = None) -> list[BelleQuestion]:
    """Read a file of JSON rows with class, question and std_answer, the format of BELLE's evaluation set.

    Args:
        path: the file. Other fields are ignored; std_answer may be empty, null or missing.
        per_class: use only the first `per_class` questions of each class.
    Raises:
        InputError: as `read_data_file`; the file is empty, or a row is not valid; the message names it.
    """
    path = Path(path)
    questions: list[BelleQuestion] = []
    seen: dict[str, int] = {}
    for where, value in read_data_file(path).rows:
        question = _question(value)
        if question is None:
            raise InputError(f"{path}, {where} is not a JSON object with {', '.join(FIELDS)} as valid texts",
                             "Correct or remove that row.")
        seen[question.cls] = seen.get(question.cls, 0) + 1
        if per_class is None or seen[question.cls] <= per_class:
            questions.append(question)
    if not questions:
        raise InputError(f"test file {path} holds no rows", f"Give a JSONL file with {', '.join(FIELDS)}.")
    return questions


def _question(value: Any) -> BelleQuestion | None:
    if not isinstance(value, dict):
        return None
    cls, question, answer = (value.get(field) for field in FIELDS)
    if not isinstance(cls, str) or not isinstance(question, str) or not isinstance(answer, str | None):
        return None
    if not is_unicode(cls + question + (answer or "")):
        return None
    return BelleQuestion(normalize_class(cls), question, answer if answer and answer.strip() else "")
