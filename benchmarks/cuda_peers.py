"""4-bit products of other projects on a GPU: torch, and gemlite and GPTQModel if they are installed.

Each factory takes codes (K, N) uint8 and scales (K / 128, N) float16, with 8 as the zero point of all, and returns a
function of x (M, K). Results are compared with ours before the timing, so a changed interface is recorded as an
incorrect result or as an error.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from cuda_common import GROUP
from torch import Tensor

Matmul = Callable[[Tensor], Tensor]


class Peer(NamedTuple):
    """A product of another project."""

    make: Callable[[Tensor, Tensor], Matmul]
    dtype: torch.dtype  # dtype of the activations
    bits: float  # bits per weight, including scales


def cublas(codes: Tensor, scales: Tensor) -> Matmul:
    """The expanded weight in float16."""
    weight = ((codes.float() - 8) * scales.float().repeat_interleave(GROUP, 0)).half().t().contiguous()
    return lambda x: torch.nn.functional.linear(x, weight)


def torch_int4(codes: Tensor, scales: Tensor) -> Matmul:
    """torch's int4 op (tinygemm) in bfloat16; the first of two codes is in the upper half of a byte."""
    across = codes.t()
    packed = torch.ops.aten._convert_weight_to_int4pack((across[:, ::2] << 4 | across[:, 1::2]).contiguous(), 8)
    table = torch.stack([scales.bfloat16(), torch.zeros_like(scales, dtype=torch.bfloat16)], -1).contiguous()
    product: Matmul = lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, table)  # noqa: E731
    return product


def gemlite(codes: Tensor, scales: Tensor) -> Matmul:
    """gemlite's Triton kernels with their default autotuning."""
    core = import_module("gemlite.core")
    inputs, outputs = codes.shape
    linear = core.GemLiteLinear(4, group_size=GROUP, in_features=inputs, out_features=outputs,
                                input_dtype=core.DType.FP16, output_dtype=core.DType.FP16)
    flat = scales.t().reshape(-1, 1).contiguous()
    linear.pack(codes.t().contiguous(), flat, torch.full_like(flat, 8), None)
    product: Matmul = linear
    return product


def gptqmodel(module: str, names: tuple[str, ...]) -> Callable[[Tensor, Tensor], Matmul]:
    """A kernel of GPTQModel, by its module and the current and former names of its class."""
    def make(codes: Tensor, scales: Tensor) -> Matmul:
        found = import_module(f"gptqmodel.nn_modules.qlinear.{module}")
        kind: Any = next(getattr(found, name) for name in names if hasattr(found, name))
        inputs, outputs = codes.shape
        linear = kind(bits=4, group_size=GROUP, desc_act=False, sym=True, in_features=inputs, out_features=outputs,
                      bias=False, pack_dtype=torch.int32, register_buffers=True).to(codes.device)
        groups = inputs // GROUP
        shifts = torch.arange(0, 32, 4, device=codes.device)
        linear.qweight.data = (codes.view(-1, 8, outputs).long() << shifts[:, None]).sum(1).to(torch.int32)
        linear.qzeros.data = torch.full((groups, outputs // 8), 0x77777777, dtype=torch.int32, device=codes.device)
        linear.scales.data = scales.contiguous()
        linear.g_idx.data = torch.arange(inputs, dtype=torch.int32, device=codes.device) // GROUP
        linear.post_init()
        product: Matmul = linear.eval()
        return product

    return make


PACKED = 4 + 16 / GROUP
PEERS = {
    "cuBLAS float16": Peer(cublas, torch.float16, 16),
    "torch int4": Peer(torch_int4, torch.bfloat16, 4 + 32 / GROUP),
    "gemlite": Peer(gemlite, torch.float16, PACKED),
    "GPTQModel Marlin": Peer(gptqmodel("marlin", ("MarlinLinear", "MarlinQuantLinear")), torch.float16, PACKED),
    "GPTQModel Triton": Peer(gptqmodel("tritonv2", ("TritonV2Linear", "TritonV2QuantLinear")), torch.float16, PACKED),
}
