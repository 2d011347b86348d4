"""The key stream of BELLE's encrypted files, as in github.com/LianjiaTech/BELLE, models/decrypt.py.

Data and key are read in chunks of 10 MiB. The last, short chunk of the key is repeated to the size of its data chunk,
and the next data chunk is XORed with the first chunk of the key again. So the stream is not simply cyclic.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedRandom, BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any, Self

import numpy as np

from gptq_belle.common.files import is_lfs_pointer
from gptq_belle.errors import InputError

CHUNK_BYTES = 10 * 1024 * 1024
Bytes = np.ndarray  # uint8


class Key:
    """A key file.

    Args:
        path: Meta's ``consolidated.00.pth``.
        chunk_bytes: size of a chunk of key and data.

    Raises:
        InputError: the file is missing, empty, or a git-lfs pointer.
    """

    def __init__(self, path: Path, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.path, self.chunk_bytes = path, chunk_bytes
        if not path.is_file():
            raise InputError(f"the key {path} is not a file", "Give the path of LLaMA's consolidated.00.pth.")
        if is_lfs_pointer(path):
            raise InputError(f"the key {path} is a git-lfs pointer, not the file itself", "Fetch it: git lfs pull.")
        self.size = path.stat().st_size
        if self.size == 0:
            raise InputError(f"the key {path} is empty", "Copy LLaMA's consolidated.00.pth again.")

    def apply(self, index: int, data: Bytes) -> None:
        """XOR chunk number `index` of a file in place; only the last chunk may be shorter than `chunk_bytes`.

        Raises:
            InputError: the key file has become shorter.
        """
        begin = index % -(-self.size // self.chunk_bytes) * self.chunk_bytes
        count = min(self.chunk_bytes, self.size - begin, len(data))
        with self.path.open("rb") as file:
            file.seek(begin)
            key = read_chunk(file, count)
        if len(key) < count:
            raise InputError(f"the key {self.path} became shorter while it was read",
                             "Another program is writing it; run again when it has finished.")
        data ^= key if count == len(data) else np.resize(key, len(data))  # np.resize repeats


class Digests:
    """MD5 and SHA-256, which BELLE publishes, of a stream of data."""

    def __init__(self) -> None:
        self.md5 = hashlib.md5(usedforsecurity=False)
        self.sha256 = hashlib.sha256()

    def update(self, data: Bytes) -> None:
        """Add data."""
        self.md5.update(data.data)
        self.sha256.update(data.data)

    @classmethod
    def of(cls, path: Path) -> Self:
        """Digests of a file."""
        found = cls()
        with path.open("rb") as file:
            while len(data := read_chunk(file, CHUNK_BYTES)):
                found.update(data)
        return found


def read_chunk(file: BufferedReader | BufferedRandom, count: int) -> Bytes:
    """Read `count` bytes, fewer only at the end of the file."""
    data = np.empty(count, np.uint8)
    return data[: file.readinto(data.data)]


def xor_file(source: BufferedReader, out: BufferedWriter | BufferedRandom, key: Key, plain: Digests, *,
             first: int = 0, encrypting: bool = False,
             progress: Callable[[int], None] = lambda count: None) -> None:
    """XOR a file with the key stream, from its current position to its end.

    While one chunk is read and XORed, threads hash and write the previous one: MD5 alone takes 1.5 s per GB.

    Args:
        source, out: files, positioned at the start of a chunk.
        plain: updated with the plain data: the output, or the input with `encrypting`.
        encrypting: whether the input is the plain data.
        progress: progress callback, called with the bytes of each chunk.
    """
    with ThreadPoolExecutor(3) as pool:
        tasks: list[Future[Any]] = []
        while len(data := read_chunk(source, key.chunk_bytes)):
            hashed = data.copy() if encrypting else data
            key.apply(first, data)
            for task in tasks:
                task.result()
            tasks = [pool.submit(plain.md5.update, hashed.data), pool.submit(plain.sha256.update, hashed.data),
                     pool.submit(out.write, data.data)]
            progress(len(data))
            first += 1
        for task in tasks:
            task.result()
