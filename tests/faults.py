"""Whole jobs on the demo models in a process that is killed or loses what was not synchronised, and what must come of
them; for test_faults.py and benchmarks/bench_faults.py."""

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
NEEDED = 7_150_000  # bytes that a job on belle_tiny's BLOOM holds on disk at its fullest; a tenth more is enough


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


def run_undisturbed(worker, folder):
    """For either model: where an undisturbed job's output lies, and how long it took."""
    found = {}
    for kind, source in MODELS.items():
        seconds = []
        for _ in range(2):  # the second is not the first to read the source
            said = worker(source, folder / kind)
            assert said["status"] == 0, said
            seconds.append(said["seconds"])
        found[kind] = folder / kind, min(seconds)
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


def kill_at_random(worker, undisturbed, folder, moments, kinds):
    """A job a kind, each killed at a random moment and resumed; (kind, moment, blocks that were kept) of each."""
    kinds, found = list(kinds), []
    longest = {kind: seconds for kind, (_, seconds) in undisturbed.items()}
    while kinds:
        seconds = moments.random() * longest[kinds[-1]]
        kept = kill_and_resume(worker, kinds[-1], undisturbed, folder / "out", seconds)
        if kept is None:
            longest[kinds[-1]] = min(seconds, longest[kinds[-1]])
        else:
            found.append((kinds.pop(), seconds, sum(kept)))
        shutil.rmtree(folder / "out")
    return found


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


def cut_and_resume(worker, kind, undisturbed, folder, seconds):
    """One job killed after a time, stripped of what was not safe, then run to its end; (finished blocks, kept ones)."""
    out, log = folder / "out", folder / "log"
    worker(MODELS[kind], out, kill_after=seconds, log=log)
    partial = folder / "out.partial"
    finished = len(list((partial / "journal").glob("block-*.json")))
    survive(log, partial)
    said = worker(MODELS[kind], out)
    assert said["status"] == 0, said
    check_same(out, undisturbed[kind][0])
    return finished, sum(said["resumed"])


def fill_and_resume(worker, disk, resize, expected, tenths):
    """One job on a disk of so many tenths of what it needs, then with room; the blocks that were kept.

    Args:
        resize: called with the disk's new size in bytes.
    """
    said = worker(MODELS["bloom"], disk / "out")
    assert (said["status"], said.get("code")) == (1, 3), (tenths, said)
    assert "the disk is full" in said["error"]
    assert not (disk / "out").exists()
    finished = len(list(disk.glob("out.partial/journal/block-*.json")))
    resize(NEEDED * 11 // 10)
    said = worker(MODELS["bloom"], disk / "out")
    assert said["status"] == 0, said
    assert sum(said["resumed"]) == finished
    check_same(disk / "out", expected)
    return finished


def mount(disk, size, *options):
    """Mount, or change, a file system in memory of so many bytes; what mount says where it refuses, else ""."""
    again = ["remount"] if os.path.ismount(disk) else []
    line = ["mount", "-t", "tmpfs", "-o", ",".join([*again, f"size={size}", *options]), "tmpfs", str(disk)]
    return subprocess.run(line, capture_output=True, text=True).stderr


def unmount(disk):
    """Undo `mount`."""
    if os.path.ismount(disk):
        subprocess.run(["umount", str(disk)], check=True)
