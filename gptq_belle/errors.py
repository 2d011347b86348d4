"""The exceptions a user can meet: one line that says what happened, one that says what to do, one exit code."""

import errno


class GptqBelleError(Exception):
    """Base of every error that is meant for the user's eyes.

    Args:
        cause: what happened, in one line, with the name of the file, tensor, layer or option.
        remedy: what to do about it, in one line.
    """

    exit_code = 1

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.cause}\n{self.remedy}" if self.remedy else self.cause


class UsageError(GptqBelleError):
    """An option or argument has a value that is not allowed."""

    exit_code = 2


class HardwareError(GptqBelleError):
    """This machine or its installation cannot do what was asked: no such device, no memory, no disk space."""

    exit_code = 3


class InputError(GptqBelleError):
    """A file is damaged, missing, inconsistent or of a kind that is not supported."""

    exit_code = 4


class GateError(GptqBelleError):
    """A quality gate named by the user was missed."""

    exit_code = 5


def from_system(error: OSError) -> GptqBelleError | None:
    """What the system refused, in words for a user; None where it says nothing of this machine or of a path."""
    where = f"{error.filename}: " if error.filename else ""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return HardwareError(f"{where}the disk is full", "Free some space, or choose an output on another disk.")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return HardwareError(f"{where}permission denied", "Choose a place that you may read and write.")
        case errno.ENOMEM:
            return HardwareError(f"{where}out of memory", "Close other programs, or choose fewer bits.")
        case errno.EMFILE | errno.ENFILE:
            return HardwareError(f"{where}too many open files", "Close other programs, or raise the limit (ulimit -n).")
        case errno.ENOENT | errno.ENOTDIR | errno.EISDIR:
            return InputError(f"{where}{str(error.strerror).lower()}", "Check the path.")
    return None
