"""`eval belle`: answers to test questions in the model's own prompt style, scored by class."""

import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gptq_belle.engine.model import Model
from gptq_belle.errors import InputError
from gptq_belle.evaluation.belle_answers import Answer, ask, given_answers, prompt_ids, reference_ids
from gptq_belle.evaluation.scores import (
    TARGET_CLASSES,
    ClassFigures,
    ClassScore,
    Scored,
    figures,
    overall,
    score_classes,
)

FIELDS = ("class", "question", "std_answer")


class Row(NamedTuple):
    """One question of a test set; std_answer is empty where there is no one right answer."""

    cls: str
    question: str
    std_answer: str


@dataclass(frozen=True, slots=True)
class BelleScores:
    """Scores of one model.

    Attributes:
        classes: in percent, by the one measure that suits a class; those whose rows have a reference.
        exact: percent of right answers over the classes that have one right answer; None where none was asked.
        answers: in the order of the rows.
        figures: every measure, by class.
        total: the same over all rows.
    """

    classes: dict[str, ClassScore]
    exact: float | None
    answers: list[str]
    figures: dict[str, ClassFigures]
    total: ClassFigures


def evaluate(model: Model, rows: Sequence[Row], *, limit: int = 160, batch: int = 32, style: str = "auto",
             base: Sequence[Answer] | None = None, progress: Callable[[int, int], None] | None = None) -> BelleScores:
    """Ask every question and score the answers.

    Args:
        model: from `gptq_belle.load`.
        rows: see `read_rows`.
        limit: the most tokens of an answer.
        batch: questions answered at a time; the longest answer of a batch sets its time.
        style: "auto" or a key of `prompts.styles.STYLES`.
        base: what the full-precision model answers (`answers.ask`), to measure agreement.
        progress: called with (answers given, answers in all).
    """
    answers = ask(model, [row.question for row in rows], limit, batch, style, progress)
    return score(model, rows, answers, style=style, base=base)


def score(model: Model, rows: Sequence[Row], answers: Sequence[Answer], *, style: str = "auto",
          base: Sequence[Answer] | None = None) -> BelleScores:
    """Score answers that the model gave; arguments as for `evaluate`."""
    referenced = [(row, answer) for row, answer in zip(rows, answers, strict=True) if row.std_answer]
    classes = score_classes((row.cls, answer.text, row.std_answer) for row, answer in referenced)
    asked = any(cls in classes for cls in TARGET_CLASSES)
    scored = list(_scored(model, rows, answers, style, base))
    names = dict.fromkeys(row.cls for row in rows)
    by_class = {name: figures(one for row, one in zip(rows, scored, strict=True) if row.cls == name) for name in names}
    return BelleScores(classes, overall(classes) if asked else None, [answer.text for answer in answers],
                       by_class, figures(scored))


def _scored(model: Model, rows: Sequence[Row], answers: Sequence[Answer], style: str,
            base: Sequence[Answer] | None) -> Iterator[Scored]:
    """Every row with what the model thinks of its reference and of the base's answer."""
    prompts = prompt_ids(model, [row.question for row in rows], style)
    texts = [row.std_answer for row in rows]
    references = [ids if text else [] for ids, text in zip(reference_ids(model, texts), texts, strict=True)]
    losses = given_answers(model, prompts, references)
    agreed = given_answers(model, prompts, [answer.ids for answer in base]) if base else [None] * len(rows)
    for row, answer, loss, same in zip(rows, answers, losses, agreed, strict=True):
        yield Scored(row.cls, answer.text, row.std_answer, loss.loss, same.same_top if same else None)


def lines(scores: BelleScores) -> list[list[str]]:
    """A row a class for reading, then one of all; COLUMNS names the cells."""
    rows = [[marked(name), *_cells(found)] for name, found in scores.figures.items()]
    if scores.exact is not None:
        asked = [name for name in scores.classes if name in TARGET_CLASSES]
        answers = sum(scores.classes[name].answers for name in asked)
        rows.append(["all with * together", str(answers), f"{scores.exact:.1f}", *["-"] * 5])
    return [*rows, ["all", *_cells(scores.total)]]


COLUMNS = ("class", "questions", "exact, %", "F1, %", "ROUGE-L, %", "NLL a token", "tokens as base, %",
           "answers as base, %")


def _cells(found: ClassFigures) -> list[str]:
    nll = "-" if found.nll is None else f"{found.nll:.4f} ± {found.nll_error:.4f}"
    measures = (found.exact, found.f1, found.rouge_l, None, found.agreement, found.identical)
    cells = ["-" if value is None else f"{value:.1f}" for value in measures]
    return [str(found.questions), *cells[:3], nll, *cells[4:]]


def marked(cls: str) -> str:
    """A class's name, with a star where it counts in `BelleScores.exact`."""
    return f"{cls} *" if cls in TARGET_CLASSES else cls


def class_name(name: str) -> str:
    """A class as it is compared: BELLE's files write "open qa", "open QA" and "closed\\xa0qa" (a no-break space)."""
    return "_".join(unicodedata.normalize("NFKC", name).lower().split())


def read_rows(path: str | Path, per_class: int | None = None) -> list[Row]:
    """The rows of a JSON Lines file with class, question and std_answer, as BELLE's evaluation set has them.

    Args:
        path: the file; other fields of a row are left alone. std_answer may be empty, null or missing.
        per_class: keep the first so many of each class.
    Raises:
        InputError: it is not there, empty, not JSON, or a row lacks a field; the line is named.
    """
    path = Path(path)
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, value in json_lines(path):
        row = _row(value)
        if row is None:
            raise InputError(f"{path}, line {number} is not a JSON object with {', '.join(FIELDS)} as texts",
                             "Mend or drop that line.")
        seen[row.cls] = seen.get(row.cls, 0) + 1
        if per_class is None or seen[row.cls] <= per_class:
            rows.append(row)
    if not rows:
        raise InputError(f"test file {path} holds no rows", f"Give a JSONL file with {', '.join(FIELDS)}.")
    return rows


def json_lines(path: Path) -> Iterable[tuple[int, Any]]:
    """(line number, value) of a JSON Lines file's lines; None where a line is not JSON.

    Raises:
        InputError: it is not there or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})", "Convert it, e.g. with iconv.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", "Give a JSON Lines file.") from error
    # not splitlines(), which also cuts at U+2028 and its like inside of texts
    return ((number, _value(line)) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _value(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _row(value: Any) -> Row | None:
    if not isinstance(value, dict):
        return None
    cls, question, answer = (value.get(field) for field in FIELDS)
    if not isinstance(cls, str) or not isinstance(question, str) or not isinstance(answer, str | None):
        return None
    return Row(class_name(cls), question, answer if answer and answer.strip() else "")
