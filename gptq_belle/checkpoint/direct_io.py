"""The bytes of one file: what the system's cache holds is taken from there, the rest of large pieces is read past it.

Filling the cache takes a processor's time, and memory that the model needs; weights are laid out on the same
processors. benchmarks/bench_belle_7b.py times both ways of reading beside loading. A disk that is slower than SLOW
leaves processors idle anyhow; from there the cache is filled, for whoever loads the model again.
"""

import ctypes
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptq_belle.errors import GptqBelleError, InputError, from_system
from gptq_belle.kernels.huge_pages import Allocator

PAGE = mmap.PAGESIZE  # bytes; what reading past the cache begins and ends at: no file system asks for more
PIECE = 4 << 20  # bytes at a time
LARGE = 1 << 20  # smaller ones are left to the system, which reads ahead
TRIED = 64 << 20  # bytes, before the disk is judged
SLOW = 600e6  # bytes a second; SATA gives less


class FileBytes:
    """Bytes of a file, read when asked for; it stays open, so that they are of one file whatever takes its name.

    All raise OSError where the system does not read, and EOFError, with the reason, where the file ends first.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self._past = hasattr(os, "O_DIRECT")
        self._bytes, self._seconds = 0, 0.0  # that were read past the cache

    @contextmanager
    def from_beginning(self) -> Iterator[FileIO]:
        """The file at its beginning; what else is read here does not move it."""
        with open(os.dup(self._file), "rb", buffering=0) as file:
            file.seek(0)
            yield file

    def read(self, begin: int, size: int, memory: Allocator, align: int = 1) -> Tensor:
        """Some bytes, (size,) uint8, in memory of their own.

        Args:
            begin: of the first one in the file.
            memory: gives so many bytes.
            align: what the result's address has to be a multiple of.
        """
        if size < LARGE or begin % align or not self._past:
            found = memory(size)
            self._fill(begin, raw(found))
            return found
        lead, room = begin % PAGE, memory(size + 3 * PAGE)  # bytes in front of the first one in its page
        start = -room.data_ptr() % PAGE  # a disk writes whole pages: bytes lie in theirs as they do in the file
        stop = start + lead + size
        view = raw(room[start : stop + -(stop - start) % PAGE])
        with _past_cache(self._file) as direct:
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
            self._fill(begin + chosen[place] * size, raw(found[place * size : (place + count) * size]))
        return found

    def fill_cache(self, begin: int, end: int) -> None:
        """Bring bytes into the system's cache, holding no more than a piece of them; stops where the file does."""
        buffer = bytearray(min(PIECE, end - begin))
        while begin < end and (count := os.preadv(self._file, [buffer], begin)):
            begin += count

    def _fill(self, begin: int, view: memoryview) -> None:
        """Read into a buffer, through the system's cache."""
        while view:
            count = _some(os.preadv(self._file, [view[: 1 << 30]], begin))
            begin, view = begin + count, view[count:]

    def _piece(self, direct: int | None, begin: int, view: memoryview) -> int:
        """Fill `view` from its start on; returns how many bytes there are now, at least one."""
        if self._past and direct is not None and begin % PAGE == 0 and not _held(self._file, begin, len(view)):
            began = time.perf_counter()
            try:
                count = os.preadv(direct, [view], begin)
            except OSError:  # what opens does not always read; from the cache, an error is one of the disk
                self._past = False
            else:
                self._bytes, self._seconds = self._bytes + count, self._seconds + time.perf_counter() - began
                self._past = self._bytes < TRIED or self._bytes > SLOW * self._seconds
                return _some(count)
        return _some(os.preadv(self._file, [view], begin))


def runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where neighbours stand side by side in a list of indices: (place of the first, how many)."""
    start = 0
    for place in range(1, len(indices) + 1):
        if place == len(indices) or indices[place] != indices[place - 1] + 1:
            yield start, place - start
            start = place


def unread(error: OSError | EOFError, name: str, path: Path, damaged: Callable[[str], InputError]) -> GptqBelleError:
    """What a user is told of a tensor that was not read: what this machine refused, else why the file is damaged."""
    if isinstance(error, OSError):
        error.filename = error.filename or str(path)
        return from_system(error) or damaged(f"tensor {name[:100]}: {error.strerror}")
    return damaged(f"tensor {name[:100]}: {error}")


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, for reading and writing."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _some(count: int) -> int:
    if not count:
        raise EOFError("the file ends inside of it; it shrank while it was read")
    return count


@contextmanager
def _past_cache(file: int) -> Iterator[int | None]:
    """The same file, to be read past the system's cache; None where the file system has no such thing."""
    found = None
    with suppress(OSError):
        found = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_DIRECT)
    try:
        yield found
    finally:
        if found is not None:
            os.close(found)


def _held(file: int, begin: int, size: int) -> bool:
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
