"""Atomic file writes, checksums, folder locks and detection of git-lfs pointers."""

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
UNFINISHED_SUFFIX = ".unfinished"


class FileChecksum(NamedTuple):
    """Size of a file in bytes, and the SHA-256 of its content."""

    bytes: int
    sha256: str


class AtomicFile:
    """Context manager that writes one file completely or not at all.

    The data goes to a temporary file, which is synced and renamed when the context exits without an error.

    Args:
        path: final path; an existing file is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(path.name + UNFINISHED_SUFFIX)
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
                self._file.close()  # flushes again, which fails again if the disk is full
            finally:
                if error is not None:
                    self._temporary.unlink(missing_ok=True)
                if isinstance(error, OSError) and error.filename is None:
                    error.filename = str(self.path)  # the error of a full disk names no file
        if error is None:
            self._temporary.replace(self.path)
            fsync(self.path.parent)

    @property
    def checksum(self) -> FileChecksum:
        """Checksum of the data written so far."""
        return FileChecksum(self._size, self._digest.hexdigest())


def write_json_atomically(path: Path, content: Mapping[str, Any]) -> FileChecksum:
    """Write one JSON file completely or not at all."""
    with AtomicFile(path) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return file.checksum


def file_checksum(path: Path) -> FileChecksum:
    """Compute the checksum of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileChecksum(file.tell(), digest)


def matches_checksum(path: Path, checksum: FileChecksum) -> bool:
    """Whether a file exists and has this size and content."""
    try:
        return path.stat().st_size == checksum.bytes and file_checksum(path) == checksum
    except OSError:
        return False


def fsync(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock_folder(folder: Path) -> int:
    """Lock a folder exclusively and return the open handle; the system releases it when the process ends.

    Raises:
        UsageError: another process holds the lock.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UsageError(f"another job is writing {folder}", "Wait for it, or choose another output.") from error
    return handle


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Context manager that locks a folder; raises UsageError like `lock_folder`."""
    handle = lock_folder(folder)
    try:
        yield
    finally:
        os.close(handle)


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is only a git-lfs pointer to the real one."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def reject_lfs_pointer(path: Path) -> None:
    """Raise InputError if a path is a git-lfs pointer. Paths that are not regular files are left to the caller.

    Raises:
        InputError: the file is a git-lfs pointer.
    """
    if path.is_file() and is_lfs_pointer(path):
        raise InputError(f"{path} is a git-lfs pointer, not the file itself", "Fetch it: git lfs pull.")
