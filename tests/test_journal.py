"""The journal of an unfinished job: damaged records, refused differences, resuming with an identical result, and
fallbacks where memory runs out."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import job_output, naming

from gptq_belle.errors import UsageError
from gptq_belle.quantization import pipeline
from gptq_belle.quantization.activations import Activations
from gptq_belle.quantization.block_quantizer import BlockQuantizer
from gptq_belle.quantization.block_stream import BlockStream
from gptq_belle.quantization.calibration.rows import Calibration
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.journal import BlockRecord, Journal, finished_blocks
from gptq_belle.quantization.pipeline import quantize_checkpoint
from gptq_belle.quantization.report import LinearReport, NoProgress

ROOT = Path(__file__).resolve().parent.parent
FINGERPRINT = {"source": {"config.json": "a" * 64}, "settings": {"bits": 4}, "calibration": {"rows": 8}}
ENVIRONMENT = {"threads": 1}
ROW = LinearReport("h.0.dense", 0.5, 0.01, 1.5, 64, 32, 4)


def journal(folder, *, restart=False, **changes):
    return Journal(folder, {topic: values | changes.get(topic, {}) for topic, values in FINGERPRINT.items()},
                   ENVIRONMENT, restart=restart)


def commit(book, tensors=None):
    """Commit a finished block with one part and the activations after it."""
    index = len(book.records)
    (book.partial / "parts").mkdir(exist_ok=True)
    from gptq_belle.checkpoint.safetensors_file import write_tensors

    part = f"parts/block-{index:05d}.safetensors"
    files = {part: write_tensors(book.partial / part, {"w": torch.full((4,), index)})}
    activations = Activations(book.partial, [(2, 3)])
    files[f"journal/quantized-{index + 1:05d}.f32"] = activations.write(index + 1, [torch.randn(2, 3)])
    book.commit(BlockRecord(linears=[ROW], phases={"total": 2.0}), files, tensors)
    activations.delete(index)


def test_records_are_read_back_with_their_tensors(tmp_path):
    book = journal(tmp_path)
    commit(book, {"clip": torch.arange(3)})
    commit(book)
    again = journal(tmp_path)
    assert again.records == book.records
    assert again.records[0].linears == [ROW]
    assert torch.equal(again.tensors(0)["clip"], torch.arange(3))
    assert again.tensors(1) == {}


@pytest.mark.parametrize(("damage", "left"), [
    (lambda p: (p / "parts" / "block-00001.safetensors").unlink(), 0),
    (lambda p: spoil(p / "parts" / "block-00000.safetensors"), 0),
    (lambda p: spoil(p / "journal" / "quantized-00003.f32"), 0),
    (lambda p: spoil(p / "journal" / "block-00000.json"), 0),
    (lambda p: (p / "parts" / "block-00009.safetensors").write_bytes(b"unfinished"), 3),
    (lambda p: (p / "journal" / "block-00003.json.unfinished").write_bytes(b"{"), 3)], ids=range(6))
def test_incomplete_records_are_ignored(tmp_path, damage, left):
    book = journal(tmp_path)
    for _ in range(3):
        commit(book)
    damage(tmp_path)
    again = journal(tmp_path)
    assert len(again.records) == left
    kept = {path.name for path in (tmp_path / "parts").iterdir()}
    assert kept == {f"block-{i:05d}.safetensors" for i in range(left)}


def spoil(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_journal_of_another_version_is_refused(tmp_path):
    journal(tmp_path)
    job = tmp_path / "journal" / "job.json"
    earlier = json.loads(job.read_text()) | {"journal": {"version": 3}, "settings": {"no_such_key": 1}}
    job.write_text(json.dumps(earlier))
    with pytest.raises(UsageError, match=naming("version", 3)) as caught:
        journal(tmp_path)
    assert "no_such_key" not in caught.value.cause
    assert journal(tmp_path, restart=True).records == []


def test_other_settings_are_refused_and_restart_starts_over(tmp_path):
    commit(journal(tmp_path))
    with pytest.raises(UsageError, match=naming("bits 4", 8, "rows 8", 9)) as caught:
        journal(tmp_path, settings={"bits": 8}, calibration={"rows": 9})
    assert "--restart" in caught.value.remedy
    with pytest.raises(UsageError, match=naming("config.json", "a" * 12, "b" * 12)):
        journal(tmp_path, source={"config.json": "b" * 64})
    assert len(journal(tmp_path).records) == 1
    assert journal(tmp_path, settings={"bits": 8}, restart=True).records == []
    assert not list((tmp_path / "parts").iterdir())


class InterruptInBlock(NoProgress):
    """Interrupts a job in the middle of a block."""

    def __init__(self, block):
        self.block = block

    def linear(self, block, row, peak_memory):
        if block == self.block:
            raise KeyboardInterrupt


def quantize(source, out, *, block=None, **options):
    config = {key: options.pop(key) for key in ("bits", "act_order", "method") if key in options}
    return quantize_checkpoint(source, out, QuantConfig(group_size=32, **config),
                               calibration=Calibration(rows=32, seq_len=64, allow_short=True),
                               progress=None if block is None else InterruptInBlock(block), **options)


@pytest.mark.parametrize("options", [{}, {"act_order": True, "bits": 3}, {"method": "rtn"}], ids=str)
def test_resumed_job_has_the_output_of_an_uninterrupted_one(tiny_model, tmp_path, options):
    quantize(tiny_model, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model, tmp_path / "out", block=1, **options)
    assert finished_blocks(tmp_path / "out.partial") == 1
    report = quantize(tiny_model, tmp_path / "out", **options)
    assert report.resumed == [1]
    assert len(report.phases) == 2
    assert job_output(tmp_path / "out") == job_output(tmp_path / "whole")


def test_resumed_job_keeps_the_number_of_threads(tiny_bloom, tmp_path):
    torch.set_num_threads(2)
    try:
        quantize(tiny_bloom, tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny_bloom, tmp_path / "out", block=1)
        torch.set_num_threads(1)
        quantize(tiny_bloom, tmp_path / "out")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
    assert job_output(tmp_path / "out") == job_output(tmp_path / "whole")


def test_resuming_on_another_processor_is_noted_in_the_report(tiny_bloom, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_bloom, tmp_path / "out", block=1)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ABACUS")
    report = quantize(tiny_bloom, tmp_path / "out")
    assert "processor" in report.notes[0]
    assert "ABACUS now" in report.notes[0]


def test_changed_source_file_is_refused_and_named(tiny_bloom, tmp_path):
    source = shutil.copytree(tiny_bloom, tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", block=1)
    spoil(source / "model.safetensors")
    with pytest.raises(UsageError, match=naming("model.safetensors")):
        quantize(source, tmp_path / "out")
    assert finished_blocks(tmp_path / "out.partial") == 1
    assert quantize(source, tmp_path / "out", resume=False).resumed == []


CUDA_ERRORS = [torch.OutOfMemoryError("CUDA out of memory"),
               RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
               RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`")]


def out_of_memory_above(rows, monkeypatch, error=CUDA_ERRORS[0]):
    plain = BlockStream._run

    def run(self, block, states):
        if len(states) > rows and self.device.type == "cpu" and not getattr(self, "on_cpu", False):
            raise error
        return plain(self, block, states)

    monkeypatch.setattr(BlockStream, "_run", run)


@pytest.mark.parametrize("error", CUDA_ERRORS, ids=["torch", "cublas", "cusolver"])
def test_out_of_memory_halves_the_batch(tiny_bloom, tmp_path, monkeypatch, error):
    quantize(tiny_bloom, tmp_path / "whole")
    out_of_memory_above(9, monkeypatch, error)
    report = quantize(tiny_bloom, tmp_path / "out")
    assert report.notes == ["block 0: out of memory on cpu with 32 rows at a time",
                            "block 0: out of memory on cpu with 16 rows at a time"]
    whole = json.loads((tmp_path / "whole" / "quantization_report.json").read_text())
    assert report.mean_error == pytest.approx(whole["mean_error"], rel=0.01)


def test_out_of_memory_on_the_gpu_falls_back_to_the_cpu(tiny_bloom, tmp_path, monkeypatch):
    out_of_memory_above(0, monkeypatch)
    monkeypatch.setattr(pipeline, "check_structure", lambda stream: None)  # it runs on the CPU
    fallbacks = BlockQuantizer._fallbacks

    def marked(self, activations):
        for description in fallbacks(self, activations):
            self.stream.on_cpu = description == "on the CPU"  # the CPU takes the place of the GPU before
            yield description

    monkeypatch.setattr(BlockQuantizer, "_fallbacks", marked)
    report = quantize(tiny_bloom, tmp_path / "out")
    assert [note.split(":")[0] for note in report.notes] == ["block 0"] * 6 + ["block 1"]
    assert report.readback_error == 0


def test_other_errors_of_a_block_are_not_retried(tiny_bloom, tmp_path, monkeypatch):
    out_of_memory_above(9, monkeypatch, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError):
        quantize(tiny_bloom, tmp_path / "out")


def test_out_of_memory_on_the_cpu_too_is_an_error(tiny_bloom, tmp_path, monkeypatch):
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        quantize(tiny_bloom, tmp_path / "out")


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_signals_exit_130_and_print_the_command_that_resumes(end, tmp_path):
    source = ROOT / "examples" / "belle_tiny" / "llama"
    command = ["-m", "gptq_belle.quantize", str(source), str(tmp_path / "out"), "--rows", "12", "--seq-len", "256"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    job = subprocess.Popen([sys.executable, *command, "--restart"], stderr=subprocess.PIPE, text=True, cwd=ROOT,
                           env=environment)
    while "block 2/" not in (line := job.stderr.readline()):
        assert line, "the job ended before it was interrupted"
    job.send_signal(end)
    rest = job.stderr.read()
    assert job.wait(timeout=60) == 130, rest
    assert "Traceback" not in rest
    (advice,) = [line for line in rest.splitlines() if line.endswith(" ".join(command))]
    assert advice.removesuffix(" ".join(command)).split()[-1] == "python"
    other = subprocess.run([sys.executable, *command, "--bits", "8"], cwd=ROOT, env=environment, capture_output=True,
                           text=True)
    assert other.returncode == 2
    assert " ".join(command) not in other.stderr  # it would be refused again
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "quantization_report.json").read_text())["resumed"] == [1]
