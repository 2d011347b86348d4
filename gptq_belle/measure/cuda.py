"""Times on a CUDA device as a kernel alone takes them: CUDA graphs, events, and operands that are not in the cache."""

from collections.abc import Callable, Sequence

import torch

from gptq_belle.measure.timing import Spread, spread

MIB = 1 << 20
L2 = 64 * MIB  # where torch does not tell: that of the largest part that may not
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


def copy_bandwidth(device: torch.device, size: int = 512 * MIB) -> Spread:
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
