"""Data of GPUs for the time model of a decode step: from the makers' data sheets and assumed, none of it measured."""

from typing import NamedTuple

import torch

from gptq_belle.errors import UsageError


class Gpu(NamedTuple):
    """What the time of a decode step depends on."""

    name: str
    capability: int  # compute capability as one number, 86 for 8.6
    processors: int  # multiprocessors
    clock: float  # Hz under load
    bandwidth: float  # bytes per second
    copy_share: float  # assumption: the share of the bandwidth that a plain copy reaches
    latency: float  # assumption: seconds from a load of a multiprocessor to its data, under load
    l2_bandwidth: float  # assumption: bytes per second
    launch: float = 2.1e-6  # assumption: seconds from the end of a kernel of a CUDA graph to the next one's first data
    dependent_launch: float | None = None  # assumption: the same with programmatic dependent launch; None: without it

    @property
    def copy_bandwidth(self) -> float:
        """Bytes per second that a kernel can read at most."""
        return self.bandwidth * self.copy_share


# Between two kernels of a graph: 1.2 microseconds from the end of one to the start of the other, and 0.9 until the
# first data arrive. Programmatic dependent launch (compute capability 9.0 and newer) hides most of the former.
DEPENDENT = 1.2e-6
GPUS = {gpu.name: gpu for gpu in (
    Gpu("H200", 90, 132, 1.755e9, 4.8e12, 0.88, 8e-7, 5.5e12, dependent_launch=DEPENDENT),
    Gpu("H100", 90, 132, 1.755e9, 3.35e12, 0.88, 8e-7, 5.5e12, dependent_launch=DEPENDENT),
    Gpu("A100", 80, 108, 1.41e9, 2.039e12, 0.87, 6.5e-7, 4e12),
    Gpu("RTX 4090", 89, 128, 2.52e9, 1.008e12, 0.91, 6e-7, 3.5e12),
    Gpu("RTX 3090", 86, 82, 1.695e9, 0.936e12, 0.92, 6e-7, 2e12),
    Gpu("RTX 3060", 86, 28, 1.777e9, 0.36e12, 0.92, 6e-7, 0.8e12),
)}


def gpu_named(name: str) -> Gpu:
    """One of GPUS; case, spaces and "RTX" may be left out.

    Raises:
        UsageError: no or another GPU.
    """
    def short(text: str) -> str:
        return text.lower().replace(" ", "").removeprefix("rtx")

    for gpu in GPUS.values():
        if short(gpu.name) == short(name):
            return gpu
    raise UsageError(f"GPU {name!r} is not in the table of the time model", f"Choose one of {', '.join(GPUS)}.")


def this_gpu(device: torch.device, copy_bandwidth: float) -> Gpu:
    """The GPU of this machine.

    Args:
        device: a CUDA device.
        copy_bandwidth: bytes per second of a copy, measured.
    """
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    known = next((gpu for gpu in GPUS.values() if gpu.name.replace("RTX ", "") in properties.name), None)
    nearest = known or min(GPUS.values(), key=lambda gpu: abs(gpu.capability - capability))
    return nearest._replace(name=properties.name, capability=capability, bandwidth=copy_bandwidth, copy_share=1.0,
                            processors=properties.multi_processor_count)
