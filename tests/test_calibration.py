"""Calibration files of every accepted form become packed token rows; malformed ones are refused with their line."""

import json
import logging

import pytest
import torch
from conftest import naming, tiny_tokenizer

from gptq_belle import QuantConfig, quantize_checkpoint
from gptq_belle.errors import InputError, UsageError
from gptq_belle.prompts.styles import Turn
from gptq_belle.quantization.calibration.data_files import read_documents
from gptq_belle.quantization.calibration.rows import (
    BUILTIN,
    Calibration,
    calibration_rows,
    check_distinct,
    check_enough,
    first_token_ids,
)
from gptq_belle.quantization.job import prepare_job


def tokens(source, style="bloom", **options):
    settings = {"rows": 4, "seq_len": 16} | options
    return calibration_rows(Calibration(source, **settings), tiny_tokenizer(), style).tokens


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
    assert read_documents(file).documents == [
        "平文", [Turn("翻译\n猫", "cat")], [Turn("写诗", "春风")], [Turn("你好", "好")], [Turn("一加一", "二")],
        [Turn("a", "b"), Turn("c", "d")]]


def test_json_array_is_read_like_json_lines(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"text": "a"}, {"text": "b"}]), encoding="utf-8")
    assert read_documents(file).documents == ["a", "b"]


def test_chats_get_the_belle_prompt_and_plain_text_does_not(tmp_path):
    tokenizer = tiny_tokenizer()
    file = jsonl(tmp_path, {"instruction": "问", "output": "答"})
    rows = tokens(file)
    assert tokenizer.decode(rows.flatten()).startswith("Human: 问\n\nAssistant:")
    rows = tokens(jsonl(tmp_path, {"instruction": "问", "output": "答", "system": "简短。", "history": [["前", "后"]]}))
    assert tokenizer.decode(rows.flatten()).startswith("Human: 简短。\n前\n\nAssistant:后</s>Human: 问\n\nAssistant:")
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
                     for d in read_documents(BUILTIN).documents)
    assert characters > 130_000  # 4 x 16,384 inputs of dense_4h_to_h is 65,536 tokens


def test_repeated_rows_count_once_and_are_reported(tmp_path):
    different = [{"text": f"第{i}句话"} for i in range(3)]
    rows = calibration_rows(Calibration(jsonl(tmp_path, *different), rows=1), tiny_tokenizer(), "bloom")
    repeated = calibration_rows(Calibration(jsonl(tmp_path, *different, *different[:2], different[0]), rows=1),
                                tiny_tokenizer(), "bloom")
    assert torch.equal(rows.tokens, repeated.tokens)
    assert rows.notes == []
    assert "3 of 6 rows" in repeated.notes[0]


@pytest.mark.parametrize("text", ["哈" * 4000, "好" * 9, "a b " * 4000])
def test_rows_of_nearly_one_token_are_refused(tiny_llama, tmp_path, text):
    file = jsonl(tmp_path, *[{"text": text}] * 50)
    with pytest.raises(InputError, match=naming("distinct", 8)):
        prepare_job(tiny_llama, QuantConfig(), Calibration(file, 4, 64, allow_short=True), "cpu")


def test_more_rows_need_more_distinct_tokens():
    check_distinct(torch.arange(8).repeat(64)[None])
    check_distinct(torch.arange(64).repeat(100)[None])
    for distinct, count in ((7, 7), (15, 1024), (63, 1 << 20)):
        with pytest.raises(InputError, match=naming(distinct, count)):
            check_distinct((torch.arange(count) % distinct)[None])


def test_remarks_are_in_the_report_and_the_log(tiny_llama, tmp_path, caplog):
    file = jsonl(tmp_path, *[{"instruction": f"第{i % 30}个问题", "output": "回答" * 9, "id": i} for i in range(60)])
    report = quantize_checkpoint(tiny_llama, tmp_path / "out", QuantConfig(preset="fast"), device="cpu",
                                 calibration=Calibration(file, 2, 64, allow_short=True))
    assert report.notes == [record.getMessage() for record in caplog.records if record.name == "gptq_belle"]
    assert ["id (60)" in report.notes[0], "30 of 60" in report.notes[1]] == [True, True]


def test_rows_are_no_longer_than_the_context(tiny_bloom, tmp_path):
    file = jsonl(tmp_path, *({"text": f"第{i}句话，一共有很多句。"} for i in range(200)))
    job = prepare_job(tiny_bloom, QuantConfig(), Calibration(file, 2, 2048, allow_short=True), "cpu")
    assert job.tokens.shape == (2, 256)


def test_only_the_beginning_of_a_long_text_is_tokenized(tmp_path, caplog, monkeypatch):
    tokenizer, text = tiny_tokenizer(), "".join(f"第{i}句话很短。" for i in range(60_000))
    tokenizer.model_max_length = 64  # transformers warns of longer sequences
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    rows = calibration_rows(Calibration(tmp_path / "a.txt", 4, 512), tokenizer, "bloom")
    assert not caplog.records
    assert rows.tokens.flatten().tolist() == tokenizer(text[:20_000])["input_ids"][: 4 * 512]
    assert len(rows.documents[0]) < len(text) / 4
    ids, read = first_token_ids(tokenizer, text, 100_000)
    assert ids[:100_000] == tokenizer(text)["input_ids"][:100_000]
    assert len(ids) >= 100_000
    assert read < len(text)
