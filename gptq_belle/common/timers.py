"""Wall time of one action, its spread over repeats, and the seconds of a job by phase."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


class PhaseClock:
    """Called with a name, it is a context whose seconds are charged to that name; inner contexts are not charged twice.

    Args:
        settle: called before each look at the clock; on a GPU, what waits for it.

    Attributes:
        seconds: by name, since the clock was made or `restart` was called.
    """

    def __init__(self, settle: Callable[[], None] | None = None) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._settle = settle or (lambda: None)
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
        """The seconds so far; counting begins anew."""
        self._charge()
        found, self.seconds = dict(self.seconds), defaultdict(float)
        return found

    def _charge(self) -> None:
        if self._names:
            self._settle()
        now = time.perf_counter()
        if self._names:
            self.seconds[self._names[-1]] += now - self._since
        self._since = now
