"""Memory bandwidth and kernel times of this machine, on a CPU and on a CUDA device."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gptq_belle.common.timers import Spread, seconds, spread
from gptq_belle.kernels import cpu_layout, cpu_matmul
from gptq_belle.kernels.native_library import load_library

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
    """Twice the last-level cache, so that little of a buffer stays there; 256 MiB to 1 GiB, or half of what is free."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1024 * MIB
    return min(1024 * MIB, max(256 * MIB, 2 * last_level_cache()), max(MIB, free // 2))


def last_level_cache() -> int:
    """Bytes of the largest cache of the first CPU core; 0 where the system does not tell.

    A virtual machine is told of its host's whole cache, of which it has a share at best.
    """
    sizes = [file.read_text().strip() for file in _CACHES.glob("index*/size")]
    return max((int(size[:-1]) * _UNITS[size[-1]] for size in sizes if size[-1:] in _UNITS), default=0)


_MIB = 1 << 20
L2 = 64 * _MIB  # where torch does not tell: that of the largest part that may not
SHORTEST = 2e-3  # seconds between two events; below, their own resolution shows
Action = Callable[[], object]


def rotated_bytes(device: torch.device) -> int:
    """How many bytes of operands actions must go through, so that none finds its own in the L2 cache: four times it."""
    return 4 * int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or L2)


def copies(size: int, device: torch.device, most: int = 64) -> int:
    """How many operands of `size` bytes fill `rotated_bytes`; at least 2, at most `most`."""
    return max(2, min(most, -(-rotated_bytes(device) // size)))


def device_seconds(actions: Sequence[Action], repeats: int = 7) -> Spread:
    """Seconds of one of some like actions, which take turns; launching them from Python does not count.

    They are captured in a CUDA graph (a Triton kernel of 8 microseconds takes longer to launch than to run), which is
    replayed until an interval is long enough for events.

    Args:
        actions: what to time, on the current device, with operands of their own; compiled or not.
        repeats: intervals.
    Raises:
        RuntimeError: something that cannot be captured, or that fails.
    """
    graph = captured(actions)
    graph.replay()
    once = interval(graph, 1)
    times = max(1, int(SHORTEST / max(once, 1e-6)))
    return spread([interval(graph, times) / (times * len(actions)) for _ in range(repeats)])


def captured(actions: Sequence[Action]) -> torch.cuda.CUDAGraph:
    """The actions one after another as a graph, each run once before: for compilation and lazy initialization."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for action in actions:
            action()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for action in actions:
            action()
    return graph


def interval(graph: torch.cuda.CUDAGraph, times: int) -> float:
    """Seconds between events around so many replays."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def copy_bandwidth(device: torch.device, size: int = 512 * _MIB) -> Spread:
    """Bytes per second, read and written, of a copy from device memory to device memory."""
    pairs = [(torch.empty(size, dtype=torch.uint8, device=device), torch.empty(size, dtype=torch.uint8, device=device))
             for _ in range(2)]
    took = device_seconds([lambda a=a, b=b: b.copy_(a) for a, b in pairs])  # type: ignore[misc]
    return spread([2 * size / value for value in took.values])


def matrix_peak(device: torch.device, dtype: torch.dtype = torch.float16, side: int = 8192) -> Spread:
    """Operations per second of cuBLAS on square matrices (side, side): what its tensor cores reach in practice."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    took = device_seconds([lambda: torch.mm(a, b, out=out)])
    return spread([2 * side**3 / value for value in took.values])
