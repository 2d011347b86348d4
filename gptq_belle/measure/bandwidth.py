"""How fast this machine reads memory: the limit of decoding, where every token reads every weight once."""

import os
from pathlib import Path

import torch

from gptq_belle.kernels import cpu_layout, cpu_matmul
from gptq_belle.kernels.library import library
from gptq_belle.measure.timing import Spread, seconds, spread

MIB = 1 << 20
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def read_bandwidth(device: torch.device | str = "cpu", repeats: int = 7, size: int | None = None) -> Spread:
    """Bytes per second of a plain read (of a copy, read and write counted, on CUDA).

    On a CPU it is the native kernels' plain read, with all of torch's threads and in huge pages (with pages of 4 KiB
    it is a third slower). Where they are missing, a matrix meets a vector: of torch's operations the one that reads the
    fastest (measured on 2 cores: 31 GB/s, where a sum reaches 26 and numpy's maximum 14).

    Args:
        device: where the buffer lies.
        repeats: how often it is read; one read before them does not count.
        size: bytes of the buffer; left out, `buffer_bytes()`.
    """
    bytes_ = size or buffer_bytes()
    if torch.device(device).type == "cpu" and not isinstance(library(), str):
        codes = cpu_layout.empty_codes(1, 1, -(-bytes_ // 64)).fill_(1)
        times = [seconds(lambda: cpu_matmul.read(codes)) for _ in range(repeats + 1)]
        return spread([codes.nbytes / time for time in times[1:]])
    columns = min(4096, bytes_ // 4)
    matrix = torch.ones(bytes_ // 4 // columns, columns, device=device)
    if matrix.is_cuda:
        target, factor = torch.empty_like(matrix), 2
        times = [seconds(lambda: target.copy_(matrix), device) for _ in range(repeats + 1)]
    else:
        vector, out, factor = torch.ones(columns), torch.empty(len(matrix)), 1
        times = [seconds(lambda: torch.mv(matrix, vector, out=out), device) for _ in range(repeats + 1)]
    return spread([factor * matrix.numel() * 4 / time for time in times[1:]])


def buffer_bytes() -> int:
    """Twice the last-level cache, so that little of a buffer stays there; 256 MiB to 1 GiB, or half of what is free."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1024 * MIB
    return min(1024 * MIB, max(256 * MIB, 2 * last_level_cache()), max(MIB, free // 2))


def last_level_cache() -> int:
    """Bytes of the largest cache of the first CPU core; 0 where the system does not tell.

    A virtual machine is told of its host's whole cache, of which it has a share at best.
    """
    sizes = [file.read_text().strip() for file in _CACHES.glob("index*/size")]
    return max((int(size[:-1]) * _UNITS[size[-1]] for size in sizes if size[-1:] in _UNITS), default=0)
