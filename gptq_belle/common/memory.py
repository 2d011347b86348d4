"""Memory of this process: anonymous pages, now and at their peak.

The resident size includes pages of memory-mapped weight files, which the system can drop at any time, so it says little
about what a model needs. ``RssAnon`` excludes them. The kernel does not record its peak, so a thread samples it.
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
M_MMAP_THRESHOLD = -3  # parameter of mallopt(3)
MIN_MEMORY = 1 << 20  # bytes; a smaller limit of memory is a number without its unit
INTERVAL = 0.015  # seconds between samples; one sample takes about 30 microseconds


def anonymous_bytes() -> int | None:
    """Anonymous memory of this process in bytes; None if the system has no /proc."""
    try:
        status = _STATUS.read_bytes()
    except OSError:
        return None
    start = status.find(b"RssAnon:")
    return int(status[start:].split(None, 2)[1]) * 1024 if start >= 0 else None


def release_unused() -> None:
    """Return freed memory to the system, so that the next measurement starts from the memory in use."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Return free pages of the C heap to the system. Without this, glibc keeps freed blocks below 32 MiB, which can be
    as much memory as is in use. A call takes about a millisecond."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def lower_mmap_threshold() -> None:
    """Make the C heap allocate blocks of 1 MiB and more by mmap for the rest of the process.

    Such blocks return to the system when they are freed, so the peak is that of the memory in use; by default glibc
    keeps blocks of up to 32 MiB.
    """
    if sys.platform == "linux" and (option := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        option(M_MMAP_THRESHOLD, 1 << 20)


def available_bytes() -> int | None:
    """Memory that can still be allocated without swapping, in bytes; None if the system has no /proc."""
    return system_memory("MemAvailable")


def system_memory(entry: str) -> int | None:
    """An entry of /proc/meminfo, such as MemTotal, in bytes; None if the system has no /proc."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:")), None)


def format_bytes(count: int) -> str:
    """Format a number of bytes in MiB, or in bytes below 1 MiB."""
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 or not count else f"{count:,} bytes"


def parse_bytes(text: str) -> int:
    """Parse a size such as 8GiB, 500MB or 1.5G.

    K, M, G and T alone or with iB are powers of 1024; KB, MB, GB and TB are powers of 1000. No unit means bytes.

    Raises:
        UsageError: the text is not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)(B?)|B)?\s*", text, re.IGNORECASE)
    if found is None:
        raise UsageError(f"{text!r} is not a size", "Write it like 8GiB or 500MB.")
    number, unit, binary, suffix = found.groups()
    base = 1000 if suffix and not binary else 1024
    return int(float(number) * base ** (" KMGT".index(unit.upper()) if unit else 0))


def parse_memory(text: str) -> int:
    """Parse a size of memory; see `parse_bytes`.

    Raises:
        UsageError: the text is not a size, or below MIN_MEMORY: a bare number is bytes, where GB are usually meant.
    """
    size = parse_bytes(text)
    if size < MIN_MEMORY:
        number = text.strip().rstrip("Bb").strip()
        suggestion = f"{number}GB" if number.isdecimal() and 0 < int(number) < 10_000 else "8GB"
        raise UsageError(f"{text!r} is a size of {size:,} bytes, which is too little memory for any model",
                         f"Give a unit, such as {suggestion}.")
    return size


class PeakMemory:
    """Context manager that records the peak of anonymous memory. Peaks shorter than `interval` seconds can be missed.

    Attributes:
        bytes: highest sample so far, in bytes; None if the system has no /proc. Readable inside the context.
        start: value on entry, in bytes; None if the system has no /proc.
        cuda_bytes: peak of torch's allocations on `device`, in bytes; None if CUDA is not in use.

    Args:
        interval: seconds between two samples.
        device: a CUDA device; None for the current one.
    """

    def __init__(self, interval: float = INTERVAL, device: Any = None) -> None:
        self.interval, self.device = interval, device
        self.start: int | None = None
        self.bytes: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "PeakMemory":
        if (cuda := _cuda()) is not None:
            cuda.reset_peak_memory_stats(self.device)
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
        self._update_peak()

    @property
    def cuda_bytes(self) -> int | None:
        cuda = _cuda()
        return int(cuda.max_memory_allocated(self.device)) if cuda is not None else None

    def _sample(self) -> None:
        while not self._stop.wait(self.interval):
            self._update_peak()

    def _update_peak(self) -> None:
        now = anonymous_bytes()
        if now is not None:
            self.bytes = max(self.bytes or 0, now)


def _cuda() -> Any:
    """torch.cuda if this process already uses it, else None: measuring must not create a CUDA context."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return torch.cuda
