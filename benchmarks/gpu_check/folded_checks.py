"""Norms, activations and residuals of a decode step that are folded into products, compared with float64."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from gptq_belle.kernels.triton_config import TENSOR_CORES, MatmulProblem, TileConfig, default_plan
from gptq_belle.kernels.triton_launch import Workspace
from gptq_belle.kernels.triton_layout import gate_order, interleave_gates
from gpu_check.agreement import accepted, relative_error
from gpu_check.kernel_recording import Case
from gpu_check.plan import Step
from gpu_check.setting import Setting
from gpu_check.weights import expanded, random_weight

ERRORS = {torch.float16: 4e-3, torch.bfloat16: 3.2e-2}  # relative; a layer norm subtracts its mean after the product
EPS = 1e-5
ROWS = 5
MIN_PDL = 90  # compute capability that has programmatic dependent launch


class Block(NamedTuple):
    """A product with the residual stream and the norm after it, and the product after that norm."""

    gated: bool  # RMS norm and SiLU(gate) * value, as in LLaMA; else layer norm and GELU, as in BLOOM
    dtype: torch.dtype
    config: TileConfig
    pdl: bool

    def __str__(self) -> str:
        kind = "RMS norm, SiLU" if self.gated else "layer norm, GELU"
        return f"folded {kind}, {str(self.dtype)[6:]}, {tuple(self.config)}{', PDL' if self.pdl else ''}"


def blocks(setting: Setting, arch: int, processors: int) -> list[Block]:
    """Both kinds with every tile that the rule takes for few rows of the measured shapes; none before 8.0."""
    if arch < TENSOR_CORES:
        return []
    plans = [default_plan(MatmulProblem(8, outputs, inputs, 4, 128, "float16"), arch, processors)
             for inputs, outputs in setting.sizes.shapes]
    configs = {plan.config for plan in plans if plan.config is not None}
    return [Block(gated, dtype, config, pdl) for config in sorted(configs) for gated in (False, True)
            for dtype in setting.sizes.checked_dtypes for pdl in launch_modes(setting, arch)]


def launch_modes(setting: Setting, arch: int) -> tuple[bool, ...]:
    """Values of `pdl`: with and without programmatic dependent launch, where the GPU has it."""
    return (True, False) if arch >= MIN_PDL and not setting.toy else (False,)


def steps(setting: Setting, arch: int, processors: int) -> list[Step]:
    """All checks."""
    return [Step(str(one), partial(check_block, setting, one)) for one in blocks(setting, arch, processors)]


def cases(setting: Setting, arch: int, processors: int) -> list[Case]:
    """Their kernels, for compilation."""
    return [partial(run_block, setting, one) for one in blocks(setting, arch, processors)]


def run_block(setting: Setting, one: Block, device: torch.device) -> dict[str, Any]:
    """Launch both products on random values; returns all tensors by name."""
    from gptq_belle.kernels.triton_norm import FoldedNorm, NextNorm
    from gptq_belle.kernels.triton_skinny_launch import skinny_launch, skinny_workspace

    width, inner = setting.sizes.checked
    first = random_weight(width, width, 4, device)
    second = random_weight(width, 2 * inner if one.gated else inner, 4, device)
    config = one.config._replace(SPLIT_K=min(one.config.SPLIT_K, width // 128))
    x, stream = (torch.randn(ROWS, width, device=device).to(one.dtype) for _ in range(2))
    gamma, bias = torch.rand(width, device=device) + 0.5, torch.randn(second.out_features, device=device)
    following = NextNorm(gamma, None, torch.empty_like(x),
                         torch.empty(2, -(-width // config.BN), ROWS, device=device))
    after, hidden = torch.empty_like(stream), torch.empty(ROWS, inner, dtype=one.dtype, device=device)
    product = None if one.gated else gamma @ expanded(second)
    norm = FoldedNorm(following.moments, product, EPS, width, config.BN)
    weight = interleave_gates(second) if one.gated else second
    given_bias = bias[gate_order(len(bias), device)] if one.gated else bias

    def workspace(outputs: int) -> Workspace:
        sums, tickets = skinny_workspace(ROWS, outputs, config)
        return Workspace(torch.empty(max(sums, 1), device=device),
                         torch.zeros(max(tickets, 1), dtype=torch.int32, device=device))

    skinny_launch(x, first, after, config, workspace(width), residual=stream, next_norm=following, pdl=one.pdl)()
    skinny_launch(following.x, weight, hidden, config, workspace(weight.out_features), bias=given_bias,
                  activation="silu_mul" if one.gated else "gelu", norm=norm, pdl=one.pdl)()
    return {"first": first, "second": second, "x": x, "stream": stream, "gamma": gamma, "bias": bias, "after": after,
            "hidden": hidden}


def check_block(setting: Setting, one: Block) -> dict[str, float]:
    """The largest relative error of both results.

    Raises:
        WrongProduct: it is too large.
    """
    t = run_block(setting, one, setting.device)
    expected = t["x"].double() @ expanded(t["first"]).double() + t["stream"].double()
    y, gamma, bias = t["after"].double(), t["gamma"].double(), t["bias"].double()
    weight = expanded(t["second"]).double()
    if one.gated:
        gate, value = (F.rms_norm(y, gamma.shape, gamma, EPS) @ weight + bias).chunk(2, -1)
        hidden = F.silu(gate) * value
    else:
        hidden = F.gelu(F.layer_norm(y, gamma.shape, gamma, None, EPS) @ weight + bias, approximate="tanh")
    error = max(relative_error(t["after"], expected), relative_error(t["hidden"], hidden))
    return accepted(error, ERRORS[one.dtype])
