"""bench: every figure is measured, formats hold them, and the sentence on what bounds it follows from the numbers."""

import csv
import io
import json
import math
import sys
import time
from unittest.mock import patch

import pytest
import torch
from conftest import packed_checkpoint

from gptq_belle import load
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.errors import HardwareError, InputError, UsageError
from gptq_belle.measure import bench_output, peak
from gptq_belle.measure.bandwidth import buffer_bytes, read_bandwidth
from gptq_belle.measure.bench import Workload, bench, fitted
from gptq_belle.measure.bound import StepProfile, explain
from gptq_belle.measure.timing import seconds, spread

MIB = 1 << 20


@pytest.fixture(scope="module")
def measured(tiny_llama, tmp_path_factory):
    packed = packed_checkpoint(tiny_llama, tmp_path_factory.mktemp("bench") / "packed")
    with patch("gptq_belle.measure.bandwidth.buffer_bytes", lambda: 16 * MIB):
        return bench([tiny_llama, packed], Workload(prompt=16, tokens=4, batch=2, repeats=2), device="cpu")


def test_both_models_are_measured(measured):
    full, packed = measured.results
    assert (full.bits, packed.bits) == (None, 4)
    for result in measured.results:
        assert len(result.decode.values) == len(result.prefill.values) == 2
        assert result.decode.low <= result.decode.median <= result.decode.high
        assert result.prefill.values == pytest.approx([2 * 16 / time for time in result.first_token.values])
        assert result.achieved == pytest.approx(result.weight_bytes * result.decode.median / 2)
        assert result.footprint.load_seconds > 0
    assert packed.weight_bytes < full.weight_bytes
    assert measured.bandwidth.median > 1e8


def test_bytes_of_a_step_count_a_tied_embedding_once_and_no_lookup_table(tiny_model):
    model, numbers = load(tiny_model, device="cpu"), CheckpointReader(tiny_model)
    total = sum(math.prod(numbers.shape(name)) for name in numbers) * 4
    embedding = 0 if model.config.get("tie_word_embeddings", True) else 384 * 128
    assert (model.weight_bytes, model.step_bytes) == (total - 2 * embedding, total - 4 * embedding)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_fresh_process_sees_the_model_and_little_else(measured):
    for result in measured.results:
        assert 0 <= result.footprint.peak_bytes < 64 * MIB
        assert result.footprint.process_bytes > result.footprint.peak_bytes + 50 * MIB


@pytest.mark.parametrize(("script", "error"), [("echo why >&2; exit 4", InputError), ("kill -9 $$", HardwareError)])
def test_a_process_that_fails_is_reported(tmp_path, monkeypatch, script, error):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(error, match="why" if error is InputError else "signal 9"):
        peak.fresh("model", device="cpu")


def test_rows_for_programs(measured, capsys):
    bench_output.show(measured, "jsonl")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    bench_output.show(measured, "csv")
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    bench_output.show(measured, "json")
    whole = json.loads(capsys.readouterr().out)
    assert [row["path"] for row in table] == [row["path"] for row in rows]
    for row, line, result in zip(rows, table, measured.results, strict=True):
        assert row["decode_tps"] == float(line["decode_tps"]) == result.decode.median
        assert (row["prompt"], row["tokens"], row["batch"], row["repeats"]) == (16, 4, 2, 2)
    assert whole["results"][0]["decode"]["values"] == list(measured.results[0].decode.values)
    assert "torch" in whole["machine"]


def test_the_table_for_people(measured, capsys):
    bench_output.show(measured, "md")
    text = capsys.readouterr().out
    assert "| decode, tokens/s |" in text
    assert "| bits | full | 4 |" in text
    assert text.count("is bound by") == 2


def test_a_picture(measured, tmp_path):
    bench_output.plot(measured, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="picture"):
        bench_output.check_plot(tmp_path / "bench.docx")


def test_a_picture_needs_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(HardwareError, match="matplotlib") as raised:
        bench_output.check_plot(tmp_path / "a.png")
    assert "pip install" in raised.value.remedy


def test_what_bounds_a_step():
    busy = StepProfile(0.1, "mm", 0.7)
    assert explain(8 * 10**9, 1.0, 10e9, busy).startswith("memory bandwidth: reading 8,000.0 MB of weights takes 80 %")
    assert explain(10**6, 1.0, 10e9, busy).startswith("arithmetic and call overhead: mm takes 70 %")
    assert explain(10**6, 1.0, 10e9, StepProfile(0.8, "mm", 0.1)).startswith("Python and call overhead (80 %")


def test_a_workload_beyond_the_context_or_empty_is_refused(tiny_llama):
    with pytest.raises(UsageError, match="context"):
        bench([tiny_llama], Workload(prompt=200, tokens=100), device="cpu")
    with pytest.raises(UsageError, match="context"):
        bench([tiny_llama], Workload(tokens=256), device="cpu")
    assert fitted(Workload(tokens=56), [load(tiny_llama, device="cpu")]).prompt == 200
    with pytest.raises(UsageError, match="tokens 0"):
        Workload(tokens=0)
    with pytest.raises(UsageError, match="md, json"):
        bench_output.check_format("xml")


def test_timing():
    assert seconds(lambda: time.sleep(0.02)) >= 0.02
    assert spread([3.0, 1.0, 2.0]) == spread((3.0, 1.0, 2.0))
    assert spread([3.0, 1.0, 2.0]).median == 2


def test_bandwidth_is_of_this_world():
    assert buffer_bytes() >= MIB
    found = read_bandwidth("cpu", repeats=3, size=16 * MIB)
    assert len(found.values) == 3
    assert 1e8 < found.median < 1e13
    assert torch.get_num_threads() >= 1
