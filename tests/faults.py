"""Jobs on the demo models that are killed, lose power or fill the disk, and checks of the resumed job.

Used by test_faults.py and benchmarks/bench_faults.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import job_output

ROOT = Path(__file__).resolve().parent.parent
MODELS = {kind: ROOT / "examples" / "belle_tiny" / kind for kind in ("bloom", "llama")}
CALIBRATION = {"rows": 4, "seq_len": 256, "allow_short": True}
NEEDED = 7_150_000  # peak disk use in bytes of a job on belle_tiny's BLOOM; a tenth more is enough


class Worker:
    """A fault_worker.py process."""

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


def run_uninterrupted(worker, folder):
    """Output directory and time of an uninterrupted job, by model."""
    found = {}
    for kind, source in MODELS.items():
        seconds = []
        for _ in range(2):  # the first run reads the source into the page cache
            result = worker(source, folder / kind)
            assert result["status"] == 0, result
            seconds.append(result["seconds"])
        found[kind] = folder / kind, min(seconds)
    return found


def check_same(out, uninterrupted):
    assert job_output(out) == job_output(uninterrupted)
    assert not out.with_name(out.name + ".partial").exists()


def kill_and_resume(worker, kind, uninterrupted, out, seconds):
    """Kill a job after a time and resume it; returns the resumed block, or None where the job finished before."""
    killed = worker(MODELS[kind], out, kill_after=seconds)
    if out.exists():
        assert job_output(out) == job_output(uninterrupted[kind][0])
    if killed["status"] == 0:
        return None
    result = worker(MODELS[kind], out)
    assert (killed["status"], result["status"]) == (-9, 0), (killed, result)
    check_same(out, uninterrupted[kind][0])
    return result["resumed"]


def kill_at_random(worker, uninterrupted, folder, moments, kinds):
    """Kill one job of each kind at a random moment and resume it; returns (kind, moment, blocks kept) of each."""
    kinds, found = list(kinds), []
    longest = {kind: seconds for kind, (_, seconds) in uninterrupted.items()}
    while kinds:
        seconds = moments.random() * longest[kinds[-1]]
        kept = kill_and_resume(worker, kinds[-1], uninterrupted, folder / "out", seconds)
        if kept is None:
            longest[kinds[-1]] = min(seconds, longest[kinds[-1]])
        else:
            found.append((kinds.pop(), seconds, sum(kept)))
        shutil.rmtree(folder / "out")
    return found


def drop_unsynced(log, partial):
    """Reduce a directory to the worst state after a power cut: without names and contents that were not synced."""
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


def power_cut_and_resume(worker, kind, uninterrupted, folder, seconds):
    """Kill a job, drop unsynced data and resume; returns the number of finished blocks and of those kept."""
    out, log = folder / "out", folder / "log"
    worker(MODELS[kind], out, kill_after=seconds, log=log)
    partial = folder / "out.partial"
    finished = len(list((partial / "journal").glob("block-*.json")))
    drop_unsynced(log, partial)
    result = worker(MODELS[kind], out)
    assert result["status"] == 0, result
    check_same(out, uninterrupted[kind][0])
    return finished, sum(result["resumed"])


def fill_and_resume(worker, disk, resize, expected, tenths):
    """Run a job on a disk with some tenths of the needed size, then resume with enough; returns the blocks kept.

    Args:
        resize: called with the disk's new size in bytes.
    """
    result = worker(MODELS["bloom"], disk / "out")
    assert (result["status"], result.get("code")) == (1, 3), (tenths, result)
    assert "the disk is full" in result["error"]
    assert not (disk / "out").exists()
    finished = len(list(disk.glob("out.partial/journal/block-*.json")))
    resize(NEEDED * 11 // 10)
    result = worker(MODELS["bloom"], disk / "out")
    assert result["status"] == 0, result
    assert sum(result["resumed"]) == finished
    check_same(disk / "out", expected)
    return finished


def mount(disk, size, *options):
    """Mount or resize a file system in memory with `size` bytes; returns the error output of mount."""
    again = ["remount"] if os.path.ismount(disk) else []
    line = ["mount", "-t", "tmpfs", "-o", ",".join([*again, f"size={size}", *options]), "tmpfs", str(disk)]
    return subprocess.run(line, capture_output=True, text=True).stderr


def unmount(disk):
    """Undo `mount`."""
    if os.path.ismount(disk):
        subprocess.run(["umount", str(disk)], check=True)
