"""Exceptions for users: a cause, a remedy and an exit code."""

import errno

# Parts of messages for lack of memory: of torch and of CUDA libraries that could not allocate a workspace,
# which they also do when a handle is created.
_NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory", "DefaultCPUAllocator",
              "CUBLAS_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED", "`cublasCreate(handle)`",
              "`cusolverDnCreate(handle)`")


class GptqBelleError(Exception):
    """Base class of all errors that are shown to the user.

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
    """This machine or its installation cannot run the request: missing device, memory or disk space."""

    exit_code = 3


class InputError(GptqBelleError):
    """A file is damaged, missing, inconsistent or not supported."""

    exit_code = 4


class GateError(GptqBelleError):
    """A quality gate set by the user was missed."""

    exit_code = 5


def from_os_error(error: OSError) -> GptqBelleError | None:
    """Convert an error of the operating system to one for the user; None if its errno is not a known one."""
    where = f"{error.filename}: " if error.filename else ""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return HardwareError(f"{where}the disk is full", "Free some space, or choose an output on another disk.")
        case errno.EFBIG:
            return HardwareError(f"{where}the file is larger than its limit",
                                 "Raise the limit (ulimit -f), or choose a file system that holds larger files.")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return HardwareError(f"{where}permission denied", "Choose a path that you may read and write.")
        case errno.ENOMEM:
            return HardwareError(f"{where}out of memory", "Close other programs, or choose fewer bits.")
        case errno.EMFILE | errno.ENFILE:
            return HardwareError(f"{where}too many open files", "Close other programs, or raise the limit (ulimit -n).")
        case errno.ENOENT | errno.ENOTDIR | errno.EISDIR:
            return InputError(f"{where}{str(error.strerror).lower()}", "Check the path.")
        case errno.ELOOP | errno.ENAMETOOLONG | errno.EEXIST | errno.ENOTEMPTY:
            return InputError(f"{where}{str(error.strerror).lower()}", "Check the path and the links in it.")
        case errno.EIO | errno.ESTALE | errno.ETIMEDOUT | errno.ENODEV | errno.ENXIO:
            return HardwareError(f"{where}{str(error.strerror).lower()}",
                                 "Check the disk or network share, or choose another one.")
    return None


def as_user_error(error: BaseException) -> GptqBelleError:
    """Convert any exception to an error for the user; a GptqBelleError is returned unchanged."""
    if isinstance(error, GptqBelleError):
        return error
    if isinstance(error, OSError) and (known := from_os_error(error)):
        return known
    if is_out_of_memory(error):
        return HardwareError(f"out of memory: {_first_line(error) or 'an allocation failed'}",
                             "Close other programs, or choose fewer bits, fewer calibration rows or a shorter context.")
    text = f"unexpected {type(error).__name__}: {_first_line(error)}"
    remedy = "Run it again with -v for the traceback, and report it with the output of `gptq-belle doctor`."
    return GptqBelleError(text, remedy)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a CPU or a GPU.

    By name and text: torch is not imported here, and its CPU allocator and the CUDA libraries raise a RuntimeError.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def one_line(error: BaseException) -> str:
    """The message of another library's exception in one line of at most 200 characters.

    "Unexpected" is what this program calls its own faults (see `as_user_error`).
    """
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return text.replace("unexpected", "unknown").replace("Unexpected", "Unknown")
