"""Memory for large tensors on a CPU, in huge pages if the system supports them."""

import contextlib
import mmap
import weakref
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21  # bytes
Allocator = Callable[[int], Tensor]  # of a size in bytes; returns (size,) uint8 with arbitrary contents


def empty_bytes(size: int) -> Tensor:
    """Allocate memory without writing to it: (size,) uint8.

    With pages of 4 KiB, a product with one row of x spends a third of its time on translating addresses, and a file in
    the system's cache is read at 1.6 GB/s instead of 4. The memory is always newly mapped: an allocator may return
    memory that was touched before in small pages, and such pages stay small.
    """
    return _aligned_tensor(_map_memory(size), size) if _uses_huge_pages(size) else torch.empty(size, dtype=torch.uint8)


class MemoryPool:
    """`empty_bytes` that reuses memory as soon as no tensor refers to it.

    Use it for data that is read and soon discarded, such as a checkpoint's words: the first access to new pages takes
    0.3 s per GB, and more than 1 s on a virtual machine whose host has to allocate the page as well.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[mmap.mmap]] = defaultdict(list)
        self._pooling = True

    def __call__(self, size: int) -> Tensor:
        """Allocate memory with arbitrary contents, (size,) uint8."""
        if not _uses_huge_pages(size):
            return empty_bytes(size)
        free = self._free[size]
        mapped = free.pop() if free else _map_memory(size)
        view = memoryview(mapped)  # the tensor refers to the memory through this view only
        weakref.finalize(view, self._release, mapped, size).atexit = False
        return _aligned_tensor(view, size)

    def stop_pooling(self) -> None:
        """Return free memory to the system, now and from now on."""
        self._pooling = False
        self._free.clear()

    def _release(self, mapped: mmap.mmap, size: int) -> None:
        if self._pooling:
            self._free[size].append(mapped)


def _uses_huge_pages(size: int) -> bool:
    return size >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE")


def _map_memory(size: int) -> mmap.mmap:
    mapped = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without huge pages
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


def _aligned_tensor(mapped: mmap.mmap | memoryview, size: int) -> Tensor:
    """The `size` bytes from the first huge page on; the bytes before it are never touched."""
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE
    return memory[start : start + size]
