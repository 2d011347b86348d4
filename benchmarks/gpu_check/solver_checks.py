"""The solver's kernels compared with the same steps in torch."""

from functools import partial
from typing import Any

import torch

from gpu_check.agreement import WrongProduct
from gpu_check.kernel_recording import Case
from gpu_check.plan import Step
from gpu_check.setting import Setting
from gpu_check.solver import solve

FORMATS = [(group, sym) for group in (128, 64, 32, -1) for sym in (True, False)]  # -1: one group per output
SAME = 0.9995  # share of equal codes; torch fuses some operations, which moves codes at the border of two values


def steps(setting: Setting) -> list[Step]:
    """All checks."""
    found = [Step(f"solver, {'symmetric' if sym else 'asymmetric'}, groups of {group}",
                  partial(check_solver, setting, group, sym)) for group, sym in FORMATS]
    return [*found[:: 7 if setting.toy else 1], Step("solver, coordinate descent", partial(check_descent, setting))]


def cases() -> list[Case]:
    """Their kernels, for compilation."""
    return [*(partial(_solve_block, max(group, 0), sym) for group, sym in FORMATS), _descend]


def check_solver(setting: Setting, group: int, sym: bool) -> dict[str, Any]:
    """Compare the solver's kernel with the solver in torch on the same device.

    Raises:
        WrongProduct: fewer codes than SAME are equal.
    """
    inputs, outputs = setting.sizes.checked
    ours, torchs = (solve(setting, inputs, outputs, by_kernel, group, sym) for by_kernel in (True, False))
    same = float((ours[0] == torchs[0]).float().mean())
    if same < SAME:
        raise WrongProduct(f"{100 * (1 - same):.3f} % of the codes differ")
    return {"equal_codes": same}


def check_descent(setting: Setting) -> dict[str, Any]:
    """Compare a sweep of coordinate descent with the same steps in torch on the CPU.

    Raises:
        WrongProduct: fewer codes than SAME are equal.
    """
    from gptq_belle.kernels import triton_gptq
    from gptq_belle.quantization import refine

    generator = torch.Generator().manual_seed(0)
    inputs, outputs, bits = 128, setting.sizes.checked[1], 4
    code = torch.randint(-8, 8, (inputs, outputs), generator=generator).float()
    scale = torch.rand(outputs, generator=generator) + 0.5
    zero = torch.full((outputs,), 8.0)
    root = torch.randn(inputs, inputs, generator=generator)
    block = root @ root.t() / inputs + torch.eye(inputs)
    residual = block @ torch.randn(inputs, outputs, generator=generator)
    diagonal = block.diagonal().contiguous()
    expected = code.clone()
    refine._descend(expected, scale, zero, residual.clone(), block, diagonal, bits)
    code, scale, zero, residual, block, diagonal = (
        one.to(setting.device) for one in (code, scale, zero, residual, block, diagonal))
    triton_gptq.descend(code, scale, zero, residual, block, diagonal, bits)
    same = float((code.cpu() == expected).float().mean())
    if same < SAME:
        raise WrongProduct(f"{100 * (1 - same):.3f} % of the codes differ")
    return {"equal_codes": same}


def _solve_block(group: int, sym: bool, device: torch.device) -> None:
    from gptq_belle.kernels import triton_gptq

    W, Err = (torch.empty(128, 128, device=device) for _ in range(2))
    codes = torch.empty(128, 128, dtype=torch.uint8, device=device)
    scales, zeros = (torch.empty(128 // group if group else 128, 128, device=device) for _ in range(2))
    triton_gptq.solve_block(W, torch.empty(128, 128, device=device), codes, Err, scales, zeros, group=group, bits=4,
                            sym=sym)


def _descend(device: torch.device) -> None:
    from gptq_belle.kernels import triton_gptq

    code, residual, block = (torch.empty(128, 128, device=device) for _ in range(3))
    scale, zero, diagonal = (torch.empty(128, device=device) for _ in range(3))
    triton_gptq.descend(code, scale, zero, residual, block, diagonal, 4)
