"""Where a job's seconds go: named phases, of which the innermost one is charged."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
