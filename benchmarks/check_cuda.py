"""Check every GPU kernel in every configuration of the tuning search against the float32 reference, on a device.

    python benchmarks/check_cuda.py --budget 100 --out FOLDER

First every format (bits, runs, zero points, act-order, dtypes) with the plans selected for it, then every variation of
every plan on the usual format. Checks skipped because of the time limit are counted. Writes cuda_check.json; the exit
code is 1 if a product is incorrect.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cuda_common import Deadline, head, require_device, write

from gptq_belle.bench.kernel_tuning import VARIED, starting_plans, variations
from gptq_belle.kernels import reference, triton_layout, triton_matmul
from gptq_belle.kernels.layout import CanonicalWeight, checked_weight
from gptq_belle.kernels.triton_config import ROW_BUCKETS, LaunchPlan, MatmulProblem, default_plan

INPUTS, OUTPUTS = 1024, 352  # the outputs end inside a tile
MOST_ROWS = {"skinny": 64, "gemm": 300, "expand": 300}
# Relative error in the Frobenius norm: rounding of the result, the weight and (bfloat16) the scales, each at most
# 2**-12 or 2**-9 on average, with a margin of one more; float32 expands the weight exactly.
AGREEMENT = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}


class ProductCheck(NamedTuple):
    """One check."""

    bits: int
    group: int
    sym: bool
    act_order: bool
    dtype: torch.dtype
    rows: int
    bias: bool
    plan: LaunchPlan | None  # None: the plan that dispatch selects


def formats() -> Iterator[ProductCheck]:
    """Every format at every number of rows with a different plan, with the selected plan."""
    for rows, group, bits, dtype in itertools.product((1, 11, 33, 64, 129, 1030), (128, 64, 32), (4, 8, 3, 2),
                                                      (torch.float16, torch.bfloat16)):
        for sym, act_order in ((True, False), (False, True)):
            yield ProductCheck(bits, group, sym, act_order, dtype, rows, not sym, None)
    yield ProductCheck(4, 128, False, True, torch.float32, 5, True, None)


def configs(arch: int, processors: int) -> Iterator[ProductCheck]:
    """Every plan of the tuning search, with 4 bits in float16 and 8 bits in bfloat16."""
    plans: dict[LaunchPlan, None] = {}
    for most in ROW_BUCKETS:
        case = MatmulProblem(most, OUTPUTS, INPUTS, 4, 128, "float16")
        for first in starting_plans(case, default_plan(case, arch, processors)):
            plans |= dict.fromkeys([first, *(plan for name in VARIED for plan in variations(first, name))])
    for plan in plans:
        rows = MOST_ROWS[plan.kernel] if plan.config is None or plan.kernel != "skinny" else plan.config.BM - 1
        for bits, dtype in ((4, torch.float16), (8, torch.bfloat16)):
            yield ProductCheck(bits, 128, bits == 4, False, dtype, rows, False, plan)


def random_words(product: ProductCheck, device: torch.device) -> CanonicalWeight:
    """A random packed weight in the layout of the checkpoint."""
    bits, groups = product.bits, INPUTS // product.group

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, device=device).to(torch.int32)

    g_idx = torch.arange(INPUTS, device=device, dtype=torch.int32) // product.group
    if product.act_order:
        g_idx = g_idx[torch.randperm(INPUTS, device=device)]
    zeros = words(groups, OUTPUTS * bits // 32)
    if product.sym:  # one zero point for all: 2**(bits - 1), stored minus one; 1 for 3 bits, which do not divide a word
        stored = 0 if bits == 3 else sum((2 ** (bits - 1) - 1) << place for place in range(0, 32, bits))
        zeros = torch.full_like(zeros, stored)
    scales = (torch.rand(groups, OUTPUTS, device=device) * 0.01 + 0.005).half()
    return checked_weight(words(INPUTS * bits // 32, OUTPUTS), zeros, scales, g_idx, bits, 1)


def relative_error(product: ProductCheck, weight: CanonicalWeight, sliced: triton_layout.SlicedWeight) -> float:
    """Relative error of a product to the reference; infinite if two runs differ."""
    device = weight.qweight.device
    x = torch.randn(product.rows, INPUTS, device=device).to(product.dtype)
    bias = torch.randn(OUTPUTS, device=device).half() if product.bias else None
    y, again = (triton_matmul.quant_matmul(x, sliced, bias, plan=product.plan) for _ in range(2))
    if not torch.equal(y, again):
        return float("inf")
    exact = reference.quant_matmul(x.float(), weight, bias)
    return float((y.float() - exact).norm() / exact.norm())


def does_not_fit(error: Exception) -> bool:
    """Whether a configuration exceeds the resources of this GPU; the tuning search skips these too."""
    return type(error).__name__ in ("OutOfResources", "PTXASError")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=600, help="time limit in seconds")
    parser.add_argument("--out", type=Path, default=Path("cuda-results"), help="folder of the results")
    args = parser.parse_args()
    device, deadline = require_device(), Deadline(args.budget)
    torch.manual_seed(0)
    products = [*formats(), *configs(*triton_matmul.device_properties(device))]
    wrong: list[str] = []
    too_large: list[str] = []
    largest: dict[str, float] = {}
    laid_out: dict[tuple[Any, ...], tuple[CanonicalWeight, triton_layout.SlicedWeight]] = {}
    checked = 0
    for product in products:
        if deadline.over():
            break
        key = product[:4]
        if key not in laid_out:
            weight = random_words(product, device)
            laid_out[key] = (weight, triton_layout.prepare(weight))
        try:
            error = relative_error(product, *laid_out[key])
        except Exception as failure:  # a failure of one configuration is recorded and does not end the run
            (too_large if does_not_fit(failure) else wrong).append(f"{product}: {type(failure).__name__}: {failure}")
            continue
        finally:
            checked += 1
        name = str(product.dtype).split(".")[1]
        largest[name] = max(error, largest.get(name, 0.0))
        if not error < AGREEMENT[product.dtype]:
            wrong.append(f"{product}: relative error {error:.2e}")
    print(f"{checked} of {len(products)} products checked, incorrect: {len(wrong)}, too large here: {len(too_large)}, "
          f"largest errors {largest}")
    print(*wrong, sep="\n")
    write(args.out, "cuda_check", head(device) | {
        "products": len(products), "checked": checked, "wrong": wrong, "too_large": too_large,
        "largest_errors": largest})
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
