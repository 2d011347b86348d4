"""Decrypt directories of BELLE-LLaMA, several files at a time, and diagnose errors.

Meta's licence forbids publishing the weights, so each file was XORed with a file of Meta's own model.
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
MAX_WORKERS = 4  # files at a time; each needs up to 40 MiB and hashes in separate threads
MAX_NAMES = 3  # file names in an error message
FOLDER = "Give the folder of the download, or one of its files."


def decrypt(source: str | Path, out: str | Path, key: str | Path, *,
            progress: Progress = lambda done, total: None) -> list[FileResult]:
    """Decrypt a directory or one file; files that are not encrypted are copied.

    Files that an earlier run finished are verified and kept; an unfinished file is resumed.

    Args:
        source: the directory, of which hidden files and subdirectories are ignored, or a file.
        out: output directory; other files in it are not changed.
        key: Meta's ``consolidated.00.pth`` of LLaMA-7B, version 1, which BELLE used for its 13B models as well
            (github.com/LianjiaTech/BELLE, issues 368 and 398).
        progress: progress callback, called with processed and total bytes.
    Returns:
        The files of the output, sorted by name.
    Raises:
        InputError: the key is empty, missing or wrong, a file is truncated or a git-lfs pointer, a name contradicts its
            header, or nothing is encrypted.
        UsageError: `out` is `source`, or another process writes to `out`.
    """
    source, out, key_file = Path(source), Path(out), Key(Path(key), CHUNK_BYTES)
    tasks = [file_task(path, out) for path in _files(source, out)]
    if all(task.sha256 is None for task in tasks):
        raise InputError(f"{source} contains no .enc files", FOLDER)
    _check_distinct(tasks)

    def work(task: FileTask, advance: Callable[[int], None]) -> FileResult | ChecksumMismatch:
        try:
            return copy_file(task, advance) if task.sha256 is None else decrypt_file(task, key_file, advance)
        except ChecksumMismatch as mismatch:
            return mismatch

    done: list[FileResult] = []
    failed: list[ChecksumMismatch] = []
    with _run_tasks(tasks, out, work, progress) as outcomes:
        for outcome in outcomes:
            if isinstance(outcome, FileResult):
                done.append(outcome)
            else:
                failed.append(outcome)
                if outcome.plausible_start is False and not _proves_key(done):
                    break
    if failed:
        if not _proves_key(done):
            for task in tasks:
                unfinished_path(task.out).unlink(missing_ok=True)
        raise _diagnosis(failed, _proves_key(done), key_file)
    return sorted(done)


def encrypt(source: str | Path, out: str | Path, key: str | Path, *,
            progress: Progress = lambda done, total: None) -> list[FileResult]:
    """Encrypt a directory or one file, for publishing a fine-tuned LLaMA; only Markdown files are copied.

    Arguments and exceptions are those of `decrypt`.
    """
    source, out, key_file = Path(source), Path(out), Key(Path(key), CHUNK_BYTES)
    tasks = [FileTask(path, out / path.name, None, path.stat().st_size) for path in _files(source, out)]
    if encrypted := [task.source.name for task in tasks if task.source.suffix == ".enc"]:
        raise InputError(f"{encrypted[0]} is already encrypted", "Remove the .enc files from the source.")

    def work(task: FileTask, advance: Callable[[int], None]) -> FileResult:
        return copy_file(task, advance) if task.source.suffix == ".md" else encrypt_file(task, key_file, advance)

    with _run_tasks(tasks, out, work, progress) as outcomes:
        return sorted(outcomes)


@contextmanager
def _run_tasks(tasks: list[FileTask], out: Path, work: Callable[[FileTask, Callable[[int], None]], Outcome],
               progress: Progress) -> Iterator[Iterator[Outcome]]:
    """Run tasks in threads and yield their results, small files first: the smallest one reveals a wrong key.

    Leaving the context stops the threads at their next chunk.
    """
    total, done = sum(task.size for task in tasks), 0
    lock, stop = threading.Lock(), threading.Event()

    def advance(count: int) -> None:
        nonlocal done
        if stop.is_set():
            raise InterruptedError
        with lock:
            done += count
            progress(done, total)

    out.mkdir(parents=True, exist_ok=True)
    with locked_folder(out), ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
        try:
            yield pool.map(lambda task: work(task, advance), sorted(tasks, key=lambda task: task.size))
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _diagnosis(failed: list[ChecksumMismatch], key_is_right: bool, key: Key) -> InputError:
    """Find the cause of wrong checksums: a wrong key, or truncated or damaged files."""
    names = sorted(mismatch.task.source.name for mismatch in failed)
    shown = ", ".join(names[:MAX_NAMES]) + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")
    if not key_is_right and not any(mismatch.plausible_start for mismatch in failed):
        return InputError(f"{key.path} is the wrong key: with it, {shown} does not match its checksum",
                          "Use Meta's consolidated.00.pth of LLaMA-7B, version 1, also for the 13B models.")
    known = "the key is correct for other files" if key_is_right else "the first bytes are correct"
    return InputError(f"truncated or damaged: {shown} ({known}, but the checksum is wrong)", FETCH)


def _proves_key(done: list[FileResult]) -> bool:
    return any(result.how != "copied" for result in done)


def _files(source: Path, out: Path) -> list[Path]:
    if source.is_dir() and out.resolve() == source.resolve():
        raise UsageError(f"{out} is the source itself", "Choose another folder for the output.")
    if not source.exists():
        raise InputError(f"{source} does not exist", FOLDER)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", "Choose a folder for the output.")
    found = [source] if source.is_file() else sorted(
        path for path in source.glob("*") if path.is_file() and not path.name.startswith("."))
    if not found:
        raise InputError(f"{source} contains no files", FOLDER)
    return found


def _check_distinct(tasks: list[FileTask]) -> None:
    by_name: dict[str, FileTask] = {}
    for task in tasks:
        other = by_name.setdefault(task.out.name, task)
        if other is not task:
            raise InputError(f"{other.source.name} and {task.source.name} both become {task.out.name}",
                             "Remove one of them.")
