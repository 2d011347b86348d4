"""Conversations are paired by role and not by position; every message is used, counted, or refused by name."""

import json

import pytest
from conftest import naming

from gptq_belle.errors import InputError
from gptq_belle.prompts.styles import Turn
from gptq_belle.quantization.calibration.data_files import read_documents, without_repeats

HUMAN, GPT = {"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}
USER, ASSISTANT = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}
PAIR = {"instruction": "问", "input": "", "output": "答"}


def read(tmp_path, *rows):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_documents(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(("row", "turns"), [
    ({"conversations": [{"from": "system", "value": "系统"}, HUMAN, GPT]}, [Turn("问", "答", "系统")]),
    ({"messages": [{"role": "developer", "content": "系统"}, USER, ASSISTANT]}, [Turn("问", "答", "系统")]),
    ({"messages": [USER, ASSISTANT]}, [Turn("问", "答")]), ({"conversations": [USER, ASSISTANT]}, [Turn("问", "答")]),
    ({"messages": [HUMAN, GPT]}, [Turn("问", "答")]), ([USER, ASSISTANT], [Turn("问", "答")]),
    ({"conversation": [{"human": "问", "assistant": "答"}] * 2}, [Turn("问", "答")] * 2),
    ({"messages": [USER | {"role": "User"}, USER, ASSISTANT, ASSISTANT]}, [Turn("问\n问", "答\n答")]),
    ({"messages": [USER, {"role": "assistant", "content": None}, USER, ASSISTANT]}, [Turn("问\n问", "答")]),
    ({"messages": [USER, {"role": "system", "content": "系统"}, ASSISTANT]}, [Turn("问\n系统", "答")]),
    ({"messages": [USER | {"content": [{"type": "text", "text": "问"}]}, ASSISTANT]}, [Turn("问", "答")]),
    ({"system": "系统", "conversations": [HUMAN, GPT]}, [Turn("问", "答", "系统")]),
    (PAIR | {"system_prompt": "系统"}, [Turn("问", "答", "系统")]),
    (PAIR | {"history": [["前", "后"]]}, [Turn("前", "后"), Turn("问", "答")]),
    (PAIR | {"history": [USER, ASSISTANT], "system": "系统"}, [Turn("问", "答", "系统"), Turn("问", "答")]),
    (PAIR | {"instruction": "Human:前\nAssistant:后\nHuman: 问\nAssistant:"}, [Turn("前", "后"), Turn("问", "答")]),
    ({"input": "Human: 问 \n\nAssistant: ", "target": "答"}, [Turn("问", "答")]),
    (PAIR | {"instruction": "问 Human: 谁？\nHuman: 我"}, [Turn("问 Human: 谁？\nHuman: 我", "答")]),
    ({"instruction": "问", "instances": [{"input": "", "output": "答"}, {"input": "一", "output": "二"}]},
     [Turn("问", "答"), Turn("问\n一", "二")]),
    ({"prompt": "问", "response": "答", "history": []}, [Turn("问", "答")]),
])
def test_turns_are_paired_by_role(tmp_path, row, turns):
    assert read(tmp_path, row) == ([turns], [])


@pytest.mark.parametrize(("row", "named"), [
    ({"conversations": [HUMAN, {"from": "function_call", "value": "{}"}]}, "function_call"),
    ({"messages": [USER, {"role": "tool", "content": "2"}]}, "tool"),
    ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}, "tool_calls"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ASSISTANT]}, "image_url"),
    ({"messages": [{"content": "问"}, ASSISTANT]}, "role"), ({"conversations": ["问", "答"]}, "message"),
    ({"messages": [{"role": "user"}, ASSISTANT]}, "content"), (PAIR | {"history": "前"}, "history"),
    (PAIR | {"input": 5}, "input"), (PAIR | {"output": 5}, "output"), ({"system": {}, "text": 1}, "form")])
def test_what_no_style_expresses_is_refused_by_name(tmp_path, row, named):
    with pytest.raises(InputError, match=naming(tmp_path / "rows.jsonl", "line 2", named)):
        read(tmp_path, PAIR, row)


def test_everything_that_is_left_out_is_counted(tmp_path):
    documents, notes = read(
        tmp_path, {"text": " \n"}, {"conversations": []}, PAIR | {"output": None}, {"messages": [GPT | {"id": 1}]},
        {"conversations": [GPT, HUMAN, GPT, HUMAN]}, PAIR | {"tools": ["f"], "id": 7, "note": ""}, PAIR | {"id": 8})
    assert documents == [[Turn("问", "答")]] * 3
    empty, cut, unused = notes
    assert "4 of 7 rows" in empty
    assert "2 messages" in cut
    assert "id (2), tools (1)" in unused
    assert "note" not in unused
    assert without_repeats([*documents, "a", "b", "a"]) == [[Turn("问", "答")], "a", "b"]


def test_file_of_empty_rows_is_refused(tmp_path):
    with pytest.raises(InputError, match=naming(tmp_path / "rows.jsonl")):
        read(tmp_path, {"text": ""}, {"messages": []}, {"messages": [USER]})
