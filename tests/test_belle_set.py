"""eval belle: every metric by class, and questions that are read or rejected by line."""

import json

import pytest
import torch
from conftest import naming

from gptq_belle import load
from gptq_belle.errors import InputError
from gptq_belle.evaluation.answer_metrics import rouge_l
from gptq_belle.evaluation.belle_answers import GreedyAnswer, answer_questions
from gptq_belle.evaluation.belle_set import (
    COLUMNS,
    BelleQuestion,
    evaluate,
    format_scores,
    normalize_class,
    read_questions,
)

QUESTIONS = ["一加一等于几?", "What is the capital of France?", "写一首关于春天的诗。", "a", "北京" * 8]


@pytest.fixture(scope="module")
def model(tiny_bloom):
    return load(tiny_bloom, device="cpu", dtype=torch.float32)


def test_scores_by_class_and_in_order_of_rows(model):
    answer = model.generate(QUESTIONS[0], prompt_style="auto", max_new_tokens=8).strip()
    rows = [BelleQuestion("extract", QUESTIONS[1], "nothing like it"), BelleQuestion("extract", QUESTIONS[0], answer),
            BelleQuestion("code", "b", "x"), BelleQuestion("generation", "c", "")]
    seen = []
    found = evaluate(model, rows, limit=8, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert found.answers[1] == answer
    assert found.classes["extract"].score == 50
    assert found.exact == 50
    assert found.classes["code"].metric == "f1"
    assert "generation" not in found.classes
    assert seen[-1] == (4, 4)
    assert evaluate(model, rows[2:], limit=2).exact is None
    metrics = found.figures["extract"]
    assert (metrics.questions, metrics.references, metrics.exact) == (2, 2, 50)
    assert 50 <= metrics.rouge_l == pytest.approx((100 + 100 * rouge_l(found.answers[0], "nothing like it")) / 2)
    assert found.figures["generation"].exact is found.figures["generation"].nll is None
    assert (found.total.questions, found.total.references) == (4, 3)
    assert found.total.agreement is None
    assert {len(row) for row in format_scores(found)} == {len(COLUMNS)}
    assert [row[0] for row in format_scores(found)] == ["extract *", "code", "generation", "all with * together", "all"]


def test_agreement_with_answers_of_the_base_model(model):
    rows = [BelleQuestion("a", question, "") for question in QUESTIONS]
    own = answer_questions(model, QUESTIONS, 10, 2)
    found = evaluate(model, rows, limit=10, base=own)
    assert found.total.agreement == found.total.identical == 100
    last_differs = [GreedyAnswer("", [*answer.ids[:-1], (answer.ids[-1] + 1) % 384]) for answer in own]
    found = evaluate(model, rows, limit=10, base=last_differs)
    assert found.total.identical == 0
    tokens = sum(len(answer.ids) for answer in own)
    assert found.total.agreement == pytest.approx(100 * (1 - len(own) / tokens))


def test_questions_are_read_by_class(tmp_path):
    path = tmp_path / "test.jsonl"
    rows = [{"class": cls, "question": f"{i}", "std_answer": "x", "more": 1} for i in range(3) for cls in ("a", "b")]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert len(read_questions(path)) == 6
    assert read_questions(path, 1) == [BelleQuestion("a", "0", "x"), BelleQuestion("b", "0", "x")]


@pytest.mark.parametrize(("text", "cause"), [("", "test.jsonl"), ('{"class": "a"}', "line 1"), ("[", "line 1"),
                                                ('{"class": "a", "question": "b", "std_answer": 3}', "line 1")])
def test_damaged_questions_are_rejected(tmp_path, text, cause):
    path = tmp_path / "test.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=naming(path, cause)):
        read_questions(path)
    with pytest.raises(InputError, match=naming(tmp_path / "absent.jsonl")):
        read_questions(tmp_path / "absent.jsonl")


def test_irregularities_of_the_published_belle_file_are_read(tmp_path):
    """Its classes contain a space or a no-break space; open questions have an empty answer or none."""
    path = tmp_path / "eval_set.json"
    lines = [{"question": "一\u2028二", "std_answer": "a", "class": "closed\xa0qa"},
             {"question": "q", "std_answer": " ", "class": "open qa"},
             {"question": "q", "std_answer": None, "class": "Brainstorming "}, {"question": "q", "class": "open QA"}]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    assert read_questions(path) == [BelleQuestion("closed_qa", "一\u2028二", "a"), BelleQuestion("open_qa", "q", ""),
                               BelleQuestion("brainstorming", "q", ""), BelleQuestion("open_qa", "q", "")]
    assert normalize_class("closed\xa0QA") == normalize_class("closed_qa") == "closed_qa"


def test_questions_of_an_array_are_read_and_invalid_text_is_rejected(tmp_path):
    row = {"class": "a", "question": "b", "std_answer": "x"}
    path = tmp_path / "test.txt"
    path.write_text(json.dumps([row, row]))
    assert read_questions(path) == [BelleQuestion("a", "b", "x")] * 2
    for text, cause in ((json.dumps([row, row | {"question": "\ud83d"}]), "row 2"), ("[" * 100_000, "line 1")):
        path.write_text(text)
        with pytest.raises(InputError, match=naming(path, cause)):
            read_questions(path)
