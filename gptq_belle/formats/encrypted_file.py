"""Encrypt, decrypt or copy one file of BELLE-LLaMA.

``<name>.<sha256>.enc`` contains the SHA-256 of the plain file in 32 bytes, then the plain bytes XORed with the key
stream (`xor_cipher`). The output is written to ``<name>.unfinished``, which a later run resumes, and gets its name when
its checksum is correct.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gptq_belle.common.files import UNFINISHED_SUFFIX, fsync, reject_lfs_pointer
from gptq_belle.errors import InputError
from gptq_belle.formats.xor_cipher import CHUNK_BYTES, Digests, Key, read_chunk, xor_file

HEADER = 32  # bytes of the SHA-256
NAMED = re.compile(r"(?P<plain>.+)\.(?P<sha256>[0-9a-fA-F]{64})\.enc")
FETCH = "The download is not complete: fetch the file again."
# First bytes of plain files: a wrong key changes them, an incomplete download does not.
FIRST_BYTES = {".json": (b"{", b"["), ".bin": (b"PK\3\4", b"\x80"), ".pt": (b"PK\3\4", b"\x80"), ".model": (b"\n",)}
Progress = Callable[[int], None]  # called with a number of processed bytes


class FileResult(NamedTuple):
    """One file of the output, with the digests of its plain content."""

    name: str
    bytes: int
    md5: str
    sha256: str
    how: str  # "decrypted", "encrypted", "copied", or "unchanged" if an earlier run had finished it


class FileTask(NamedTuple):
    """One file to process.

    Attributes:
        source, out: paths of the input and the output.
        sha256: checksum of the plain file; None if the source is not encrypted.
        size: bytes of the plain file.
    """

    source: Path
    out: Path
    sha256: bytes | None
    size: int


class ChecksumMismatch(Exception):
    """A decrypted file has a wrong checksum.

    Attributes:
        plausible_start: whether its first bytes are those of its file type; None for an unknown type.
    """

    def __init__(self, task: FileTask, plausible_start: bool | None) -> None:
        super().__init__(task.source)
        self.task, self.plausible_start = task, plausible_start


def file_task(path: Path, out: Path) -> FileTask:
    """Create the task for one file of the source.

    Raises:
        InputError: the file is a git-lfs pointer or truncated, or its name contradicts its header.
    """
    size = path.stat().st_size
    reject_lfs_pointer(path)
    if path.suffix != ".enc":
        return FileTask(path, out / path.name, None, size)
    with path.open("rb") as file:
        header = file.read(HEADER)
    if len(header) < HEADER:
        raise InputError(f"{path} is truncated: it has {size} bytes, fewer than the {HEADER} of its checksum", FETCH)
    match = NAMED.fullmatch(path.name)
    if match and bytes.fromhex(match["sha256"]) != header:
        raise InputError(f"{path.name} contains the checksum {header.hex()}, which is not the one of its name",
                         "It was renamed or is damaged: fetch it again.")
    plain = match["plain"] if match else path.name.removesuffix(".enc")
    if plain in ("", ".", ".."):
        raise InputError(f"{path.name} has no file name before its checksum", "Do not use this directory.")
    return FileTask(path, out / plain, header, size - HEADER)


def decrypt_file(task: FileTask, key: Key, progress: Progress) -> FileResult:
    """Decrypt one file. A file that an earlier run finished is kept, an unfinished one is resumed.

    Raises:
        ChecksumMismatch: the checksum is wrong; the output is removed.
    """
    if task.out.is_file() and task.out.stat().st_size == task.size:
        found = Digests.of(task.out)
        if found.sha256.digest() == task.sha256:
            progress(task.size)
            return _result(task, found, "unchanged")
    partial = unfinished_path(task.out)
    if partial.exists():
        try:
            return _decrypted(task, partial, key, progress)
        except ChecksumMismatch:  # the unfinished file may be of another source
            return _decrypted(task, partial, key, lambda count: progress(0))
    return _decrypted(task, partial, key, progress)


def copy_file(task: FileTask, progress: Progress) -> FileResult:
    """Copy one file without changes."""
    partial, found = unfinished_path(task.out), Digests()
    with task.source.open("rb") as source, partial.open("wb") as out:
        while len(data := read_chunk(source, CHUNK_BYTES)):
            found.update(data)
            out.write(data.data)
            progress(len(data))
    _publish(partial, task.out)
    return _result(task, found, "copied")


def encrypt_file(task: FileTask, key: Key, progress: Progress) -> FileResult:
    """Encrypt one file; its name contains the checksum, which is known only at the end."""
    partial, plain = unfinished_path(task.out), Digests()
    with task.source.open("rb") as source, partial.open("wb") as out:
        out.seek(HEADER)
        xor_file(source, out, key, plain, encrypting=True, progress=progress)
        out.seek(0)
        out.write(plain.sha256.digest())
    final = task.out.with_name(f"{task.out.name}.{plain.sha256.hexdigest()}.enc")
    _publish(partial, final)
    return _result(task, plain, "encrypted")._replace(name=final.name)


def _decrypted(task: FileTask, partial: Path, key: Key, progress: Progress) -> FileResult:
    """Decrypt the chunks of one file that `partial` does not have yet; remove it if the checksum is wrong."""
    plain = Digests()
    with task.source.open("rb") as source, partial.open("ab+") as out:
        chunks = min(out.tell(), task.size) // key.chunk_bytes
        out.truncate(chunks * key.chunk_bytes)
        out.seek(0)
        for _ in range(chunks):
            plain.update(read_chunk(out, key.chunk_bytes))
            progress(key.chunk_bytes)
        source.seek(HEADER + chunks * key.chunk_bytes)
        xor_file(source, out, key, plain, first=chunks, progress=progress)
        out.seek(0)
        head = out.read(8)
    if plain.sha256.digest() != task.sha256:
        partial.unlink()
        known = FIRST_BYTES.get(task.out.suffix)
        raise ChecksumMismatch(task, None if known is None else head.startswith(known))
    _publish(partial, task.out)
    return _result(task, plain, "decrypted")


def unfinished_path(final: Path) -> Path:
    """Path of a file while it is not finished."""
    return final.with_name(final.name + UNFINISHED_SUFFIX)


def _publish(partial: Path, final: Path) -> None:
    """Sync a finished file and give it its final name."""
    fsync(partial)
    partial.replace(final)
    fsync(final.parent)


def _result(task: FileTask, found: Digests, how: str) -> FileResult:
    return FileResult(task.out.name, task.size, found.md5.hexdigest(), found.sha256.hexdigest(), how)
