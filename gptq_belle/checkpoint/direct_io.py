"""Read bytes of a file from the page cache if it contains them, else by direct I/O.

Filling the page cache costs 0.3 to 0.45 s of CPU time per GB, direct I/O 0.05 s, and the page cache takes memory that
the model needs. Weights are packed on the same cores: with direct I/O, BELLE-7B in 4 bits loads 3.0 times as fast
(benchmarks/results/belle_7b_epyc.json). A disk slower than SLOW_DISK leaves the cores idle anyway: its data is read
through the page cache, which speeds up the next load.
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

PAGE = mmap.PAGESIZE  # bytes; alignment of direct I/O, sufficient for every file system
PIECE = 4 << 20  # bytes per read
LARGE = 1 << 20  # bytes; smaller reads use the page cache and its readahead
TRIAL_BYTES = 64 << 20  # bytes to read before the speed of the disk is judged
SLOW_DISK = 600e6  # bytes per second; SATA is slower


class FileBytes:
    """Reads bytes of a file that stays open, so that a file that replaces it is not mixed with it.

    Reading raises OSError for errors of the system, and EOFError if the file is too short.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self._direct = hasattr(os, "O_DIRECT")
        self._bytes, self._seconds = 0, 0.0  # statistics of direct I/O

    @property
    def path(self) -> str:
        """A path of the open file, even if another file has its name now."""
        return f"/proc/self/fd/{self._file}"

    def size(self) -> int:
        """Current size of the file in bytes."""
        return os.fstat(self._file).st_size

    def read(self, begin: int, size: int, allocator: Allocator, align: int = 1) -> Tensor:
        """Read (size,) uint8 into newly allocated memory.

        Args:
            align: alignment of the result's address in bytes.
        """
        if size < LARGE or begin % align or not self._direct:
            found = allocator(size)
            self._read_cached(begin, byte_view(found))
            return found
        lead, room = begin % PAGE, allocator(size + 3 * PAGE)  # lead: offset of the first byte in its page
        start = -room.data_ptr() % PAGE  # direct I/O reads whole pages, so offsets within pages are kept
        stop = start + lead + size
        view = byte_view(room[start : stop + -(stop - start) % PAGE])
        with _direct_handle(self._file) as direct:
            at = 0
            while at < lead + size:
                at += self._piece(direct, begin - lead + at, view[at : at + PIECE])
        return room[start + lead : stop]

    def pieces(self, begin: int, size: int, chosen: Sequence[int], allocator: Allocator, align: int = 1) -> Tensor:
        """Read some of the consecutive pieces of `size` bytes that start at `begin`.

        Args:
            begin: offset of piece 0 in the file.
            size: bytes of a piece.
            chosen: numbers of the pieces to read, in the order of the result.
            allocator, align: see `read`.
        Returns:
            (len(chosen) * size,) uint8.
        """
        runs = list(consecutive_runs(chosen))
        if len(runs) == 1:
            return self.read(begin + chosen[0] * size, len(chosen) * size, allocator, align)
        found = allocator(len(chosen) * size)
        for place, count in runs:
            self._read_cached(begin + chosen[place] * size, byte_view(found[place * size : (place + count) * size]))
        return found

    def fill_cache(self, begin: int, end: int) -> None:
        """Read bytes into the page cache, one piece in memory at a time; stops at the end of the file."""
        buffer = bytearray(min(PIECE, end - begin))
        while begin < end and (count := os.preadv(self._file, [buffer], begin)):
            begin += count

    def _read_cached(self, begin: int, view: memoryview) -> None:
        """Read into a buffer through the page cache."""
        while view:
            count = _expect_bytes(os.preadv(self._file, [view[: 1 << 30]], begin))
            begin, view = begin + count, view[count:]

    def _piece(self, direct: int | None, begin: int, view: memoryview) -> int:
        """Read into the start of `view`, and return the number of bytes, at least one."""
        if self._direct and direct is not None and begin % PAGE == 0 and not _is_cached(self._file, begin, len(view)):
            start = time.perf_counter()
            try:
                count = os.preadv(direct, [view], begin)
            except OSError:  # some file systems only allow opening; a disk error is raised below, too
                self._direct = False
            else:
                self._bytes, self._seconds = self._bytes + count, self._seconds + time.perf_counter() - start
                self._direct = self._bytes < TRIAL_BYTES or self._bytes > SLOW_DISK * self._seconds
                return _expect_bytes(count)
        return _expect_bytes(os.preadv(self._file, [view], begin))


def consecutive_runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Split indices into runs of consecutive numbers, and yield (position of the first, length) of each run."""
    start = 0
    for place in range(1, len(indices) + 1):
        if place == len(indices) or indices[place] != indices[place - 1] + 1:
            yield start, place - start
            start = place


def read_error(error: OSError | EOFError, name: str, path: Path,
               damaged: Callable[[str], InputError]) -> GptqBelleError:
    """Build the error for a tensor that could not be read: from the OSError if it is a known one, else `damaged`."""
    if isinstance(error, OSError):
        error.filename = f"{error.filename or path}, tensor {name[:100]}"
        return from_os_error(error) or damaged(f"tensor {name[:100]}: {error.strerror}")
    return damaged(f"tensor {name[:100]}: {error}")


def byte_view(tensor: Tensor) -> memoryview:
    """Bytes of a contiguous CPU tensor as a writable memory view."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _expect_bytes(count: int) -> int:
    if not count:
        raise EOFError("the file ends inside it; it became shorter while it was read")
    return count


@contextmanager
def _direct_handle(file: int) -> Iterator[int | None]:
    """Open the same file for direct I/O; None if the file system does not support it."""
    handle = None
    with suppress(OSError):
        handle = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_DIRECT)
    try:
        yield handle
    finally:
        if handle is not None:
            os.close(handle)


def _is_cached(file: int, begin: int, size: int) -> bool:
    """Whether the page cache contains a part of a file, by mincore(2); True if the system does not tell."""
    size = min(size, os.fstat(file).st_size - begin)
    try:
        mapped = mmap.mmap(file, max(1, size), flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=begin)
    except (OSError, ValueError):  # the file has become shorter
        return True
    pages = np.zeros(-(-size // PAGE), np.uint8)
    place = np.frombuffer(mapped, np.uint8).ctypes.data  # the map is never read: a missing page would raise SIGBUS
    asked = ctypes.CDLL(None).mincore(ctypes.c_void_p(place), ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data))
    return asked != 0 or bool((pages & 1).all())
