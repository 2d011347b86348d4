"""Folders that only one process at a time may write."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptq_belle.errors import UsageError


def lock(folder: Path) -> int:
    """An open handle of a folder that only this process holds; the system lets it go when the process ends.

    Raises:
        UsageError: another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UsageError(f"another job is writing {folder}", "Wait for it, or choose another output.") from error
    return handle


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context in which only this process holds a folder; raises UsageError as `lock`."""
    handle = lock(folder)
    try:
        yield
    finally:
        os.close(handle)
