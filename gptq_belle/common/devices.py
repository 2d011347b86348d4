"""Device, dtype and precision options, and the number of torch threads."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from gptq_belle.errors import HardwareError, UsageError

PRECISIONS = ("exact", "fast")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of torch threads, and restore the previous number on exit."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the current one, for events, streams and allocations without an explicit device; a CPU
    changes nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def resolve_device(name: str) -> torch.device:
    """Resolve a device option.

    Args:
        name: "auto" (the first CUDA device if there is one, else the CPU), "cpu", "cuda" or "cuda:N".
    Raises:
        UsageError: any other name.
        HardwareError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or not (index or "0").isdecimal()):
        raise UsageError(f"device {name!r} is not known", "Choose auto, cpu or cuda:0.")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise HardwareError(f"device {name} does not exist: PyTorch finds {torch.cuda.device_count()} CUDA devices",
                            "Choose --device cpu, or check the driver and that PyTorch is built for CUDA.")
    return torch.device("cpu") if kind == "cpu" else torch.device("cuda", int(index or 0))


def resolve_precision(name: str | None, device: torch.device) -> str:
    """Resolve a precision option; None means "exact" on a CPU and "fast" on CUDA.

    Raises:
        UsageError: unknown precision.
    """
    if name not in (None, *PRECISIONS):
        raise UsageError(f"precision {name!r} is not known", f"Choose {' or '.join(PRECISIONS)}.")
    return name or ("fast" if device.type == "cuda" else "exact")


def choose_dtype(dtype: torch.dtype | None, device: torch.device, precision: str) -> torch.dtype:
    """Choose the dtype of activations; None means float16 for precision "fast" on CUDA, else float32.

    Raises:
        UsageError: the dtype is not in DTYPES.
    """
    dtype = dtype or (torch.float16 if (device.type, precision) == ("cuda", "fast") else torch.float32)
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype} is not supported", f"Choose one of {', '.join(map(str, DTYPES))}.")
    return dtype
