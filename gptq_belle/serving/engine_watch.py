"""A thread that notices when a step of the engine does not end."""

import sys
import threading
import time
import traceback
from collections.abc import Callable

CHECKS = 8  # per timeout


class EngineHangs(Exception):
    """A step of the engine takes longer than the timeout; a note holds the stack of its thread."""


class EngineWatch:
    """Measures the time of the steps of one thread.

    Args:
        timeout: seconds that one step may take; None for no limit.
        report: called in the watching thread with an EngineHangs, at most once.
    """

    def __init__(self, timeout: float | None, report: Callable[[EngineHangs], None]) -> None:
        self.timeout, self._report = timeout, report
        self._since: float | None = None
        self._watched = 0
        self._closed = threading.Event()
        if timeout is not None:
            threading.Thread(target=self._watch, name="engine-watch", daemon=True).start()

    def begin(self) -> None:
        """A step begins; called in the thread that runs it."""
        self._watched, self._since = threading.get_ident(), time.monotonic()

    def end(self) -> None:
        """No step is running."""
        self._since = None

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        assert self.timeout is not None
        while not self._closed.wait(self.timeout / CHECKS):
            since = self._since
            if since is not None and time.monotonic() - since > self.timeout:
                error = EngineHangs(f"a step takes longer than {self.timeout:g} s")
                if (frame := sys._current_frames().get(self._watched)) is not None:
                    error.add_note("".join(traceback.format_stack(frame)))
                self._report(error)
                return
