"""Timing of CUDA kernels in graphs."""

from collections.abc import Callable, Sequence

import torch

from gptq_belle.common.timers import Spread, spread

DEFAULT_L2 = 64 << 20  # if torch does not report it: the largest cache of the GPUs concerned
MIN_INTERVAL = 2e-3  # seconds between two events; the resolution of events is too coarse for shorter intervals
Action = Callable[[], object]


def operand_copies(size: int, device: torch.device, most: int = 64) -> int:
    """Number of operands of `size` bytes that fill four times the L2 cache, so that none is still cached when its turn
    comes again; at least 2, at most `most`."""
    l2 = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or DEFAULT_L2)
    return max(2, min(most, -(-4 * l2 // size)))


def device_seconds(actions: Sequence[Action], repeats: int = 7) -> Spread:
    """Seconds per action of several equal actions that run in turns, without the time of launching from Python.

    The actions are captured in a CUDA graph, because launching a Triton kernel of 8 microseconds takes longer than
    running it. The graph is replayed often enough for an interval between events.

    Args:
        actions: what to time on the current device, each with separate operands; compiled or not.
        repeats: number of intervals.
    Raises:
        RuntimeError: an action cannot be captured, or fails.
    """
    graph = capture_graph(actions)
    graph.replay()
    times = max(1, int(MIN_INTERVAL / max(replay_seconds(graph, 1), 1e-6)))
    return spread([replay_seconds(graph, times) / (times * len(actions)) for _ in range(repeats)])


def capture_graph(actions: Sequence[Action]) -> torch.cuda.CUDAGraph:
    """Capture the actions one after another; each runs once before, for compilation and lazy initialization."""
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


def replay_seconds(graph: torch.cuda.CUDAGraph, times: int) -> float:
    """Seconds between events around `times` replays."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
