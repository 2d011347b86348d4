"""Whole jobs that are killed, run out of disk, lose what was not synchronised, or cannot read or write: each is
resumed, and ends with the bytes of an undisturbed one."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import job_output

from gptq_belle.checkpoint import tensor_file
from gptq_belle.config import QuantConfig
from gptq_belle.errors import InputError
from gptq_belle.quantization.calibration import Calibration
from gptq_belle.quantization.pipeline import quantize_checkpoint

ROOT = Path(__file__).resolve().parent.parent
MODELS = {kind: ROOT / "examples" / "belle_tiny" / kind for kind in ("bloom", "llama")}
CALIBRATION = {"rows": 16, "seq_len": 256, "allow_short": True}
KILLS = 50


class Worker:
    """The other side of fault_worker.py."""

    def __init__(self, outcome: Path) -> None:
        command = [sys.executable, str(ROOT / "tests" / "fault_worker.py"), str(outcome)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                                        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})

    def __call__(self, source, out, *, kill_after=None, log=None):
        request = {"source": str(source), "out": str(out), "calibration": CALIBRATION, "kill_after": kill_after,
                   "log": log and str(log)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    worker = Worker(tmp_path_factory.mktemp("worker") / "outcome.json")
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def undisturbed(worker, tmp_path_factory):
    """For either model: where an undisturbed job's output lies, and how long it took."""
    found = {}
    for kind, source in MODELS.items():
        out = tmp_path_factory.mktemp("undisturbed") / kind
        seconds = []
        for _ in range(2):  # the second is not the first to read the source
            said = worker(source, out)
            assert said["status"] == 0, said
            seconds.append(said["seconds"])
        found[kind] = out, min(seconds)
    return found


def check_same(out, undisturbed):
    assert job_output(out) == job_output(undisturbed)
    assert not out.with_name(out.name + ".partial").exists()


def kill_and_resume(worker, kind, undisturbed, out, seconds):
    """One job killed after a time, then run to its end; None where it was too quick, else the blocks that were kept."""
    killed = worker(MODELS[kind], out, kill_after=seconds)
    if out.exists():
        assert job_output(out) == job_output(undisturbed[kind][0])
    if killed["status"] == 0:
        return None
    said = worker(MODELS[kind], out)
    assert (killed["status"], said["status"]) == (-9, 0), (killed, said)
    check_same(out, undisturbed[kind][0])
    return said["resumed"]


def test_killed_jobs_end_as_undisturbed_ones(worker, undisturbed, tmp_path):
    kept = [kill_and_resume(worker, kind, undisturbed, tmp_path / f"{number}", share * undisturbed[kind][1])
            for number, (kind, share) in enumerate([("bloom", 0.4), ("llama", 0.6), ("llama", 0.8)])]
    assert any(kept)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_fifty_kills_at_random_moments(worker, undisturbed, tmp_path, part):
    moments, kept, kinds = random.Random(part), [], ["bloom", "llama"] * (KILLS // 10)
    shortest = {kind: seconds for kind, (_, seconds) in undisturbed.items()}
    while kinds:
        seconds = moments.random() * shortest[kinds[-1]]
        blocks = kill_and_resume(worker, kinds[-1], undisturbed, tmp_path / "out", seconds)
        if blocks is None:
            shortest[kinds[-1]] = min(seconds, shortest[kinds[-1]])
        else:
            kept.append((kinds.pop(), blocks))
        shutil.rmtree(tmp_path / "out")
    print(f"part {part}: {len(kept)} killed and resumed: {kept}")


def survive(log, partial):
    """What a power cut leaves at worst: files and names of which no fsync has told go, and contents that grew since."""
    files, folders = {}, {}
    for line in log.read_text().splitlines() if log.exists() else ():
        entry = json.loads(line)
        (folders if "names" in entry else files)[entry["inode"]] = entry
    for folder, _, found in list(os.walk(partial)):
        safe = folders.get(os.stat(folder).st_ino, {"names": []})["names"]
        for name in found:
            path = Path(folder, name)
            state = path.stat()
            if name not in safe and not name.endswith(".unfinished"):
                path.unlink()
            elif files.get(state.st_ino, {}).get("size") != state.st_size:
                path.write_bytes(b"\0" * state.st_size)


@pytest.mark.parametrize(("kind", "moment"), [("bloom", 0.45), ("llama", 0.7), ("bloom", 0.9)])
def test_a_power_cut_costs_no_more_than_the_current_block(worker, undisturbed, tmp_path, kind, moment):
    expected, seconds = undisturbed[kind]
    out, log = tmp_path / "out", tmp_path / "log"
    worker(MODELS[kind], out, kill_after=moment * seconds, log=log)
    partial = tmp_path / "out.partial"
    finished = len(list((partial / "journal").glob("block-*.json")))
    survive(log, partial)
    said = worker(MODELS[kind], out)
    assert said["status"] == 0, said
    assert sum(said["resumed"]) >= finished - 1
    check_same(out, expected)


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts or remounts a small file system; skipped where this user may not."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        first = not os.path.ismount(disk)
        command = ["mount", "-t", "tmpfs", "-o", options if first else f"remount,{options}", "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small file system needs root")
        return disk

    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", str(disk)], check=True)


NEEDED = 20_100_000  # bytes that a job on belle_tiny's BLOOM holds on disk at its fullest; a tenth more is enough


@pytest.mark.parametrize("tenths", [1, 5, 9, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 4, 6, 7, 8))])
def test_a_full_disk_loses_nothing(worker, undisturbed, mounted, tenths):
    expected, _ = undisturbed["bloom"]
    disk = mounted(f"size={NEEDED * tenths // 10}")
    said = worker(MODELS["bloom"], disk / "out")
    assert (said["status"], said.get("code")) == (1, 3), said
    assert "the disk is full" in said["error"]
    assert not (disk / "out").exists()
    finished = len(list(disk.glob("out.partial/journal/block-*.json")))
    mounted(f"size={NEEDED * 11 // 10}")
    said = worker(MODELS["bloom"], disk / "out")
    assert said["status"] == 0, said
    assert sum(said["resumed"]) == finished
    check_same(disk / "out", expected)


def test_a_read_only_place_is_named_before_any_work(worker, mounted):
    disk = mounted("size=1m")
    mounted("ro")
    said = worker(MODELS["bloom"], disk / "out")
    assert said["code"] == 3, said
    assert "permission denied" in said["error"]


def test_a_read_that_fails_is_named_and_costs_one_block(undisturbed, tmp_path, monkeypatch):
    expected, _ = undisturbed["bloom"]
    plain = tensor_file.TensorFile.read_into

    def failing(self, name, *rest):
        if name.endswith("h.2.mlp.dense_h_to_4h.weight"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(self, name, *rest)

    def job():
        return quantize_checkpoint(MODELS["bloom"], tmp_path / "out", QuantConfig(),
                                   calibration=Calibration(**CALIBRATION))

    monkeypatch.setattr(tensor_file.TensorFile, "read_into", failing)
    with pytest.raises(InputError, match=r"h.2.mlp.dense_h_to_4h.weight: Input/output error"):
        job()
    monkeypatch.undo()
    assert job().resumed == [2]
    check_same(tmp_path / "out", expected)
