"""BELLE's table: published sizes, our computed sizes compared with written files, and measured directories."""

import json
import sys
from pathlib import Path

import pytest
from conftest import naming

from gptq_belle.bench import belle_table
from gptq_belle.bench.belle_table import GIB, TABLE
from gptq_belle.bench.footprint import Footprint
from gptq_belle.checkpoint.reader import read_config
from gptq_belle.errors import UsageError
from gptq_belle.models.dimensions import dimensions
from gptq_belle.models.sizes import file_bytes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import make_model

BELLE = dimensions(read_config("belle-7b"))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_file_sizes_are_those_of_files(tmp_path, bits):
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": 640, "hidden_size": 256, "num_hidden_layers": 3,
        "intermediate_size": 384, "num_attention_heads": 4, "tie_word_embeddings": False}))
    written = make_model.make(tmp_path, tmp_path / "out", bits=bits)
    header = int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little") + 8
    assert file_bytes(dimensions(read_config(tmp_path)), bits) == written - header


def test_file_sizes_of_belle_7b():
    assert file_bytes(BELLE, 4) < 5.3e9
    assert file_bytes(BELLE, 4, head_bits=8) < 4.3e9
    assert file_bytes(BELLE, 8) < 8.3e9
    for row in TABLE[1:5]:
        assert file_bytes(BELLE, row.bits) < row.file * GIB


def test_table_without_directories_is_computed_from_sizes():
    rows = belle_table.belle_table([], 516, "cpu")
    assert [row for row, _ in rows] == list(TABLE)
    assert all(ours.measured is None for _, ours in rows)
    assert {line[-1] for line in belle_table.cells(rows)[1]} == {"computed"}


def directory(path, name, bits, blocks=None):
    config = read_config(name) | ({"n_layer": blocks} if blocks else {})
    if bits != 16:
        config["quantization_config"] = {"bits": bits}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(b"\0" * 1000)
    return path


def test_measured_directory_appears_in_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(belle_table.footprint, "measure_in_new_process",
                        lambda path, **options: Footprint(1.0, 2, 3, 4 * GIB, None))
    path = directory(tmp_path / "four", "belle-7b", 4)
    rows = belle_table.belle_table([path], 516, "cpu")
    assert [ours.measured == path for _, ours in rows] == [False, False, True, False, True, False]
    assert belle_table.cells(rows)[1][2][1:] == ["6.9", "0.0", "8.4", "4.0", f"measured, {path}"]
    with pytest.raises(UsageError, match=naming(tmp_path / "cut")):
        belle_table.belle_table([directory(tmp_path / "cut", "belle-7b", 4, blocks=2)], 516, "cpu")


def test_bench_table_command(belle):
    code, out, _ = belle("bench", "--table", "belle", "--device", "cpu")
    assert code == 0
    assert "bloom7b-2m-4bit-128g.pt" in out
    assert belle("bench", "--table", "other")[0] == 2
    assert belle("bench")[0] == 2
