"""The stream that BELLE's encrypted files are XORed with, chunk for chunk as BELLE's own program makes it.

Data and key are read in chunks of 10 MiB in lock-step. Where the key file ends, its last, short chunk is repeated until
its chunk of data is full, and the next chunk of data meets the key's beginning again: the stream is not simply cyclic
(github.com/LianjiaTech/BELLE, models/decrypt.py).
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from io import RawIOBase
from pathlib import Path
from typing import Self

import numpy as np

from gptq_belle.common.files import is_lfs_pointer
from gptq_belle.errors import InputError

CHUNK_BYTES = 10 * 1024 * 1024
Bytes = np.ndarray  # of uint8


class Key:
    """A key file.

    Args:
        path: Meta's ``consolidated.00.pth``.
        chunk_bytes: of the lock-step; any but 10 MiB is for tests.

    Raises:
        InputError: it is not there, empty, or a git-lfs pointer.
    """

    def __init__(self, path: Path, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.path, self.chunk_bytes = path, chunk_bytes
        if not path.is_file():
            raise InputError(f"the key {path} is not a file", "Name LLaMA's consolidated.00.pth.")
        if is_lfs_pointer(path):
            raise InputError(f"the key {path} is a git-lfs pointer, not the file itself", "Fetch it: git lfs pull.")
        self.size = path.stat().st_size
        if self.size == 0:
            raise InputError(f"the key {path} is empty", "Copy LLaMA's consolidated.00.pth again.")

    def apply(self, index: int, data: Bytes) -> None:
        """XOR chunk number `index` of a file in place; only the last one may be shorter than `chunk_bytes`.

        Raises:
            InputError: the key file shrank.
        """
        begin = index % -(-self.size // self.chunk_bytes) * self.chunk_bytes
        count = min(self.chunk_bytes, self.size - begin, len(data))
        with self.path.open("rb", buffering=0) as file:
            file.seek(begin)
            key = read_chunk(file, count)
        if len(key) < count:
            raise InputError(f"the key {self.path} shrank while it was read", "Something else writes it; run again.")
        data ^= key if count == len(data) else np.resize(key, len(data))  # np.resize repeats


class Digests:
    """MD5 and SHA-256 of what went by, as BELLE publishes them."""

    def __init__(self) -> None:
        self.md5 = hashlib.md5(usedforsecurity=False)
        self.sha256 = hashlib.sha256()

    def update(self, data: Bytes) -> None:
        """Take in some more bytes."""
        self.md5.update(data.data)
        self.sha256.update(data.data)

    @classmethod
    def of(cls, path: Path, skip: int = 0) -> Self:
        """Of a whole file from byte `skip` on."""
        found = cls()
        with path.open("rb", buffering=0) as file:
            file.seek(skip)
            while len(data := read_chunk(file, CHUNK_BYTES)):
                found.update(data)
        return found


def read_chunk(file: RawIOBase, count: int) -> Bytes:
    """Up to `count` bytes, fewer only at the file's end."""
    data = np.empty(count, np.uint8)
    filled = 0
    while filled < count and (some := file.readinto(data[filled:].data)):
        filled += some
    return data[:filled]


def xor_file(source: RawIOBase, out: RawIOBase, key: Key, plain: Digests, *, first: int = 0, encrypting: bool = False,
             moved: Callable[[int], None] = lambda count: None) -> None:
    """XOR a file from where it stands to its end.

    While one chunk is read and XORed, the one before is hashed and written in threads: MD5 alone takes 1.5 s a GB.

    Args:
        source, out: both opened unbuffered, at the beginning of a chunk.
        plain: takes in the plain side: what is written, or with `encrypting` what is read.
        first: the number of that chunk.
        moved: called with the bytes of each chunk.
    """
    with ThreadPoolExecutor(3) as pool:
        tasks: list[Future[None]] = []
        while len(data := read_chunk(source, key.chunk_bytes)):
            hashed = data.copy() if encrypting else data
            key.apply(first, data)
            for task in tasks:
                task.result()
            tasks = [pool.submit(plain.md5.update, hashed.data), pool.submit(plain.sha256.update, hashed.data),
                     pool.submit(write_all, out, data)]
            moved(len(data))
            first += 1
        for task in tasks:
            task.result()


def write_all(out: RawIOBase, data: Bytes) -> None:
    """Write bytes to an unbuffered file, however many calls that takes."""
    view = data.data
    while view:
        view = view[out.write(view) or 0:]
