"""Text that a checkpoint was calibrated on, by its quantization report, is rejected with the row numbers."""

import json

import pytest
from conftest import naming

from gptq_belle import Calibration, QuantConfig, quantize_checkpoint
from gptq_belle.errors import InputError
from gptq_belle.prompts.styles import Turn
from gptq_belle.quantization.calibration.overlap import recorded_keys, refuse_overlap

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
