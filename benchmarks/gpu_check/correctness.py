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
from gpu_check import attention_checks, folded_checks, head_checks, solver_checks
from gpu_check.agreement import WrongProduct, accepted, relative_error
from gpu_check.kernel_recording import Case
from gpu_check.plan import Step
from gpu_check.setting import Setting
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
    return [*(Step(str(one), partial(check_product, setting, one)) for one in checks(setting, arch, processors)),
            *folded_checks.steps(setting, arch, processors), *attention_checks.steps(setting, arch),
            *head_checks.steps(setting, arch), *solver_checks.steps(setting)]


def cases(setting: Setting, arch: int, processors: int) -> list[Case]:
    """The kernels of all steps, for compilation."""
    inputs, outputs = setting.sizes.checked
    products = [product_case(
        MatmulProblem(one.rows, outputs, inputs, triton_layout.CONTAINERS[one.bits], one.group,
                      str(one.dtype).removeprefix("torch.")),
        one.plan, zero=zero_point(one.bits) if one.sym else -1, ordered=not one.act_order, bias=one.bias)
        for one in checks(setting, arch, processors)]
    return [*products, *folded_checks.cases(setting, arch, processors), *attention_checks.cases(setting, arch),
            *head_checks.cases(setting, arch), *solver_checks.cases()]


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
    return accepted(relative_error(y, exact), AGREEMENT[product.dtype])
