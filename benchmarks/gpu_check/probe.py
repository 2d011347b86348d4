"""What the machine is and reaches: device, tools, bandwidth of a copy, speed of cuBLAS, cost of a launch."""

import shutil
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch

from gptq_belle.bench import cuda_timing
from gptq_belle.common.timers import synchronize
from gptq_belle.kernels import triton_matmul
from gptq_belle.kernels.triton_config import MatmulProblem
from gpu_check.kernel_recording import Case
from gpu_check.plan import Step
from gpu_check.setting import ROOT, Setting, device_details, installed
from gpu_check.weights import product_case, random_weight

COPY, PEAK = "bandwidth of a copy", "speed of cuBLAS"
CALLS = 200  # launches that are timed together
LAUNCHED = MatmulProblem(1, 128, 512, 4, 128, "float16")  # so small that a launch takes longer than the kernel
SANITIZED, TESTS = 100.0, 150.0  # seconds


def steps(setting: Setting) -> list[Step]:
    """The measurements of the machine."""
    return [Step("device", partial(device_details, setting)), *limits(setting),
            Step("cost of a launch", partial(launch_cost, setting))]


def limits(setting: Setting) -> list[Step]:
    """What products can reach."""
    return [Step(COPY, partial(copy_bandwidth, setting)), Step(PEAK, partial(matrix_peak, setting))]


def copy_bandwidth(setting: Setting) -> dict[str, float]:
    """Bytes per second, read and written."""
    size = setting.sizes.copy_bytes
    pairs = [[torch.empty(size, dtype=torch.uint8, device=setting.device) for _ in range(2)] for _ in range(2)]
    return {"Bps": 2 * size / cuda_timing.device_seconds([partial(b.copy_, a) for a, b in pairs]).median}


def matrix_peak(setting: Setting) -> dict[str, float]:
    """Operations per second on large square matrices in float16."""
    side = setting.sizes.matrix_side
    a, b = (torch.randn(side, side, device=setting.device).half() for _ in range(2))
    multiply = partial(torch.mm, a, b, out=torch.empty_like(a))
    return {"operations_per_s": 2 * side**3 / cuda_timing.device_seconds([multiply]).median}


def launch_cost(setting: Setting) -> dict[str, float]:
    """Seconds per launch of our smallest product: called from Python, and in a CUDA graph."""
    weight = random_weight(LAUNCHED.inputs, LAUNCHED.outputs, LAUNCHED.bits, setting.device)
    x = torch.randn(LAUNCHED.rows, LAUNCHED.inputs, device=setting.device).half()
    multiply = partial(triton_matmul.quant_matmul, x, weight)
    calls = 2 if setting.toy else CALLS
    multiply()
    synchronize(setting.device)
    start = time.perf_counter()
    for _ in range(calls):
        multiply()
    synchronize(setting.device)
    return {"python": (time.perf_counter() - start) / calls,
            "graph": cuda_timing.device_seconds([multiply] * calls).median}


def launch_cases() -> list[Case]:
    """The kernels that `launch_cost` needs."""
    return [product_case(LAUNCHED)]


def sanitizer_steps(setting: Setting, left_out: dict[str, str]) -> list[Step]:
    """Six products under compute-sanitizer, where it is installed."""
    if setting.toy or shutil.which("compute-sanitizer") is None:
        left_out["compute-sanitizer"] = "needs a GPU, and is part of CUDA's toolkit"
        return []
    return [Step("compute-sanitizer", run_sanitizer, SANITIZED)]


def test_steps(setting: Setting, left_out: dict[str, str]) -> list[Step]:
    """The project's tests that need a GPU, where pytest is installed."""
    if setting.toy or not (installed("pytest") and installed("hypothesis")):
        left_out["pytest -m gpu"] = "needs a GPU, pytest and hypothesis"
        return []
    return [Step("pytest -m gpu", run_tests, TESTS)]


def run_sanitizer() -> dict[str, Any]:
    """Run `sanitized` under compute-sanitizer. A device that it does not support is a result.

    Raises:
        RuntimeError: an access that is not allowed.
    """
    run = subprocess.run(["compute-sanitizer", "--error-exitcode", "9", sys.executable, "-m", "gpu_check.sanitized"],
                         capture_output=True, text=True)
    output = run.stdout + run.stderr
    if "not supported" in output:
        return {"unsupported": output[-1000:]}
    if run.returncode:
        raise RuntimeError(f"exit code {run.returncode}: {output[-2000:]}".replace("\n", " | "))
    return {"output": output[-300:]}


def run_tests() -> dict[str, Any]:
    """Run the project's tests that need a GPU.

    Raises:
        RuntimeError: a test failed.
    """
    run = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests"], cwd=ROOT,
                         capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"exit code {run.returncode}: {run.stdout[-2000:]}".replace("\n", " | "))
    return {"output": run.stdout.strip().splitlines()[-1:]}
