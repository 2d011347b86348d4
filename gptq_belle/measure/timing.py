"""Wall time of one action, and the spread over repeats."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeats of one figure: their median, lowest and highest, and the values themselves in the order they came."""

    median: float
    low: float
    high: float
    values: tuple[float, ...]


def spread(values: Sequence[float]) -> Spread:
    """Summarize at least one value."""
    return Spread(statistics.median(values), min(values), max(values), tuple(values))


def seconds(action: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Wall time in seconds of one call, the device's queue included."""
    synchronize(device)
    began = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device | str) -> None:
    """Wait until a CUDA device has done what it was given; nothing to wait for on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def call_seconds(repeats: int = 2000) -> float:
    """What one small torch operation costs when called from Python, in seconds: the least that any layer pays."""
    a, b = torch.ones(8), torch.ones(8)
    with torch.inference_mode():
        times = [seconds(lambda: [torch.add(a, b) for _ in range(repeats // 5)]) for _ in range(5)]
    return min(times) / (repeats // 5)
