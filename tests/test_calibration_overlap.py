"""Text that a checkpoint was calibrated on is found again in other formatting, and rejected with the row numbers."""

import base64
import json

import pytest
from conftest import naming

from gptq_belle import Calibration, QuantConfig, quantize_checkpoint
from gptq_belle.errors import InputError
from gptq_belle.prompts.styles import Turn
from gptq_belle.quantization.calibration.overlap import (
    KEY_BYTES,
    document_keys,
    overlapping_rows,
    recorded_keys,
    refuse_overlap,
)

CHAT = [Turn("把下面的句子翻译成英文：我爱北京。", "I love Beijing."), Turn("再举一个这样的例子吧", "好的。")]
TEXT = "人工智能正在改变我们的生活和工作。\n标题\nThe quick brown fox jumps over the lazy dog. And again it does so!"
QUESTIONS = [f"请写一句关于第{number}个城市的话。" for number in range(12)]


@pytest.fixture(scope="module")
def quantized(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("overlap")
    rows = [{"instruction": question, "output": "很好。"} for question in QUESTIONS]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    calibration = Calibration(folder / "rows.jsonl", rows=2, seq_len=64, allow_short=True)
    quantize_checkpoint(tiny_llama, folder / "out", QuantConfig(group_size=32), calibration=calibration, device="cpu")
    return folder / "out"


def test_only_used_calibration_rows_count(quantized):
    """128 calibration tokens contain the first questions; later ones were not used."""
    found = []
    for question in QUESTIONS:
        try:
            refuse_overlap([quantized], "t.jsonl", [[Turn(question, "")]])
        except InputError:
            found.append(question)
    assert 0 < len(found) < len(QUESTIONS)
    with pytest.raises(InputError, match=naming(len(found), 13, "t.jsonl", quantized)):
        refuse_overlap([quantized], "t.jsonl", [[Turn("另外一个完全不同的问题", "")],
                                               *([Turn(question, "")] for question in QUESTIONS)])


def test_models_without_a_record_are_accepted(tiny_llama, quantized, tmp_path):
    refuse_overlap([tiny_llama], "t.txt", [QUESTIONS[0]])
    assert recorded_keys(tiny_llama) is None
    for report in ({"calibration": None}, {"calibration": {"source": "builtin"}}, {}):
        (tmp_path / "quantization_report.json").write_text(json.dumps(report))
        refuse_overlap([tmp_path], "t.txt", [QUESTIONS[0]])


def test_damaged_record_is_an_input_error(tmp_path):
    (tmp_path / "quantization_report.json").write_text('{"calibration": {"seen": "?"}}')
    with pytest.raises(InputError, match=naming(tmp_path)):
        refuse_overlap([tmp_path], "t.txt", ["x" * 40])


@pytest.mark.parametrize("document", [
    [Turn("把下面的句子翻译成英文：我爱北京。", "")], [Turn("把下面的句子 翻译成英文:我爱北京", "other")],
    [Turn("新的问题一二三四五", "x"), CHAT[1]], [Turn("1+1=?", "2")], "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG",
    "前言不算。人工智能正在改变我们的生活和工作！后面是别的。",
])
def test_seen_text_is_found(document):
    rows, _ = overlapping_rows(document_keys([CHAT, TEXT, [Turn("1+1=?", "2")]]), [document])
    assert rows == [1]


@pytest.mark.parametrize("document", [
    [Turn("把下面的句子翻译成英文：我爱上海。", "I love Beijing.")], [Turn("再举一个这样的例子吧", "没有了。")],
    [Turn("1+1=?", "3")], [Turn("一个足够长的新问题呢?", "x"), Turn("1+1=?", "2")], "标题",
    "I love Beijing.", "人工智能正在改变我们的生活", [Turn("48+23等于多少呢?", "71")],
])
def test_other_text_is_not(document):
    seen = document_keys([CHAT, TEXT, [Turn("48-23等于多少呢?", "25")], [Turn("1+1=?", "2")]])
    assert overlapping_rows(seen, [document])[0] == []


def test_rows_are_numbered_and_counted():
    other = [Turn("完全没有见过的问题是什么?", "x")]
    assert overlapping_rows(document_keys([CHAT, TEXT]), [other, CHAT, other, TEXT]) == ([2, 4, 5, 6], 6)


def test_record_is_small_and_sorted():
    documents = [[Turn(f"第{number}个足够长的问题", "")] for number in range(1000)]
    seen = document_keys(documents)
    assert len(seen) < 7 * 1000
    assert seen == document_keys(reversed(documents))
    assert len(base64.b64decode(seen)) == KEY_BYTES * 1000
    assert overlapping_rows(seen, documents) == (list(range(1, 1001)), 1000)


@pytest.mark.parametrize("damaged", ["???", "QUJD"])
def test_a_damaged_record_is_refused(damaged):
    with pytest.raises(ValueError, match=r"."):
        overlapping_rows(damaged, [TEXT])
