"""Memory for large tensors on a CPU, in huge pages where the system has them."""

import contextlib
import mmap
import weakref
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21  # bytes
Allocator = Callable[[int], Tensor]  # gives so many bytes, (size,) uint8, with any contents


def empty_bytes(size: int) -> Tensor:
    """Memory that nothing was written to, (size,) uint8.

    With pages of 4 KiB, a product with one row of x spends a third of its time on translating addresses, and a file in
    the system's cache is read at 1.6 GB/s instead of 4. The memory is mapped anew: what an allocator gives may have
    been touched before, in small pages, which stay small.
    """
    return _within(_mapped(size), size) if _worthwhile(size) else torch.empty(size, dtype=torch.uint8)


class MemoryPool:
    """`empty_bytes` out of memory that was given out before, as soon as no tensor holds it any more.

    For what is read and soon dropped, such as a checkpoint's words: the first touch of a page takes 0.3 s a GB, on a
    virtual machine whose host has to find the page, too, more than 1 s.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[mmap.mmap]] = defaultdict(list)
        self._keeps = True

    def __call__(self, size: int) -> Tensor:
        """Memory with any contents, (size,) uint8."""
        if not _worthwhile(size):
            return empty_bytes(size)
        free = self._free[size]
        mapped = free.pop() if free else _mapped(size)
        view = memoryview(mapped)  # the tensor's only hold on it
        weakref.finalize(view, self._back, mapped, size).atexit = False
        return _within(view, size)

    def stop_pooling(self) -> None:
        """From now on, what is free is given to the system."""
        self._keeps = False
        self._free.clear()

    def _back(self, mapped: mmap.mmap, size: int) -> None:
        if self._keeps:
            self._free[size].append(mapped)


def _worthwhile(size: int) -> bool:
    return size >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE")


def _mapped(size: int) -> mmap.mmap:
    mapped = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


def _within(mapped: mmap.mmap | memoryview, size: int) -> Tensor:
    """From the first huge page on; what lies in front is never touched."""
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE
    return memory[start : start + size]
