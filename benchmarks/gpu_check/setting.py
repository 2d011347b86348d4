"""Where the parts run, and at which sizes: on a GPU, or at toy sizes in Triton's interpreter on a CPU."""

import datetime
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptq_belle import __version__
from gptq_belle.common.timers import Spread, spread
from gptq_belle.kernels.triton_config import TENSOR_CORES

Shape = tuple[int, int]  # in_features, out_features
PACKAGES = ("triton", "gemlite", "gptqmodel", "transformers")
ROOT = Path(__file__).resolve().parents[2]
COMMAND = 20.0  # seconds that nvidia-smi may take


class Sizes(NamedTuple):
    """What is measured, and how large."""

    shapes: tuple[Shape, ...]  # of the matmul table and of tuning
    rows: tuple[int, ...]  # of the matmul table
    tuned_rows: tuple[int, ...]
    checked: tuple[int, int]  # inputs and outputs of the checked products; the outputs end inside a tile
    checked_dtypes: tuple[torch.dtype, ...]
    vocabulary: int  # tokens of the checked lm_head
    every: int  # of how many checked products one is run
    solver: tuple[Shape, ...]
    copy_bytes: int
    matrix_side: int
    model: str  # for make_model
    prompts: tuple[int, ...]  # tokens
    new_tokens: int
    quantized_rows: tuple[int, int]  # number and length of the calibration rows


BLOCK_SHAPES = {  # of every linear in a block
    "belle-7b": ((4096, 12288), (4096, 4096), (4096, 16384), (16384, 4096)),
    "llama-7b": ((4096, 4096), (4096, 11008), (11008, 4096)),
    "llama-13b": ((5120, 5120), (5120, 13824), (13824, 5120)),
}
FULL = Sizes(
    shapes=tuple(dict.fromkeys(shape for shapes in BLOCK_SHAPES.values() for shape in shapes)),
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048), tuned_rows=(8, 16, 32, 64), checked=(1024, 352),
    checked_dtypes=(torch.float16, torch.bfloat16), vocabulary=250880, every=1,
    solver=((4096, 4096), (11008, 4096), (4096, 11008)), copy_bytes=512 << 20, matrix_side=8192, model="belle-7b",
    prompts=(512, 2048), new_tokens=64, quantized_rows=(128, 512))
TOY = Sizes(
    shapes=((256, 128), (128, 128)), rows=(1, 70), tuned_rows=(8,), checked=(256, 96), checked_dtypes=(torch.float16,),
    vocabulary=200, every=16, solver=((128, 40),), copy_bytes=1 << 20, matrix_side=64,
    model="examples/belle_tiny/bloom", prompts=(16,), new_tokens=4, quantized_rows=(8, 64))


class Setting(NamedTuple):
    """The device that steps use, and the sizes."""

    device: torch.device
    sizes: Sizes
    toy: bool


def setting_of(toy: bool) -> Setting:
    """The first GPU at full sizes, or a CPU at toy sizes."""
    return Setting(torch.device("cpu"), TOY, True) if toy else Setting(torch.device("cuda", 0), FULL, False)


def restricted(setting: Setting, arch: int) -> Setting:
    """The setting without the dtypes that the kernels do not take on this compute capability."""
    if arch >= TENSOR_CORES:
        return setting
    return setting._replace(sizes=setting.sizes._replace(checked_dtypes=(torch.float16,)))


def prepare(setting: Setting) -> None:
    """Prepare a process that runs steps. For a toy, the device's clocks are replaced."""
    torch.backends.cuda.matmul.allow_tf32 = False
    if setting.toy:
        from gptq_belle.bench import cuda_timing

        torch.set_num_threads(1)
        cuda_timing.device_seconds = wall_seconds
        cuda_timing.operand_copies = lambda size, device, most=64: 2


def wall_seconds(actions: Sequence[Any], repeats: int = 1) -> Spread:
    """Stands in for `cuda_timing.device_seconds` on a CPU."""
    start = time.perf_counter()
    for action in actions:
        action()
    return spread([(time.perf_counter() - start) / len(actions)])


def unsupported(setting: Setting) -> str | None:
    """Why the Triton kernels cannot run here, or None."""
    from gptq_belle.kernels import triton_matmul

    return None if setting.toy else triton_matmul.unavailable_reason(setting.device)


def describe(setting: Setting) -> dict[str, Any]:
    """The head of every record: date, device and versions, and what Triton needs to compile."""
    from gptq_belle.kernels import triton_matmul

    arch, processors = triton_matmul.device_properties(setting.device)
    return {
        "date": datetime.date.today().isoformat(), "device": device_name(setting), "arch": arch,
        "processors": processors, "cores": len(os.sched_getaffinity(0)),
        "build_tools_missing": triton_matmul.missing_build_tool(),
        "versions": {"gptq_belle": __version__, "python": platform.python_version(), "torch": torch.__version__,
                     "cuda": torch.version.cuda, **{name: installed(name) for name in PACKAGES}}}


def device_name(setting: Setting) -> str:
    """Name of the device."""
    return "Triton's interpreter" if setting.toy else torch.cuda.get_device_name(setting.device)


def device_details(setting: Setting) -> dict[str, Any]:
    """Memory, cache and driver of the device."""
    if setting.toy:
        return {"memory": None, "l2_cache": None, "nvidia_smi": None}
    properties = torch.cuda.get_device_properties(setting.device)
    try:
        smi = subprocess.run(["nvidia-smi", "-q", "-d", "CLOCK,POWER,MEMORY,PERFORMANCE"], capture_output=True,
                             text=True, timeout=COMMAND).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        smi = str(error)
    return {"memory": properties.total_memory, "l2_cache": getattr(properties, "L2_cache_size", None),
            "nvidia_smi": smi}


def installed(name: str) -> str | None:
    """Version of a package, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
