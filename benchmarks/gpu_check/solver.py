"""The GPTQ solver's kernel compared with the same steps in torch, on layers of LLaMA-7B.

Both are timed as called from Python, including the products after each block: the time of a layer without the
factorization of its Hessian.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptq_belle.common.timers import seconds
from gpu_check.plan import Step
from gpu_check.setting import Setting, Shape

GOAL = 10.0  # minimum speed relative to torch


def steps(setting: Setting) -> list[Step]:
    """One step per layer."""
    return [Step(f"solver, {inputs} x {outputs}", partial(measure, setting, (inputs, outputs)), 90)
            for inputs, outputs in setting.sizes.solver]


def measure(setting: Setting, shape: Shape) -> dict[str, Any]:
    """Median seconds of both, and the share of equal codes."""
    ours, mine = _timed(partial(solve, setting, *shape, True), setting, repeats=3)
    torchs, theirs = _timed(partial(solve, setting, *shape, False), setting, repeats=2)
    return {"inputs": shape[0], "outputs": shape[1], "seconds": ours, "torch_seconds": torchs,
            "times_torch": torchs / ours, "same_codes": float((mine[0] == theirs[0]).float().mean())}


def solve(setting: Setting, inputs: int, outputs: int, by_kernel: bool, group: int = 128,
          sym: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of random weights with a random factor, in 4 bits."""
    from gptq_belle.kernels import triton_gptq
    from gptq_belle.quantization import grid, solver
    from gptq_belle.quantization.config import QuantConfig

    generator = torch.Generator(device=setting.device).manual_seed(inputs)
    weight = torch.randn(inputs, outputs, device=setting.device, generator=generator)
    factor = torch.randn(inputs, inputs, device=setting.device, generator=generator).mul_(0.01).triu_()
    factor.diagonal().add_(1.0)
    config = QuantConfig(bits=4, group_size=group, sym=sym, preset="fast")
    taken = grid.fused_kernels
    grid.fused_kernels = lambda tensor: triton_gptq if by_kernel else None
    try:
        return solver._solve(weight, factor, inputs if group == -1 else group, config)
    finally:
        grid.fused_kernels = taken


def goal(results: dict[str, Any]) -> dict[str, Any]:
    """The lowest speed relative to torch, next to the goal."""
    worst = min((result["times_torch"] for result in results.values() if "times_torch" in result), default=None)
    return {"goal": "speed of the solver in torch", "least": GOAL, "worst": worst,
            "reached": None if worst is None else worst >= GOAL}


def _timed(action: Callable[[], Any], setting: Setting, repeats: int) -> tuple[float, Any]:
    """Median seconds after a first run, and the last result."""
    found: list[Any] = []
    took = [seconds(lambda: found.append(action()), setting.device) for _ in range(repeats)]
    return statistics.median(took[1:]), found[-1]
