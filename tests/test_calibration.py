"""Calibration files of every accepted form become packed token rows; malformed ones are refused with their line."""

import json

import pytest
from conftest import naming, tiny_tokenizer

from gptq_belle.errors import InputError, UsageError
from gptq_belle.prompts.styles import Turn
from gptq_belle.quantization.calibration import BUILTIN, Calibration, calibration_tokens, check_enough, read_documents


def tokens(source, style="bloom", **options):
    settings = {"rows": 4, "seq_len": 16} | options
    return calibration_tokens(Calibration(source, **settings), tiny_tokenizer(), style)


def jsonl(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return file


def test_every_form_of_row_is_read(tmp_path):
    file = jsonl(
        tmp_path, {"text": "平文"}, {"instruction": "翻译", "input": "猫", "output": "cat"},
        {"instruction": "写诗", "input": "", "output": "春风"}, {"input": "Human: 你好\n\nAssistant:", "target": "好"},
        {"question": "一加一", "std_answer": "二", "class": "math"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "assistant", "value": "b"},
                           {"from": "human", "value": "c"}, {"from": "assistant", "value": "d"}]})
    assert read_documents(file) == [
        "平文", [Turn("翻译\n猫", "cat")], [Turn("写诗", "春风")], [Turn("你好", "好")], [Turn("一加一", "二")],
        [Turn("a", "b"), Turn("c", "d")]]


def test_json_array_is_read_like_json_lines(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"text": "a"}, {"text": "b"}]), encoding="utf-8")
    assert read_documents(file) == ["a", "b"]


def test_chats_get_the_belle_prompt_and_plain_text_does_not(tmp_path):
    tokenizer = tiny_tokenizer()
    file = jsonl(tmp_path, {"instruction": "问", "output": "答"})
    rows = tokens(file)
    assert tokenizer.decode(rows.flatten()).startswith("Human: 问\n\nAssistant:")
    text = tmp_path / "plain.txt"
    text.write_text("只是文字" * 8, encoding="utf-8")
    rows = tokens(text)
    assert tokenizer.decode(rows.flatten()).startswith("只是文字")


def test_rows_are_packed_whole_with_eos_between_documents(tmp_path):
    tokenizer = tiny_tokenizer()
    file = jsonl(tmp_path, *({"text": f"第{i}句话"} for i in range(40)))
    rows = tokens(file)
    assert rows.shape == (4, 16)
    assert not (rows == tokenizer.pad_token_id).any()
    assert (rows == tokenizer.eos_token_id).any()


def test_seed_determines_the_order(tmp_path):
    file = jsonl(tmp_path, *({"text": f"第{i}句话"} for i in range(40)))
    first, again = (tokens(file) for _ in range(2))
    other = tokens(file, seed=1)
    digests = [Calibration(file).describe(rows)["sha256"] for rows in (first, again, other)]
    assert digests[0] == digests[1] != digests[2]


def test_short_text_gives_one_shorter_row(tmp_path):
    file = jsonl(tmp_path, {"text": "短"})
    rows = tokens(file)
    assert rows.shape[0] == 1
    assert rows.shape[1] < 16


def test_too_few_calibration_tokens_are_refused(tmp_path):
    file = jsonl(tmp_path, *({"text": f"第{i}句话"} for i in range(40)))
    rows = tokens(file)
    check_enough(rows, 16, "mlp")
    with pytest.raises(InputError, match=naming(64, "mlp", 17, 68)):
        check_enough(rows, 17, "mlp")


@pytest.mark.parametrize(("name", "content", "place"), [
    ("empty.txt", b" \n", "empty.txt"), ("empty.jsonl", b"\n\n", "empty.jsonl"),
    ("latin.txt", b"caf\xe9", "UTF-8"), ("broken.jsonl", b'{"text": "a"}\n{"text": ', "line 2"),
    ("kind.jsonl", b'{"text": "a"}\n{"prompt": "b"}', "line 2"),
    ("list.json", b"[1]", "row 1"), ("chat.jsonl", b'{"conversations": [{"from": "human"}]}', "line 1"),
    ("broken.json", b"[{]", "JSON")])
def test_unusable_calibration_file_is_refused(tmp_path, name, content, place):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=naming(tmp_path / name, place)):
        tokens(tmp_path / name)


def test_missing_file_and_zero_rows_are_refused(tmp_path):
    with pytest.raises(InputError, match=naming(tmp_path / "none.txt")):
        read_documents(tmp_path / "none.txt")
    with pytest.raises(UsageError):
        tokens(BUILTIN, rows=0)


def test_the_builtin_rows_are_enough_for_belle_7b():
    characters = sum(len(d) if isinstance(d, str) else sum(len(t.question) + len(t.answer) for t in d)
                     for d in read_documents(BUILTIN))
    assert characters > 130_000  # 4 x 16,384 inputs of dense_4h_to_h is 65,536 tokens
