"""The exceptions a user can meet: one line that says what happened, one that says what to do, one exit code."""

import errno

_NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory", "DefaultCPUAllocator")


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


def as_user_error(error: BaseException) -> GptqBelleError:
    """The error that a user should see for any exception: ours as they are, the system's translated."""
    if isinstance(error, GptqBelleError):
        return error
    if isinstance(error, OSError) and (known := from_system(error)):
        return known
    if _is_out_of_memory(error):
        return HardwareError(f"out of memory: {_first_line(error) or 'an allocation failed'}",
                             "Close other programs, or choose fewer bits, fewer calibration rows or a shorter context.")
    text = f"unexpected {type(error).__name__}: {_first_line(error)}"
    remedy = "Run it again with -v for the traceback, and report it with the output of `gptq-belle doctor`."
    return GptqBelleError(text, remedy)


def _is_out_of_memory(error: BaseException) -> bool:
    # By name and text: torch is not imported here, and its CPU allocator raises a bare RuntimeError.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _one_line(text: str) -> str:
    return " ".join(text.split())
