"""What lies where weights should be, and what has to be done with it first: fetch, decrypt or convert it."""

from pathlib import Path

from gptq_belle.errors import InputError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


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


def unready(path: Path) -> InputError | None:
    """The error for an encrypted or old checkpoint where a model directory is wanted; None for anything else.

    Args:
        path: a file, or a folder of them.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.enc")) + sorted(path.glob("*.pt"))
    last = {file.suffix: file for file in files if file.is_file()}
    if ".enc" in last:
        return InputError(f"{path} is encrypted",
                          f"First: gptq-belle decrypt {path} OUT --key path/to/consolidated.00.pth")
    if ".pt" in last:
        return InputError(f"{path} is an old checkpoint, which is read once and written anew",
                          f"First: gptq-belle convert {path} OUT")
    return None
