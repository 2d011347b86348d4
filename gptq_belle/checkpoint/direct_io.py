"""The bytes of one file: from the page cache where it holds them, else large pieces by direct I/O.

Filling the page cache costs CPU time, 0.3 to 0.45 s per GB where reading the disk directly takes 0.05, and memory that
the model needs; weights are prepared on the same cores. With direct I/O, loading takes about 0.7 of the time.
benchmarks/bench_belle_7b.py times both ways of reading beside loading. A disk slower than SLOW_DISK leaves the cores
idle anyway: from there the page cache is filled, for the next load.
"""

import ctypes
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptq_belle.errors import GptqBelleError, InputError, from_os_error
from gptq_belle.kernels.huge_pages import Allocator

PAGE = mmap.PAGESIZE  # bytes; alignment of direct I/O: no file system asks for more
PIECE = 4 << 20  # bytes at a time
LARGE = 1 << 20  # smaller ones are left to the system, which reads ahead
TRIAL_BYTES = 64 << 20  # bytes, before the disk is judged
SLOW_DISK = 600e6  # bytes a second; SATA gives less


class FileBytes:
    """Bytes of a file that stays open: a file that replaces it under the same name is not mixed with it.

    Reading raises OSError if the system fails, and EOFError, with the reason, if the file ends first.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self._direct = hasattr(os, "O_DIRECT")
        self._bytes, self._seconds = 0, 0.0  # read by direct I/O

    @property
    def path(self) -> str:
        """A path of this very file, whatever has taken its name since."""
        return f"/proc/self/fd/{self._file}"

    def size(self) -> int:
        """Bytes of the file now."""
        return os.fstat(self._file).st_size

    def read(self, begin: int, size: int, memory: Allocator, align: int = 1) -> Tensor:
        """Some bytes, (size,) uint8, in memory of their own.

        Args:
            begin: of the first one in the file.
            memory: gives so many bytes.
            align: what the result's address has to be a multiple of.
        """
        if size < LARGE or begin % align or not self._direct:
            found = memory(size)
            self._read_cached(begin, byte_view(found))
            return found
        lead, room = begin % PAGE, memory(size + 3 * PAGE)  # bytes in front of the first one in its page
        start = -room.data_ptr() % PAGE  # a disk writes whole pages: bytes lie in theirs as they do in the file
        stop = start + lead + size
        view = byte_view(room[start : stop + -(stop - start) % PAGE])
        with _direct_handle(self._file) as direct:
            at = 0
            while at < lead + size:
                at += self._piece(direct, begin - lead + at, view[at : at + PIECE])
        return room[start + lead : stop]

    def pieces(self, begin: int, size: int, chosen: Sequence[int], memory: Allocator, align: int = 1) -> Tensor:
        """Of pieces of `size` bytes each, one behind the other from `begin` on, those chosen by number, in that order.

        Others are not read. `memory` and `align` as of `read`; the result is (len(chosen) * size,) uint8.
        """
        together = list(runs(chosen))
        if len(together) == 1:
            return self.read(begin + chosen[0] * size, len(chosen) * size, memory, align)
        found = memory(len(chosen) * size)
        for place, count in together:
            self._read_cached(begin + chosen[place] * size, byte_view(found[place * size : (place + count) * size]))
        return found

    def fill_cache(self, begin: int, end: int) -> None:
        """Bring bytes into the system's cache, holding no more than a piece of them; stops where the file does."""
        buffer = bytearray(min(PIECE, end - begin))
        while begin < end and (count := os.preadv(self._file, [buffer], begin)):
            begin += count

    def _read_cached(self, begin: int, view: memoryview) -> None:
        """Read into a buffer, through the system's cache."""
        while view:
            count = _expect_bytes(os.preadv(self._file, [view[: 1 << 30]], begin))
            begin, view = begin + count, view[count:]

    def _piece(self, direct: int | None, begin: int, view: memoryview) -> int:
        """Fill `view` from its start on; returns how many bytes there are now, at least one."""
        if self._direct and direct is not None and begin % PAGE == 0 and not _is_cached(self._file, begin, len(view)):
            began = time.perf_counter()
            try:
                count = os.preadv(direct, [view], begin)
            except OSError:  # what opens does not always read; from the cache, an error is one of the disk
                self._direct = False
            else:
                self._bytes, self._seconds = self._bytes + count, self._seconds + time.perf_counter() - began
                self._direct = self._bytes < TRIAL_BYTES or self._bytes > SLOW_DISK * self._seconds
                return _expect_bytes(count)
        return _expect_bytes(os.preadv(self._file, [view], begin))


def runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where neighbours stand side by side in a list of indices: (place of the first, how many)."""
    start = 0
    for place in range(1, len(indices) + 1):
        if place == len(indices) or indices[place] != indices[place - 1] + 1:
            yield start, place - start
            start = place


def read_error(error: OSError | EOFError, name: str, path: Path,
               damaged: Callable[[str], InputError]) -> GptqBelleError:
    """The error for a tensor that could not be read: HardwareError for what this machine refused, else `damaged`."""
    if isinstance(error, OSError):
        error.filename = error.filename or str(path)
        return from_os_error(error) or damaged(f"tensor {name[:100]}: {error.strerror}")
    return damaged(f"tensor {name[:100]}: {error}")


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, for reading and writing."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _expect_bytes(count: int) -> int:
    if not count:
        raise EOFError("the file ends inside of it; it shrank while it was read")
    return count


@contextmanager
def _direct_handle(file: int) -> Iterator[int | None]:
    """The same file, to be read past the system's cache; None where the file system has no such thing."""
    found = None
    with suppress(OSError):
        found = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_DIRECT)
    try:
        yield found
    finally:
        if found is not None:
            os.close(found)


def _is_cached(file: int, begin: int, size: int) -> bool:
    """Whether the system's cache holds all pages of a part of a file (mincore(2)); where it won't say, it says yes."""
    size = min(size, os.fstat(file).st_size - begin)
    try:
        mapped = mmap.mmap(file, max(1, size), flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=begin)
    except (OSError, ValueError):  # the file has become shorter
        return True
    pages = np.zeros(-(-size // PAGE), np.uint8)
    place = np.frombuffer(mapped, np.uint8).ctypes.data  # never read: a page that is gone would end the process
    asked = ctypes.CDLL(None).mincore(ctypes.c_void_p(place), ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data))
    return asked != 0 or bool((pages & 1).all())
