"""Random weights in the layout of the Triton kernels, and the products with them that have to be compiled."""

from functools import partial

import torch
from torch import Tensor

from gptq_belle.kernels import triton_matmul
from gptq_belle.kernels.triton_config import LaunchPlan, MatmulProblem
from gptq_belle.kernels.triton_layout import COLUMNS, SlicedWeight, block_inputs, unpack_slices
from gpu_check.kernel_recording import Case

GROUP = 128


def random_weight(inputs: int, outputs: int, bits: int, device: torch.device, run: int = GROUP,
                  zero: int | None = None, ordered: bool = True) -> SlicedWeight:
    """A random weight (inputs, outputs) of 4 or 8 bits; `inputs` is a multiple of 128.

    Args:
        run: inputs that share a scale.
        zero: the zero point of all groups; None for 2**(bits - 1), -1 for one per group and output.
        ordered: False for a weight in activation order.
    """
    block, columns = block_inputs(bits, run), -(-outputs // COLUMNS) * COLUMNS
    words = torch.randint(-(2**15), 2**15, (inputs // block, columns, block * bits // 16), dtype=torch.int16,
                          device=device)
    scales = (torch.rand(inputs // run, columns, device=device) * 0.01 + 0.005).half()
    g_idx = torch.arange(inputs, dtype=torch.int32, device=device) // run
    zeros = torch.randint(0, 2**bits, scales.shape, device=device).half() if zero == -1 else None
    order = None if ordered else torch.randperm(inputs, device=device).int()
    return SlicedWeight(words, scales, zeros, order, g_idx, inputs, outputs, run, bits,
                        2 ** (bits - 1) if zero is None else zero, bits, inputs // run, 1)


def codes_of(weight: SlicedWeight) -> tuple[Tensor, Tensor]:
    """Codes (K, N) uint8 and scales (G, N) float16 of a weight with its inputs in order."""
    n = weight.out_features
    return unpack_slices(weight.words[:, :n], weight.bits), weight.scales[:, :n]


def expanded(weight: SlicedWeight) -> Tensor:
    """The dequantized weight (K, N) in float32; one zero point, inputs in order."""
    codes, scales = codes_of(weight)
    return (codes.float() - weight.zero) * scales.float().repeat_interleave(weight.run, 0)


def product_case(problem: MatmulProblem, plan: LaunchPlan | None = None, *, zero: int | None = None,
                 ordered: bool = True, bias: bool = False) -> Case:
    """A product to compile: by a plan, or by the one that is selected for it."""
    return partial(_multiply, problem, plan, zero, ordered, bias)


def _multiply(problem: MatmulProblem, plan: LaunchPlan | None, zero: int | None, ordered: bool, bias: bool,
              device: torch.device) -> None:
    weight = random_weight(problem.inputs, problem.outputs, problem.bits, device, problem.run, zero, ordered)
    x = torch.empty(problem.rows, problem.inputs, dtype=getattr(torch, problem.dtype), device=device)
    triton_matmul.quant_matmul(x, weight, torch.empty(problem.outputs, dtype=torch.float16, device=device)
                               if bias else None, plan)
