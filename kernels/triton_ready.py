"""Whether Triton can serve on a device, found out without importing it."""

import os
import shutil
from functools import cache
from importlib.util import find_spec

import torch

TENSOR_CORES = (8, 0)  # compute capability from which tl.dot of 16-bit floats meets instructions that keep up
OLDEST = (7, 5)  # what Triton still compiles for


def refusal(device: torch.device, capability: tuple[int, int] = TENSOR_CORES) -> str | None:
    """Why Triton kernels cannot run on a device; None where they can.

    Args:
        device: any.
        capability: the least compute capability that will do.
    """
    if device.type != "cuda":
        return f"Triton kernels run on CUDA devices, not on {device.type}"
    if not torch.cuda.is_available():
        return "there is no CUDA device, or torch is built without CUDA"
    if torch.version.hip is not None:
        return "the Triton kernels are written for NVIDIA's devices"
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        return f"compute capability {found[0]}.{found[1]} is below {capability[0]}.{capability[1]}"
    return missing()


@cache
def missing() -> str | None:
    """What Triton lacks on this machine, whatever the device; None where nothing is missing."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if compiler() is None:
        return "Triton builds its launcher with a C compiler, and there is none (cc, gcc or clang; CC names another)"
    return None


def compiler() -> str | None:
    """The C compiler that Triton would build its launcher with; None where there is none."""
    found = (shutil.which(name) for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name)
    return next((path for path in found if path), None)
