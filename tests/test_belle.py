"""eval belle: batched answers are those that come one by one, and rows are read or refused by line."""

import json

import pytest
import torch

from gptq_belle import load
from gptq_belle.errors import InputError, UsageError
from gptq_belle.evaluation.belle import Row, evaluate, greedy_answers, read_rows

QUESTIONS = ["一加一等于几?", "What is the capital of France?", "写一首关于春天的诗。", "a", "北京" * 8]


@pytest.fixture(scope="module", params=["bloom", "llama"])
def model(request):
    return load(request.getfixturevalue(f"tiny_{request.param}"), device="cpu", dtype=torch.float32)


def test_batches_answer_as_one_by_one(model):
    together = dict(zip(*next(greedy_answers(model, QUESTIONS, 12, 8)), strict=True))
    for index, question in enumerate(QUESTIONS):
        alone = model.generate(question, prompt_style="auto", max_new_tokens=12)
        assert together[index] == alone.strip()


def test_scores_by_class_and_in_order_of_rows(model):
    answer = model.generate(QUESTIONS[0], prompt_style="auto", max_new_tokens=8).strip()
    rows = [Row("extract", QUESTIONS[1], "nothing like it"), Row("extract", QUESTIONS[0], answer), Row("code", "b", "")]
    seen = []
    found = evaluate(model, rows, limit=8, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert found.answers[1] == answer
    assert found.classes["extract"].score == 50
    assert found.exact == 50
    assert found.classes["code"].metric == "f1"
    assert seen[-1] == (3, 3)
    assert evaluate(model, rows[2:], limit=2).exact is None


def test_a_question_beyond_the_context_is_refused(model):
    with pytest.raises(UsageError, match="context"):
        list(greedy_answers(model, ["字" * 300], 8, 1))


def test_rows_are_read_by_class(tmp_path):
    path = tmp_path / "test.jsonl"
    rows = [{"class": cls, "question": f"{i}", "std_answer": "x", "more": 1} for i in range(3) for cls in ("a", "b")]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert len(read_rows(path)) == 6
    assert read_rows(path, 1) == [Row("a", "0", "x"), Row("b", "0", "x")]


@pytest.mark.parametrize(("text", "cause"), [("", "no rows"), ('{"class": "a"}', "line 1"), ("[", "line 1")])
def test_damaged_rows_are_refused(tmp_path, text, cause):
    path = tmp_path / "test.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=cause):
        read_rows(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_rows(tmp_path / "absent.jsonl")
