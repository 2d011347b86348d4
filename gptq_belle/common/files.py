"""Files that are either whole or absent, folder locks, and git-lfs pointers in place of files."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

from gptq_belle.errors import HardwareError, InputError, UsageError

try:
    import fcntl
except ImportError as error:  # Windows has none
    raise HardwareError("gptq_belle runs on Linux; this system has no POSIX file locks",
                        "On Windows, install it inside WSL2.") from error

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
UNFINISHED = ".unfinished"


class Stamp(NamedTuple):
    """What a file must look like: its size and the SHA-256 of its content."""

    bytes: int
    sha256: str


class DurableFile:
    """A context that writes one file; the name appears when it is left without an error, and then for good.

    Args:
        path: the final name; a file of that name is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(path.name + UNFINISHED)
        self._digest = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> Self:
        self._file: BinaryIO = self._temporary.open("wb")
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            try:
                self._file.close()  # flushes once more, which a full disk refuses once more
            finally:
                if error is not None:
                    self._temporary.unlink(missing_ok=True)
                if isinstance(error, OSError) and error.filename is None:
                    error.filename = str(self.path)  # a full disk says no name by itself
        if error is None:
            self._temporary.replace(self.path)
            sync(self.path.parent)

    @property
    def stamp(self) -> Stamp:
        """Of what was written so far."""
        return Stamp(self._size, self._digest.hexdigest())


def write_json_durably(path: Path, content: Mapping[str, Any]) -> Stamp:
    """One JSON file, whole or not there."""
    with DurableFile(path) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return file.stamp


def stamp_of(path: Path) -> Stamp:
    """Read a file through for its stamp.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Stamp(file.tell(), digest)


def is_whole(path: Path, stamp: Stamp) -> bool:
    """True where the file is there and looks like its stamp."""
    try:
        return path.stat().st_size == stamp.bytes and stamp_of(path) == stamp
    except OSError:
        return False


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def is_pointer(path: Path) -> bool:
    """True where git-lfs left its note in place of the file."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def check_fetched(path: Path) -> None:
    """Refuse git-lfs's note in place of a file; what is no plain file is left for the reader to name.

    Raises:
        InputError: it is one.
    """
    if path.is_file() and is_pointer(path):
        raise InputError(f"{path} is a git-lfs pointer, not the file itself", "Fetch it: git lfs pull.")
