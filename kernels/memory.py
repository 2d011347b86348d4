"""Memory for large tensors on a CPU, in huge pages where the system has them."""

import contextlib
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21  # bytes


def empty_bytes(size: int) -> Tensor:
    """Memory that nothing was written to, (size,) uint8.

    With pages of 4 KiB, a product with one row of x spends a third of its time on translating addresses, and a file in
    the system's cache is read at 1.6 GB/s instead of 4. The memory is mapped anew: what an allocator gives may have
    been touched before, in small pages, which stay small.
    """
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    mapped = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE  # what lies in front is never touched
    return memory[start : start + size]
