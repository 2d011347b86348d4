"""Every GPU kernel in every configuration of the tuning search against the float32 reference, on the device.

First every format (bits, runs, zero points, activation order, dtypes) with the plans selected for it, then every
variation of every plan on the usual formats, what a decode step launches besides, and the solver's kernels against the
same steps in torch.
"""

import itertools
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from gptq_belle.bench.kernel_tuning import VARIED, starting_plans, variations
from gptq_belle.kernels import reference, triton_layout, triton_matmul
from gptq_belle.kernels.layout import CanonicalWeight, checked_weight
from gptq_belle.kernels.triton_config import ROW_BUCKETS, LaunchPlan, MatmulProblem, default_plan
from gptq_belle.quantization import refine
from gpu_check import decode_checks
from gpu_check.kernel_recording import Case
from gpu_check.plan import Step
from gpu_check.setting import Setting, WrongProduct
from gpu_check.weights import product_case

FORMAT_ROWS = (1, 11, 33, 64, 129, 1030)
MOST_ROWS = {"skinny": 64, "gemm": 300, "expand": 300}
# Relative error in the Frobenius norm: rounding of the result, the weight and (bfloat16) the scales, each at most
# 2**-12 or 2**-9 on average, with a margin of one more; float32 expands the weight exactly.
AGREEMENT = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
TOO_LARGE = ("OutOfResources", "PTXASError", "UnsupportedTileError")  # a configuration that this GPU does not run


class ProductCheck(NamedTuple):
    """One check."""

    bits: int
    group: int
    sym: bool
    act_order: bool
    dtype: torch.dtype
    rows: int
    bias: bool
    plan: LaunchPlan | None = None  # None: the plan that dispatch selects

    def __str__(self) -> str:
        zero = "symmetric" if self.sym else "asymmetric"
        words = [f"{self.bits} bits", f"groups of {self.group}", zero, "act-order" if self.act_order else "",
                 str(self.dtype).removeprefix("torch."), f"{self.rows} rows", "bias" if self.bias else ""]
        plan = "" if self.plan is None else f", {self.plan.kernel} {tuple(self.plan.config or ())}"
        return ", ".join(word for word in words if word) + plan


def formats(setting: Setting) -> Iterator[ProductCheck]:
    """Every format at every number of rows with a different plan, with the selected plan."""
    for rows, group, bits, dtype in itertools.product(FORMAT_ROWS, (128, 64, 32), (4, 8, 3, 2),
                                                      setting.sizes.checked_dtypes):
        for sym, act_order in ((True, False), (False, True)):
            yield ProductCheck(bits, group, sym, act_order, dtype, rows, not sym)
    yield ProductCheck(4, 128, False, True, torch.float32, 5, True)


def configs(setting: Setting, arch: int, processors: int) -> Iterator[ProductCheck]:
    """Every plan of the tuning search, with 4 bits in float16 and 8 bits in the last dtype."""
    plans: dict[LaunchPlan, None] = {}
    inputs, outputs = setting.sizes.checked
    for most in ROW_BUCKETS:
        case = MatmulProblem(most, outputs, inputs, 4, 128, "float16")
        for first in starting_plans(case, default_plan(case, arch, processors)):
            plans |= dict.fromkeys([first, *(plan for name in VARIED for plan in variations(first, name))])
    for plan in plans:
        rows = MOST_ROWS[plan.kernel] if plan.config is None or plan.kernel != "skinny" else plan.config.BM - 1
        for bits, dtype in ((4, torch.float16), (8, setting.sizes.checked_dtypes[-1])):
            yield ProductCheck(bits, 128, bits == 4, False, dtype, rows, False, plan)


def checks(setting: Setting, arch: int, processors: int) -> list[ProductCheck]:
    """All checks of products."""
    return [*formats(setting), *configs(setting, arch, processors)][:: setting.sizes.every]


def steps(setting: Setting, arch: int, processors: int) -> list[Step]:
    """All checks as steps, products first."""
    products = [Step(str(one), partial(check_product, setting, one)) for one in checks(setting, arch, processors)]
    solvers = [Step(f"solver, {'symmetric' if sym else 'asymmetric'}, groups of {group}",
                    partial(check_solver, setting, group, sym)) for group in (128, 64, 32, -1) for sym in (True, False)]
    return [*products, *decode_checks.steps(setting, arch, processors), *solvers[:: 7 if setting.toy else 1],
            Step("solver, coordinate descent", partial(check_descent, setting))]


def cases(setting: Setting, arch: int, processors: int) -> list[Case]:
    """The kernels of all steps, for compilation."""
    inputs, outputs = setting.sizes.checked
    products = [product_case(
        MatmulProblem(one.rows, outputs, inputs, triton_layout.CONTAINERS[one.bits], one.group,
                      str(one.dtype).removeprefix("torch.")),
        one.plan, zero=zero_point(one.bits) if one.sym else -1, ordered=not one.act_order, bias=one.bias)
        for one in checks(setting, arch, processors)]
    return [*products, *decode_checks.cases(setting, arch, processors), *solver_cases()]


def solver_cases() -> list[Case]:
    """The solver's kernels in the formats of `steps`."""
    return [partial(_solve_block, group, sym) for group in (128, 64, 32, 0) for sym in (True, False)] + [_descend]


def zero_point(bits: int) -> int:
    """The zero point of the symmetric weights of `random_words`: 1 for 3 bits, which do not divide a word."""
    return 1 if bits == 3 else 2 ** (bits - 1)


def random_words(bits: int, group: int, sym: bool, act_order: bool, setting: Setting) -> CanonicalWeight:
    """A random packed weight in the layout of the checkpoint."""
    device, (inputs, outputs) = setting.device, setting.sizes.checked
    groups = inputs // group

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, device=device).to(torch.int32)

    g_idx = torch.arange(inputs, device=device, dtype=torch.int32) // group
    if act_order:
        g_idx = g_idx[torch.randperm(inputs, device=device)]
    zeros = words(groups, outputs * bits // 32)
    if sym:  # stored minus one
        stored = 0 if bits == 3 else sum((zero_point(bits) - 1) << place for place in range(0, 32, bits))
        zeros = torch.full_like(zeros, stored)
    scales = (torch.rand(groups, outputs, device=device) * 0.01 + 0.005).half()
    return checked_weight(words(inputs * bits // 32, outputs), zeros, scales, g_idx, bits, 1)


@lru_cache(maxsize=64)
def _laid_out(bits: int, group: int, sym: bool, act_order: bool,
              setting: Setting) -> tuple[CanonicalWeight, triton_layout.SlicedWeight]:
    torch.manual_seed(0)
    weight = random_words(bits, group, sym, act_order, setting)
    return weight, triton_layout.prepare(weight)


def check_product(setting: Setting, product: ProductCheck) -> dict[str, Any]:
    """The relative error of a product, or that its configuration is too large for this GPU, as the search skips it.

    Raises:
        WrongProduct: the error is too large, or two runs differ.
    """
    weight, sliced = _laid_out(*product[:4], setting)
    x = torch.randn(product.rows, sliced.in_features, device=setting.device).to(product.dtype)
    bias = torch.randn(sliced.out_features, device=setting.device).half() if product.bias else None
    try:
        y, again = (triton_matmul.quant_matmul(x, sliced, bias, plan=product.plan) for _ in range(2))
    except Exception as failure:
        if type(failure).__name__ in TOO_LARGE:
            return {"too_large": True}
        raise
    if not torch.equal(y, again):
        raise WrongProduct("two runs differ")
    exact = reference.quant_matmul(x.float(), weight, bias)
    return decode_checks.accepted(decode_checks.relative_error(y, exact), AGREEMENT[product.dtype])


def check_solver(setting: Setting, group: int, sym: bool) -> dict[str, Any]:
    """Compare the solver's kernel with the solver in torch on the same device.

    Raises:
        WrongProduct: more than one code in 2,000 differs; torch fuses some operations, which moves codes at the border
            of two values.
    """
    from gpu_check.solver import solve

    inputs, outputs = setting.sizes.checked
    ours, torchs = (solve(setting, inputs, outputs, by_kernel, group, sym) for by_kernel in (True, False))
    same = float((ours[0] == torchs[0]).float().mean())
    if same < 0.9995:
        raise WrongProduct(f"{100 * (1 - same):.3f} % of the codes differ")
    return {"equal_codes": same}


def check_descent(setting: Setting) -> dict[str, Any]:
    """Compare a sweep of coordinate descent with the same steps in torch on the CPU.

    Raises:
        WrongProduct: more than one code in 2,000 differs.
    """
    from gptq_belle.kernels import triton_gptq

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
    if same < 0.9995:
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
