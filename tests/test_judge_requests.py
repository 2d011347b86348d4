"""Requests for a judging model: text and fields of BELLE's page, from its file of prompts."""

import json

import pytest
from conftest import naming

from gptq_belle.errors import InputError
from gptq_belle.evaluation.belle_set import BelleQuestion
from gptq_belle.evaluation.judge_requests import judge_requests, read_instructions, write_requests

PROMPTS = [{"class": "closed\xa0QA", "prompt": "打分一。"}, {"class": "rewrite", "prompt": "打分二。"}]


@pytest.fixture
def instructions(tmp_path):
    path = tmp_path / "eval_prompt.json"
    path.write_text("\n".join(json.dumps(one, ensure_ascii=False) for one in PROMPTS) + "\n", encoding="utf-8")
    return read_instructions(path)


def test_text_and_body_of_a_request(instructions, tmp_path):
    rows = [BelleQuestion("closed_qa", "问？", "标准"), BelleQuestion("rewrite", "改写", "不看")]
    write_requests(tmp_path / "out.jsonl", judge_requests(rows, ["答", "改"], instructions))
    with_reference, without = map(json.loads, (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")[:2])
    assert with_reference == {
        "class": "closed\xa0QA", "question": "问？", "std_answer": "标准", "answer": "答",
        "body": {"model": "gpt-3.5-turbo", "temperature": 0.0, "max_tokens": 3000, "messages": [
            {"role": "user", "content":
             "打分一。 问？ 标准回答:标准  模型回答：' 答'。请针对模型回答给出得分，顺便给出理由："}]}}
    assert without["body"]["messages"][0]["content"] == (
        "打分二。 改写  模型回答： '改'。请针对模型回答给出得分，顺便给出理由：")


def test_unusable_judge_prompts_are_rejected(instructions, tmp_path):
    with pytest.raises(InputError, match=naming("math")):
        list(judge_requests([BelleQuestion("math", "1", "2")], ["3"], instructions))
    path = tmp_path / "wrong.json"
    path.write_text('{"class": "a", "prompt": "b"}\n{"class": "a"}', encoding="utf-8")
    with pytest.raises(InputError, match=naming(path, "line 2")):
        read_instructions(path)
    with pytest.raises(InputError, match=naming(tmp_path / "absent")):
        read_instructions(tmp_path / "absent")
