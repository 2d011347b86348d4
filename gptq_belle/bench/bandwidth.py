"""Memory bandwidth of this machine, and the size of its last-level cache."""

import os
from pathlib import Path

import torch

from gptq_belle.common.timers import Spread, seconds, spread
from gptq_belle.kernels import cpu_layout, cpu_matmul
from gptq_belle.kernels.native_library import load_library

MIB = 1 << 20
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def read_bandwidth(device: torch.device | str = "cpu", repeats: int = 7, size: int | None = None) -> Spread:
    """Bytes per second of reading memory; on CUDA of a copy, with read and written bytes counted.

    On a CPU the native kernels read the buffer with all of torch's threads and in huge pages (pages of 4 KiB are a
    third slower). Without the native kernels a matrix-vector product is timed, which reads the fastest of torch's
    operations (measured on 2 cores: 31 GB/s; a sum reaches 26 and NumPy's maximum 14).

    Args:
        repeats: number of timed reads, after one that is not timed.
        size: bytes of the buffer. Default: `buffer_bytes()`.
    """
    bytes_ = size or buffer_bytes()
    if torch.device(device).type == "cpu" and not isinstance(load_library(), str):
        codes = cpu_layout.empty_codes(1, 1, -(-bytes_ // 64)).fill_(1)
        times = [seconds(lambda: cpu_matmul.read_memory(codes)) for _ in range(repeats + 1)]
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
    """Twice the last-level cache within 256 MiB to 1 GiB, but at most half of the free memory."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1024 * MIB
    return min(1024 * MIB, max(256 * MIB, 2 * last_level_cache()), max(MIB, free // 2))


def last_level_cache() -> int:
    """Bytes of the largest cache of the first CPU core; 0 if the system does not report it.

    A virtual machine reports the whole cache of its host.
    """
    sizes = [file.read_text().strip() for file in _CACHES.glob("index*/size")]
    return max((int(size[:-1]) * _UNITS[size[-1]] for size in sizes if size[-1:] in _UNITS), default=0)
