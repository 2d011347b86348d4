"""Decrypt BELLE-LLaMA: Meta's licence forbids publishing the weights, so each file was XORed with Meta's own.

Directories of encrypted and plain files, several at a time, and what went wrong told apart.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from gptq_belle.common.files import locked_folder
from gptq_belle.errors import InputError, UsageError
from gptq_belle.formats.encrypted_file import (
    FETCH,
    ChecksumMismatch,
    FileResult,
    FileTask,
    copy_file,
    decrypt_file,
    encrypt_file,
    file_task,
    unfinished_path,
)
from gptq_belle.formats.xor_cipher import CHUNK_BYTES, Key

Outcome = TypeVar("Outcome")
Progress = Callable[[int, int], None]
MOST_WORKERS = 4  # files at a time; each holds up to 40 MiB, and hashes in threads of its own
MOST_NAMED = 3
FOLDER = "Name the folder of the download, or one of its files."


def decrypt(source: str | Path, out: str | Path, key: str | Path, *, chunk_bytes: int = CHUNK_BYTES,
            progress: Progress = lambda done, total: None) -> list[FileResult]:
    """Decrypt a directory (or one file); files in it that are not encrypted are copied.

    What an earlier run finished is checked and left; a file that it left half done is continued.

    Args:
        source: the directory; hidden files and folders in it are left out.
        out: the directory to write to; other files in it are left alone.
        key: Meta's ``consolidated.00.pth`` of the first LLaMA, 7B, which BELLE took for its 13B models as well
            (github.com/LianjiaTech/BELLE, issues 368 and 398).
        chunk_bytes: any but 10 MiB is for tests.
        progress: called with bytes done and in all.
    Returns:
        every file of the output, by name.
    Raises:
        InputError: an empty, missing or wrong key, a truncated file, a git-lfs pointer, a name against its header;
            nothing that is encrypted.
        UsageError: `out` is `source`, or another process writes there.
    """
    source, out, opened = Path(source), Path(out), Key(Path(key), chunk_bytes)
    jobs = [file_task(path, out) for path in _files(source, out)]
    if all(job.sha256 is None for job in jobs):
        raise InputError(f"{source} holds no .enc files: nothing is encrypted there", FOLDER)
    _check_distinct(jobs)

    def work(job: FileTask, moved: Callable[[int], None]) -> FileResult | ChecksumMismatch:
        try:
            return copy_file(job, moved) if job.sha256 is None else decrypt_file(job, opened, moved)
        except ChecksumMismatch as mismatch:
            return mismatch

    done: list[FileResult] = []
    failed: list[ChecksumMismatch] = []
    with _running(jobs, out, work, progress) as outcomes:
        for outcome in outcomes:
            if isinstance(outcome, FileResult):
                done.append(outcome)
            else:
                failed.append(outcome)
                if outcome.begins is False and not _proves_key(done):
                    break
    if failed:
        if not _proves_key(done):
            for job in jobs:
                unfinished_path(job.out).unlink(missing_ok=True)
        raise _diagnosis(failed, _proves_key(done), opened)
    return sorted(done)


def encrypt(source: str | Path, out: str | Path, key: str | Path, *, chunk_bytes: int = CHUNK_BYTES,
            progress: Progress = lambda done, total: None) -> list[FileResult]:
    """The inverse, for those who publish a fine-tuned LLaMA: every file but READMEs is encrypted.

    Args and raises: as `decrypt`.
    """
    source, out, opened = Path(source), Path(out), Key(Path(key), chunk_bytes)
    jobs = [FileTask(path, out / path.name, None, path.stat().st_size) for path in _files(source, out)]
    if encrypted := [job.source.name for job in jobs if job.source.suffix == ".enc"]:
        raise InputError(f"{encrypted[0]} is encrypted already", "Take the .enc files out of the source.")

    def work(job: FileTask, moved: Callable[[int], None]) -> FileResult:
        return copy_file(job, moved) if job.source.suffix == ".md" else encrypt_file(job, opened, moved)

    with _running(jobs, out, work, progress) as outcomes:
        return sorted(outcomes)


@contextmanager
def _running(jobs: list[FileTask], out: Path, work: Callable[[FileTask, Callable[[int], None]], Outcome],
             progress: Progress) -> Iterator[Iterator[Outcome]]:
    """Outcomes of the jobs as they come, small files first: a wrong key shows with the smallest one.

    Leaving the context stops the workers at their next chunk.
    """
    total, done = sum(job.size for job in jobs), 0
    lock, stop = threading.Lock(), threading.Event()

    def moved(count: int) -> None:
        nonlocal done
        if stop.is_set():
            raise InterruptedError
        with lock:
            done += count
            progress(done, total)

    out.mkdir(parents=True, exist_ok=True)
    with locked_folder(out), ThreadPoolExecutor(min(MOST_WORKERS, os.cpu_count() or 1)) as pool:
        try:
            yield pool.map(lambda job: work(job, moved), sorted(jobs, key=lambda job: job.size))
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _diagnosis(failed: list[ChecksumMismatch], key_is_right: bool, key: Key) -> InputError:
    """What a wrong checksum means, by how the others ended and how the file begins."""
    names = sorted(mismatch.job.source.name for mismatch in failed)
    shown = ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")
    if not key_is_right and not any(mismatch.begins for mismatch in failed):
        return InputError(f"{key.path} is the wrong key: with it, {shown} does not match the checksum in front of it",
                          "Use Meta's own consolidated.00.pth of the first LLaMA, 7B; BELLE took it for 13B, too.")
    known = "the key is right for other files" if key_is_right else "the beginning is right"
    return InputError(f"truncated or damaged: {shown} ({known}, but the checksum is wrong)", FETCH)


def _proves_key(done: list[FileResult]) -> bool:
    return any(result.how != "copied" for result in done)


def _files(source: Path, out: Path) -> list[Path]:
    if source.is_dir() and out.resolve() == source.resolve():
        raise UsageError(f"{out} is the source itself", "Choose another folder for the output.")
    if not source.exists():
        raise InputError(f"{source} is not there", FOLDER)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", "Name a folder for the output.")
    found = [source] if source.is_file() else sorted(
        path for path in source.glob("*") if path.is_file() and not path.name.startswith("."))
    if not found:
        raise InputError(f"{source} holds no files", FOLDER)
    return found


def _check_distinct(jobs: list[FileTask]) -> None:
    by_name: dict[str, FileTask] = {}
    for job in jobs:
        other = by_name.setdefault(job.out.name, job)
        if other is not job:
            raise InputError(f"{other.source.name} and {job.source.name} both become {job.out.name}",
                             "Take one of them away.")
