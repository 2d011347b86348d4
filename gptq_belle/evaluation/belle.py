"""`eval belle`: greedy answers to questions in the model's own prompt style, scored by class."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from gptq_belle.errors import InputError, UsageError
from gptq_belle.evaluation.score import TARGET_CLASSES, ClassScore, overall, score_classes
from gptq_belle.runtime.chat import StopStrings, Turn, render, style_named
from gptq_belle.runtime.engine import Model

FIELDS = ("class", "question", "std_answer")


class Row(NamedTuple):
    """One question of a test set."""

    cls: str
    question: str
    std_answer: str


@dataclass(frozen=True, slots=True)
class BelleScores:
    """Scores of one model.

    Attributes:
        classes: in percent, with metric and number of answers.
        exact: percent of right answers over the classes that have one right answer; None where none was asked.
        answers: in the order of the rows.
    """

    classes: dict[str, ClassScore]
    exact: float | None
    answers: list[str]


def evaluate(model: Model, rows: Sequence[Row], *, limit: int = 160, batch: int = 32, style: str = "auto",
             progress: Callable[[int, int], None] | None = None) -> BelleScores:
    """Ask every question and score the answers.

    Args:
        model: from `gptq_belle.load`.
        rows: see `read_rows`.
        limit: the most tokens of an answer.
        batch: questions answered at a time; the longest answer of a batch sets its time.
        style: "auto" or a key of `runtime.chat.STYLES`.
        progress: called with (answers given, answers in all).
    """
    found = [""] * len(rows)
    done = 0
    for members, answers in greedy_answers(model, [row.question for row in rows], limit, batch, style):
        for index, answer in zip(members, answers, strict=True):
            found[index] = answer
        done += len(members)
        if progress:
            progress(done, len(rows))
    scores = score_classes((row.cls, answer, row.std_answer) for row, answer in zip(rows, found, strict=True))
    asked = any(cls in scores for cls in TARGET_CLASSES)
    return BelleScores(scores, overall(scores) if asked else None, found)


def lines(scores: BelleScores) -> list[tuple[str, str, str, str]]:
    """A row a class for reading: name, measure, score in percent, answers; at the end the exact classes together."""
    rows = [(marked(name), score.metric, f"{score.score:.1f}", str(score.answers))
            for name, score in scores.classes.items()]
    if scores.exact is not None:
        answers = sum(score.answers for name, score in scores.classes.items() if name in TARGET_CLASSES)
        rows.append(("all with * together", "exact", f"{scores.exact:.1f}", str(answers)))
    return rows


def marked(cls: str) -> str:
    """A class's name, with a star where it counts in `BelleScores.exact`."""
    return f"{cls} *" if cls in TARGET_CLASSES else cls


def greedy_answers(model: Model, questions: Sequence[str], limit: int, batch: int,
                   style: str = "auto") -> Iterator[tuple[list[int], list[str]]]:
    """Batches of (which questions, their answers), the shortest prompts first, so that batches pad little."""
    name = model.prompt_style if style == "auto" else style
    frame, tokenizer = style_named(name), model.tokenizer
    texts = [render([Turn(question)], name, tokenizer.eos_token) for question in questions]
    ids = [tokenizer(text, add_special_tokens=frame.special_tokens)["input_ids"] for text in texts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for members in (order[start : start + batch] for start in range(0, len(order), batch)):
        rows = _generate(model, [ids[i] for i in members], limit)
        yield members, [_shown(str(tokenizer.decode(row, skip_special_tokens=True)), frame.stops) for row in rows]


@torch.inference_mode()
def _generate(model: Model, prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
    """Up to `limit` greedy tokens behind each prompt, eos included."""
    width = max(map(len, prompts))
    if model.context is not None and width + limit > model.context:
        raise UsageError(f"a question of {width} tokens and an answer of {limit} exceed the context {model.context}",
                         "Lower --max-tokens, or leave the longest questions out.")
    cache = model.new_cache(len(prompts), width + limit)
    logits = torch.cat([model.read(torch.tensor(list(prompt), device=model.device), cache, slot)
                        for slot, prompt in enumerate(prompts)])
    answers: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    while going:
        tokens = logits.argmax(-1)
        for slot, token in zip(going, tokens.tolist(), strict=True):
            answers[slot].append(token)
        kept = [i for i, slot in enumerate(going)
                if answers[slot][-1] not in model.eos_ids and len(answers[slot]) < limit]
        going = [going[i] for i in kept]
        if going:
            lengths = [len(prompts[slot]) + len(answers[slot]) - 1 for slot in going]
            logits = model.step(tokens[kept], cache, going, lengths)
    return answers


def _shown(text: str, stops: Sequence[str]) -> str:
    stream = StopStrings(stops)
    return (stream.feed(text) + stream.finish()).strip()


def read_rows(path: str | Path, per_class: int | None = None) -> list[Row]:
    """The rows of a JSON Lines file with class, question and std_answer, as BELLE's evaluation set has them.

    Args:
        path: the file; other fields of a row are left alone.
        per_class: keep the first so many of each class.
    Raises:
        InputError: it is not there, empty, not JSON, or a row lacks a field; the line is named.
    """
    path = Path(path)
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        row = _row(line)
        if row is None:
            raise InputError(f"{path}, line {number} is not a JSON object with {', '.join(FIELDS)} as texts",
                             "Mend or drop that line.")
        seen[row.cls] = seen.get(row.cls, 0) + 1
        if per_class is None or seen[row.cls] <= per_class:
            rows.append(row)
    if not rows:
        raise InputError(f"test file {path} holds no rows", f"Give a JSONL file with {', '.join(FIELDS)}.")
    return rows


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})", "Convert it, e.g. with iconv.") from error
    except OSError as error:
        raise InputError(f"test file {path} cannot be read: {error.strerror}",
                         f"Give a JSONL file with {', '.join(FIELDS)}.") from error


def _row(line: str) -> Row | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict) or not all(isinstance(value.get(field), str) for field in FIELDS):
        return None
    return Row(*(value[field] for field in FIELDS))
