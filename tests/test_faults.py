"""Jobs that are killed, lose power, fill the disk, or cannot read or write: each resumes to identical output.

benchmarks/bench_faults.py runs more of these and records the results.
"""

import errno
import os
import random

import pytest
from conftest import naming
from faults import (
    CALIBRATION,
    MODELS,
    NEEDED,
    Worker,
    check_same,
    fill_and_resume,
    kill_and_resume,
    kill_at_random,
    mount,
    power_cut_and_resume,
    run_uninterrupted,
    unmount,
)

from gptq_belle.checkpoint.direct_io import FileBytes
from gptq_belle.checkpoint.safetensors_file import TensorFile
from gptq_belle.errors import HardwareError
from gptq_belle.quantization.calibration.rows import Calibration
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.pipeline import quantize_checkpoint

KILLS = 50


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    worker = Worker(tmp_path_factory.mktemp("worker") / "outcome.json")
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def uninterrupted(worker, tmp_path_factory):
    """Output directory and time of an uninterrupted job, by model."""
    return run_uninterrupted(worker, tmp_path_factory.mktemp("uninterrupted"))


def test_killed_jobs_resume_to_identical_output(worker, uninterrupted, tmp_path):
    kept = []
    for number, (kind, share) in enumerate([("bloom", 0.4), ("llama", 0.6), ("llama", 0.8)]):
        seconds, found = share * uninterrupted[kind][1], None
        while found is None:  # the job had finished: the machine was slower when it was timed
            found = kill_and_resume(worker, kind, uninterrupted, tmp_path / f"{number}-{seconds}", seconds)
            seconds *= 0.8
        kept.append(found)
    assert any(kept)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_fifty_kills_at_random_moments(worker, uninterrupted, tmp_path, part):
    kinds = ["bloom", "llama"] * (KILLS // 10)
    print(f"part {part}:", kill_at_random(worker, uninterrupted, tmp_path, random.Random(part), kinds))


@pytest.mark.parametrize(("kind", "moment"), [("bloom", 0.45), ("llama", 0.7), ("bloom", 0.9)])
def test_power_cut_loses_at_most_the_current_block(worker, uninterrupted, tmp_path, kind, moment):
    finished, kept = power_cut_and_resume(worker, kind, uninterrupted, tmp_path, moment * uninterrupted[kind][1])
    assert kept >= finished - 1


@pytest.fixture
def disk(tmp_path):
    """A folder to mount a small file system on; skipped for users who may not mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if mount(disk, 1 << 20):
        pytest.skip("mounting a small file system needs root")
    yield disk
    unmount(disk)


@pytest.mark.parametrize("tenths", [1, 5, 9, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 4, 6, 7, 8))])
def test_job_on_a_full_disk_resumes(worker, uninterrupted, disk, tenths):
    mount(disk, NEEDED * tenths // 10)
    fill_and_resume(worker, disk, lambda size: mount(disk, size), uninterrupted["bloom"][0], tenths)


def test_read_only_output_is_refused_before_any_work(worker, disk):
    mount(disk, 1 << 20, "ro")
    result = worker(MODELS["bloom"], disk / "out")
    assert result["code"] == 3, result
    assert "permission denied" in result["error"]


def test_failing_read_names_the_tensor_and_loses_one_block(uninterrupted, tmp_path, monkeypatch):
    expected, _ = uninterrupted["bloom"]
    broken = "transformer.h.2.mlp.dense_h_to_4h.weight"
    plain, begin = FileBytes.read, TensorFile(MODELS["bloom"] / "model.safetensors").entries[broken].begin
    readings = []

    def failing(self, at, *rest):
        if at == begin:
            readings.append(at)
            if len(readings) > 1:  # after the check of all values, which comes before the first block
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(self, at, *rest)

    def job():
        return quantize_checkpoint(MODELS["bloom"], tmp_path / "out", QuantConfig(),
                                   calibration=Calibration(**CALIBRATION))

    monkeypatch.setattr(FileBytes, "read", failing)
    with pytest.raises(HardwareError, match=naming(MODELS["bloom"], "h.2.mlp.dense_h_to_4h.weight")):
        job()
    monkeypatch.undo()
    assert job().resumed == [2]
    check_same(tmp_path / "out", expected)
