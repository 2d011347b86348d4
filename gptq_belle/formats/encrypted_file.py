"""One file of BELLE-LLaMA, encrypted or plain: ``<name>.<sha256>.enc`` holds the SHA-256 of the plain file in 32 bytes,
then the plain bytes XOR the key's stream (keystream.py).

A result gets its name only when its checksum is right, so no bad file is ever left behind; until then it is
``<name>.unfinished``, which a later run continues.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gptq_belle.common.files import UNFINISHED_SUFFIX, fsync, reject_lfs_pointer
from gptq_belle.errors import InputError
from gptq_belle.formats.xor_cipher import CHUNK_BYTES, Digests, Key, read_chunk, write_all, xor_file

HEADER = 32  # bytes of SHA-256 in front
NAMED = re.compile(r"(?P<plain>.+)\.(?P<sha256>[0-9a-fA-F]{64})\.enc")
FETCH = "The download is not complete: fetch the file again."
# How plain files of a model begin: with a wrong key they begin otherwise, with a broken download they do not.
BEGINNINGS = {".json": (b"{", b"["), ".bin": (b"PK\3\4", b"\x80"), ".pt": (b"PK\3\4", b"\x80"), ".model": (b"\n",)}
Moved = Callable[[int], None]


class FileResult(NamedTuple):
    """One file of the output; the digests are those of the plain side."""

    name: str
    bytes: int
    md5: str
    sha256: str
    how: str  # "decrypted", "encrypted", "copied", or "was there" where an earlier run had finished it


class FileTask(NamedTuple):
    """One file of the source; `sha256` is of the plain file where it is encrypted, `size` without that header."""

    source: Path
    out: Path
    sha256: bytes | None
    size: int


class ChecksumMismatch(Exception):
    """A wrong checksum; `begins` says whether the result begins as files of its kind do (None: unknown kind)."""

    def __init__(self, job: FileTask, begins: bool | None) -> None:
        super().__init__(job.source)
        self.job, self.begins = job, begins


def file_task(path: Path, out: Path) -> FileTask:
    """What is to be done with a file of the source.

    Raises:
        InputError: a git-lfs pointer, shorter than its header, or a name that disagrees with the header.
    """
    size = path.stat().st_size
    reject_lfs_pointer(path)
    if path.suffix != ".enc":
        return FileTask(path, out / path.name, None, size)
    with path.open("rb") as file:
        header = file.read(HEADER)
    if len(header) < HEADER:
        raise InputError(f"{path} is truncated: it has {size} bytes, fewer than its checksum alone", FETCH)
    match = NAMED.fullmatch(path.name)
    if match and bytes.fromhex(match["sha256"]) != header:
        raise InputError(f"{path.name} begins with the checksum {header.hex()}, not with that of its name",
                         "It was renamed or is damaged: fetch it again.")
    plain = match["plain"] if match else path.name.removesuffix(".enc")
    if plain in ("", ".", ".."):
        raise InputError(f"{path.name} names no file", "Do not use this directory.")
    return FileTask(path, out / plain, header, size - HEADER)


def decrypt_file(job: FileTask, key: Key, moved: Moved) -> FileResult:
    """Decrypt one file, unless an earlier run has; what a run left half done is continued.

    Raises:
        ChecksumMismatch: the checksum is wrong; nothing is left behind.
    """
    if job.out.is_file() and job.out.stat().st_size == job.size:
        found = Digests.of(job.out)
        if found.sha256.digest() == job.sha256:
            moved(job.size)
            return _result(job, found, "was there")
    partial = unfinished_path(job.out)
    if partial.exists():
        try:
            return _decrypted(job, partial, key, moved)
        except ChecksumMismatch:  # what was left there may have been another file's
            return _decrypted(job, partial, key, lambda count: moved(0))
    return _decrypted(job, partial, key, moved)


def copy_file(job: FileTask, moved: Moved) -> FileResult:
    """Copy one file that is not encrypted."""
    partial, found = unfinished_path(job.out), Digests()
    with job.source.open("rb", buffering=0) as source, partial.open("wb", buffering=0) as out:
        while len(data := read_chunk(source, CHUNK_BYTES)):
            found.update(data)
            write_all(out, data)
            moved(len(data))
    _publish(partial, job.out)
    return _result(job, found, "copied")


def encrypt_file(job: FileTask, key: Key, moved: Moved) -> FileResult:
    """Encrypt one file; its checksum, which the name carries, is known only at the end."""
    partial, plain = unfinished_path(job.out), Digests()
    with job.source.open("rb", buffering=0) as source, partial.open("wb", buffering=0) as out:
        out.seek(HEADER)
        xor_file(source, out, key, plain, encrypting=True, moved=moved)
        out.seek(0)
        out.write(plain.sha256.digest())
    final = job.out.with_name(f"{job.out.name}.{plain.sha256.hexdigest()}.enc")
    _publish(partial, final)
    return _result(job, plain, "encrypted")._replace(name=final.name)


def _decrypted(job: FileTask, partial: Path, key: Key, moved: Moved) -> FileResult:
    """One file, behind the whole chunks that `partial` already holds; gone where the checksum is wrong at the end."""
    plain = Digests()
    with job.source.open("rb", buffering=0) as source, partial.open("ab+", buffering=0) as out:
        chunks = min(out.tell(), job.size) // key.chunk_bytes
        out.truncate(chunks * key.chunk_bytes)
        out.seek(0)
        for _ in range(chunks):
            plain.update(read_chunk(out, key.chunk_bytes))
            moved(key.chunk_bytes)
        source.seek(HEADER + chunks * key.chunk_bytes)
        xor_file(source, out, key, plain, first=chunks, moved=moved)
        out.seek(0)
        head = out.read(8) or b""
    if plain.sha256.digest() != job.sha256:
        partial.unlink()
        known = BEGINNINGS.get(job.out.suffix)
        raise ChecksumMismatch(job, None if known is None else head.startswith(known))
    _publish(partial, job.out)
    return _result(job, plain, "decrypted")


def unfinished_path(final: Path) -> Path:
    """Where a file is while it is not finished."""
    return final.with_name(final.name + UNFINISHED_SUFFIX)


def _publish(partial: Path, final: Path) -> None:
    """Give a finished file its name, for good."""
    fsync(partial)
    partial.replace(final)
    fsync(final.parent)


def _result(job: FileTask, found: Digests, how: str) -> FileResult:
    return FileResult(job.out.name, job.size, found.md5.hexdigest(), found.sha256.hexdigest(), how)
