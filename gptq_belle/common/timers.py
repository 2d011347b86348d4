"""Wall time of a call, the spread of repeated measurements, and the time of a job by phase."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, minimum and maximum of repeated measurements, and the values in order."""

    median: float
    low: float
    high: float
    values: tuple[float, ...]


def spread(values: Sequence[float]) -> Spread:
    """Summarize one or more values."""
    return Spread(statistics.median(values), min(values), max(values), tuple(values))


def seconds(action: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Wall time of one call in seconds, including all work queued on the device."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device | str) -> None:
    """Wait until a CUDA device has finished its queued work; no effect on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class PhaseClock:
    """Measure the time of named phases: ``with clock("name"):``. Time in a nested phase counts for that phase only.

    Args:
        synchronize: called before each reading of the clock; on a GPU, waits for the device.
    Attributes:
        seconds: seconds by phase name, since creation or the last `restart`.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._synchronize = synchronize or (lambda: None)
        self._names: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._charge()
        self._names.append(name)
        try:
            yield
        finally:
            self._charge()
            self._names.pop()

    def restart(self) -> dict[str, float]:
        """Return the seconds so far and start from zero."""
        self._charge()
        found, self.seconds = dict(self.seconds), defaultdict(float)
        return found

    def _charge(self) -> None:
        if self._names:
            self._synchronize()
        now = time.perf_counter()
        if self._names:
            self.seconds[self._names[-1]] += now - self._since
        self._since = now
