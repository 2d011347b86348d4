"""Memory that a process really owns: anonymous pages, now and at their peak.

A memory-mapped weight file counts as resident as soon as it was read, although the system can drop those pages at any
time; so the resident size says little about what a model needs. ``RssAnon`` leaves mapped files out. The kernel keeps
no peak of it, hence a thread that looks at it every few milliseconds.
"""

import ctypes
import gc
import re
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from gptq_belle.errors import UsageError

_STATUS = Path("/proc/self/status")
M_MMAP_THRESHOLD = -3  # of mallopt(3)
INTERVAL = 0.015  # seconds between samples; a look takes about 30 microseconds


def anonymous_bytes() -> int | None:
    """Anonymous memory of this process in bytes; None where the system does not tell (no /proc)."""
    try:
        status = _STATUS.read_bytes()
    except OSError:
        return None
    start = status.find(b"RssAnon:")
    return int(status[start:].split(None, 2)[1]) * 1024 if start >= 0 else None


def release_unused() -> None:
    """Hand freed memory back to the system, so that what is measured next starts from what is in use."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Hand the C heap's free pages back. It keeps what was freed in pieces below 32 MiB, easily as much as is in use;
    a call takes about a millisecond."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def lower_mmap_threshold() -> None:
    """Let the C heap map every larger piece of its own and return it when it is freed, so that a peak is that of what
    is in use: by itself it keeps pieces of up to 32 MiB. For the rest of the process."""
    if sys.platform == "linux" and (option := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        option(M_MMAP_THRESHOLD, 1 << 20)


def available_bytes() -> int | None:
    """Memory that programs could still take without swapping, in bytes; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def mib(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 or not count else f"{count:,} bytes"


def parse_bytes(text: str) -> int:
    """A size such as 8GiB, 500MB or 1.5G: units of 1024 with an i or alone, else of 1000; bytes without a unit.

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)(B?)|B)?\s*", text, re.IGNORECASE)
    if found is None:
        raise UsageError(f"{text!r} is not a size", "Write it like 8GiB or 500MB.")
    number, unit, binary, suffix = found.groups()
    base = 1000 if suffix and not binary else 1024
    return int(float(number) * base ** (" KMGT".index(unit.upper()) if unit else 0))


class PeakMemory:
    """Context manager that records the peak of anonymous memory while it is open.

    Attributes:
        bytes: the highest value seen, in bytes; None where the system does not tell. Readable while it is open.
        start: the value on entering, in bytes; None likewise.
        cuda_bytes: peak of torch's allocations on the current CUDA device, in bytes; None without CUDA in use.

    Peaks shorter than `interval` seconds can be missed.
    """

    def __init__(self, interval: float = INTERVAL) -> None:
        self.interval = interval
        self.start: int | None = None
        self.bytes: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "PeakMemory":
        if (cuda := _cuda()) is not None:
            cuda.reset_peak_memory_stats()
        self.start = self.bytes = anonymous_bytes()
        self._stop.clear()
        if self.start is not None:
            self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._look()

    @property
    def cuda_bytes(self) -> int | None:
        cuda = _cuda()
        return int(cuda.max_memory_allocated()) if cuda is not None else None

    def _sample(self) -> None:
        while not self._stop.wait(self.interval):
            self._look()

    def _look(self) -> None:
        now = anonymous_bytes()
        if now is not None:
            self.bytes = max(self.bytes or 0, now)


def _cuda() -> Any:
    """torch.cuda where this process already uses it; looking must not be what starts a CUDA context."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return torch.cuda
