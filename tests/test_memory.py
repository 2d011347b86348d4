"""PeakMemory records temporary allocations and ignores memory-mapped files."""

import mmap
import sys
import time

import pytest

from gptq_belle.common import memory
from gptq_belle.common.memory import PeakMemory, anonymous_bytes, release_unused

MIB = 1 << 20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
def test_freed_allocation_stays_in_the_peak():
    release_unused()
    with PeakMemory(interval=0.002) as peak:
        block = bytearray(b"\1") * (64 * MIB)
        time.sleep(0.02)
        del block
    assert 60 * MIB < peak.bytes - peak.start < 160 * MIB
    release_unused()  # a heap with a hole of that size may have held the block, and keeps it
    assert anonymous_bytes() < peak.bytes - 50 * MIB


@linux
def test_mapped_file_is_not_counted(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"\1" * (64 * MIB))
    release_unused()
    with (
        PeakMemory(interval=0.002) as peak,
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        assert sum(mapped[::4096]) > 0
        time.sleep(0.02)
    assert peak.bytes - peak.start < 8 * MIB


def test_values_are_none_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "absent")
    with PeakMemory() as peak:
        pass
    assert peak.bytes is None
    assert peak.start is None
    assert peak.cuda_bytes is None


@linux
def test_context_can_be_entered_again_and_stops_its_thread():
    peak = PeakMemory(interval=0.002)
    for _ in range(2):
        with peak:
            pass
        assert peak.bytes >= peak.start
        assert peak._thread is None
