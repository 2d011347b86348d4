"""bench: every value is measured, all output formats contain it, and the explanation follows from the numbers."""

import csv
import io
import json
import math
import re
import sys
import time
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from conftest import naming, packed_checkpoint

from gptq_belle import load
from gptq_belle.bench import footprint, throughput_plot
from gptq_belle.bench.bandwidth import buffer_bytes, read_bandwidth
from gptq_belle.bench.step_shares import StepShares, explain_bound
from gptq_belle.bench.throughput import bench, parse_depths
from gptq_belle.bench.workload import Workload, with_prompt_length
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.cli import bench_output
from gptq_belle.common.timers import seconds, spread
from gptq_belle.errors import HardwareError, InputError, UsageError

MIB = 1 << 20


@pytest.fixture(scope="module")
def measured(tiny_llama, tmp_path_factory):
    packed = packed_checkpoint(tiny_llama, tmp_path_factory.mktemp("bench") / "packed")
    with patch("gptq_belle.bench.bandwidth.buffer_bytes", lambda: 16 * MIB):
        return bench([tiny_llama, packed], Workload(prompt=16, tokens=4, batch=2, repeats=2), device="cpu",
                     batches=[3], depths=(0, 40))


def test_bench_measures_both_models(measured):
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


def test_step_bytes_count_a_tied_embedding_once_and_no_untied_one(tiny_model):
    model, numbers = load(tiny_model, device="cpu"), CheckpointReader(tiny_model)
    total = sum(math.prod(numbers.shape(name)) for name in numbers) * 4
    embedding = 0 if model.config.get("tie_word_embeddings", True) else 384 * 128
    assert (model.weight_bytes, model.step_bytes) == (total - 2 * embedding, total - 4 * embedding)


def test_time_shares_add_up_to_one(measured):
    for result in measured.results:
        assert sum(result.shares) == pytest.approx(1)
        assert all(0 < share < 1 for share in result.shares[:3])


def test_every_batch_and_depth_is_measured(measured, capsys):
    places = [(point.batch, point.depth) for point in measured.points if point.path == measured.results[0].path]
    assert places == [(2, 0), (2, 40), (3, 0), (3, 40)]
    assert len(measured.points) == 8
    assert all(len(point.decode.values) == len(point.prefill.values) == 2 for point in measured.points)
    assert [(one.path, one.batch) for one in measured.memory] == [
        (result.path, batch) for result in measured.results for batch in (2, 3)]
    bench_output.show(measured, "md")
    assert "| 3 | 40 |" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "depths"), [("0", (0,)), ("0, 512,0", (0, 512))])
def test_depths_option_is_parsed(text, depths):
    assert parse_depths(text) == depths
    with pytest.raises(UsageError, match=naming("x")):
        parse_depths(text + ",x")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_footprint_is_measured_in_a_new_process(measured):
    for result in measured.results:
        assert 0 <= result.footprint.peak_bytes < 64 * MIB
        assert result.footprint.process_bytes > result.footprint.peak_bytes + 50 * MIB


@pytest.mark.parametrize(("script", "error"), [("echo why >&2; exit 4", InputError), ("kill -9 $$", HardwareError)])
def test_failing_measurement_process_is_reported(tmp_path, monkeypatch, script, error):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(error, match="why" if error is InputError else "signal 9"):
        footprint.measure_in_new_process("model", device="cpu")


def test_csv_and_jsonl_rows_hold_the_measurements(measured, capsys):
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


def test_markdown_table_shows_the_measurements(measured, capsys):
    bench_output.show(measured, "md")
    text = capsys.readouterr().out
    assert "| decode, tokens/s |" in text
    assert "| bits | full | 4 |" in text
    assert text.count("is limited by") == 2


def test_steps_that_are_not_fused_are_explained(measured, capsys):
    changed = [replace(measured.results[0], unfused="65 sequences"), measured.results[1]]
    bench_output.show(replace(measured, results=changed), "md")
    assert re.findall(r"not fused.*", capsys.readouterr().out) == ["not fused, which makes them slower: 65 sequences."]


def test_plot_is_written_as_png_and_other_formats_are_rejected(measured, tmp_path):
    throughput_plot.plot(measured, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match=naming("bench.docx")):
        throughput_plot.check_plot(tmp_path / "bench.docx")


def test_plot_shows_every_depth_of_every_batch(measured, tmp_path):
    depths = {point.depth for point in measured.points}
    assert len(depths) > 1
    for depth in depths:
        found = throughput_plot.batch_series(measured, depth)
        assert [one.batch for one in found] == [2, 3]
        for one in found:
            for place, result in enumerate(measured.results):
                [point] = [p for p in measured.points if (p.path, p.batch, p.depth) == (result.path, one.batch, depth)]
                assert (one.prefill[place], one.decode[place]) == (point.prefill, point.decode)
    throughput_plot.plot(measured, tmp_path / "bench.svg")
    drawn = (tmp_path / "bench.svg").read_text()
    assert all(f" at depth {depth}" in drawn for depth in depths if depth)


def test_plot_without_matplotlib_is_rejected(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(HardwareError, match="matplotlib") as raised:
        throughput_plot.check_plot(tmp_path / "a.png")
    assert "pip install" in raised.value.remedy


def test_explanation_names_the_largest_cost_of_a_step():
    busy = StepShares(linears=0.7, attention=0.1, head=0.1, rest=0.1)
    text = explain_bound(8 * 10**9, 1.0, 10e9, busy)
    assert text.startswith("memory bandwidth: reading 8,000.0 MB of weights takes 80 %")
    assert explain_bound(10**6, 1.0, 10e9, busy).startswith("arithmetic of the linears (70 % of the time)")
    mostly_python = StepShares(0.1, 0.05, 0.05, 0.8)
    assert explain_bound(10**6, 1.0, 10e9, mostly_python).startswith("Python and call overhead (80 %")


def test_workload_beyond_the_context_or_empty_is_rejected(tiny_llama):
    with pytest.raises(UsageError, match=naming(300, 256)):
        bench([tiny_llama], Workload(prompt=200, tokens=100), device="cpu")
    with pytest.raises(UsageError, match=naming(256)):
        bench([tiny_llama], Workload(tokens=256), device="cpu")
    with pytest.raises(UsageError, match=naming(200)):
        bench([tiny_llama], Workload(prompt=40, tokens=20), device="cpu", depths=(200,))
    assert with_prompt_length(Workload(tokens=56), [load(tiny_llama, device="cpu")]).prompt == 200
    with pytest.raises(UsageError, match=naming("tokens", 0)):
        Workload(tokens=0)


def test_timers_measure_and_summarize():
    assert seconds(lambda: time.sleep(0.02)) >= 0.02
    assert spread([3.0, 1.0, 2.0]) == spread((3.0, 1.0, 2.0))
    assert spread([3.0, 1.0, 2.0]).median == 2


def test_measured_bandwidth_is_plausible():
    assert buffer_bytes() >= MIB
    found = read_bandwidth("cpu", repeats=3, size=16 * MIB)
    assert len(found.values) == 3
    assert 1e8 < found.median < 1e13
    assert torch.get_num_threads() >= 1
