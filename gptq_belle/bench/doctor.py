"""Description of this machine: versions, processor, memory, devices, and the kernel of each kind of checkpoint."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gptq_belle import __version__
from gptq_belle.bench.self_test import self_test
from gptq_belle.common.devices import PRECISIONS, resolve_device
from gptq_belle.common.memory import available_bytes, system_memory
from gptq_belle.common.openmp import spinning_note
from gptq_belle.kernels import triton_matmul
from gptq_belle.kernels.dispatch import choose_kernel
from gptq_belle.kernels.native_library import NativeLibrary, load_library
from gptq_belle.kernels.triton_config import tuning_files
from gptq_belle.kernels.triton_matmul import c_compiler
from gptq_belle.models.architectures import FAMILIES

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "huggingface_hub", "numpy", "triton", "matplotlib")
FEATURES = ("avx2", "fma", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "i8mm")
WIDTH = 4096  # in_features of the linears whose kernels are listed, as in LLaMA-7B and BLOOM-7B1
GROUP = 128


def examine(device: str = "auto") -> dict[str, Any]:
    """The output of `doctor` as JSON-ready values; sizes in bytes, None if the system does not report them.

    Args:
        device: device whose kernels are listed and tested; "auto" for all devices.
    Raises:
        UsageError, HardwareError: there is no such device.
    """
    tested = [resolve_device(device)] if device != "auto" else [torch.device("cpu")]
    if device == "auto" and torch.cuda.is_available():
        tested.append(torch.device("cuda", 0))
    gpu_device = next((each for each in tested if each.type == "cuda"), torch.device("cuda", 0))
    return {
        "versions": {"gptq_belle": __version__, "python": platform.python_version()} | package_versions(),
        "system": platform.platform(),
        "cpu": cpu(),
        "memory": {"total": system_memory("MemTotal"), "available": available_bytes()},
        "devices": devices(),
        "compiler": c_compiler(),
        "native": native(),
        "native_decoders": [kind for kind, known in FAMILIES.items() if known.native],
        "gpu": gpu(gpu_device),
        "kernels": [row for each in tested for row in kernel_choices(each)],
        "self_test": [check._asdict() | {"passed": check.passed} for check in self_test(tested)],
    }


def package_versions() -> dict[str, str | None]:
    """Versions of PACKAGES; None if one is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name) if find_spec(name) else None
        except PackageNotFoundError:
            found[name] = None
    return found


def cpu() -> dict[str, Any]:
    """Model, cores that this process may use, torch's threads, why they spin, and instruction sets that kernels use."""
    info = _cpuinfo()
    flags = (info.get("flags") or info.get("Features") or "").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "spinning": spinning_note(),
        "features": [name for name in FEATURES if name in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def devices() -> list[dict[str, Any]]:
    """The CUDA devices: name, compute capability, memory in bytes."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append({"device": f"cuda:{index}", "name": properties.name, "memory": properties.total_memory,
                      "capability": f"{properties.major}.{properties.minor}"})
    return found


def native() -> dict[str, Any]:
    """The native CPU kernels: selected and usable instruction sets, or why there is no native library."""
    found = load_library()
    if isinstance(found, NativeLibrary):
        return {"isa": found.isa, "usable": list(found.usable_isas), "why_not": None}
    return {"isa": None, "usable": [], "why_not": found}


def gpu(device: torch.device) -> dict[str, Any]:
    """The kernel of packed weights on a GPU, why it is not Triton's, and the tuning tables."""
    reason = triton_matmul.unavailable_reason(device)
    present = torch.cuda.is_available()
    return {
        "kernel": "triton" if reason is None else "dequantize+matmul" if present else None,
        "why_not": reason,
        "supported_triton": triton_matmul.supported_triton(),
        "tables": [str(path) for path in tuning_files(triton_matmul.device_properties(device)[0])] if present else [],
    }


def kernel_choices(device: torch.device) -> list[dict[str, str]]:
    """For every kind of checkpoint and precision: the kernel, and why no faster one is used."""
    in_order = torch.arange(WIDTH, dtype=torch.int32) // GROUP
    act_order = torch.arange(WIDTH, dtype=torch.int32) % (WIDTH // GROUP)
    cases = [(f"{bits} bit", in_order) for bits in (4, 8, 3, 2)] + [("4 bit, act-order", act_order)]
    rows = []
    for name, g_idx in cases:
        for precision in PRECISIONS:
            dtype = torch.float16 if (device.type, precision) == ("cuda", "fast") else torch.float32
            choice = choose_kernel(g_idx, device=device, dtype=dtype)
            rows.append({"device": device.type, "case": name, "precision": precision, "kernel": choice.kernel,
                         "why": choice.reason})
    return rows


def failures(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The failed checks of the self-test in a result of `examine`."""
    return [check for check in found["self_test"] if not check["passed"]]


def gib(size: int | None) -> str:
    """A size as text; "unknown" for None."""
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def machine_summary() -> str:
    """The machine in one line, for the header of measurements."""
    found = cpu()
    names = ", ".join([f"{found['model']}, threads: {found['threads']}", *(entry["name"] for entry in devices())])
    return f"{names}; torch {torch.__version__}"


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
