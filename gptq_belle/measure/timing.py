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
