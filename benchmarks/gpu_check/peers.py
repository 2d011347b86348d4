"""4-bit products of other projects on a GPU: torch, and gemlite and GPTQModel if they are installed.

Each factory takes codes (K, N) uint8 and scales (K / 128, N) float16, with 8 as the zero point of all, and returns a
function of x (M, K). Results are compared with the reference before the timing, so a changed interface shows as a wrong
result or an exception.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_check.weights import GROUP

Matmul = Callable[[Tensor], Tensor]
CUBLAS = "cuBLAS float16"
GEMLITE_CONFIGS = {80: "a100", 86: "a6000", 89: "4090", 90: "h100", 120: "5090"}  # by compute capability


class Peer(NamedTuple):
    """A product of another project."""

    make: Callable[[Tensor, Tensor], Matmul]
    dtype: torch.dtype  # dtype of the activations
    bits: float  # bits per weight, including scales
    package: str | None = None  # None: torch


def cublas(codes: Tensor, scales: Tensor) -> Matmul:
    """The expanded weight in float16."""
    weight = ((codes.float() - 8) * scales.float().repeat_interleave(GROUP, 0)).half().t().contiguous()
    return lambda x: torch.nn.functional.linear(x, weight)


def torch_int4(codes: Tensor, scales: Tensor) -> Matmul:
    """torch's int4 operation (tinygemm) in bfloat16."""
    packed = torch.ops.aten._convert_weight_to_int4pack(nibbles(codes), 8)
    table = torch.stack([scales.bfloat16(), torch.zeros_like(scales, dtype=torch.bfloat16)], -1).contiguous()
    product: Matmul = lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, table)  # noqa: E731
    return product


def nibbles(codes: Tensor) -> Tensor:
    """Codes (K, N) as bytes (N, K / 2); the first of two codes is in the upper half of a byte."""
    across = codes.t()
    return (across[:, ::2] << 4 | across[:, 1::2]).contiguous()


def gemlite(codes: Tensor, scales: Tensor) -> Matmul:
    """gemlite's Triton kernels in their fastest mode: symmetric, with the tuned configurations that it ships."""
    core = _tuned_gemlite()
    inputs, outputs = codes.shape
    linear = core.GemLiteLinear(4, group_size=GROUP, in_features=inputs, out_features=outputs,
                                input_dtype=core.DType.FP16, output_dtype=core.DType.FP16)
    linear.pack(codes.t().contiguous(), scales.t().reshape(-1, 1).contiguous(), 8, None)  # an integer: one zero point
    product: Matmul = linear
    return product


@lru_cache(maxsize=1)
def _tuned_gemlite() -> Any:
    """gemlite's module with a table of configurations. It finds one by the name of the GPU; for other names that of a
    GPU with the same compute capability is loaded."""
    core = import_module("gemlite.core")
    if core.get_default_cache_config() is None:
        major, minor = torch.cuda.get_device_capability()
        name = GEMLITE_CONFIGS.get(10 * major + minor)
        if name is not None:
            core.GemLiteLinear.load_config(str(Path(str(core.__file__)).parent / "configs" / f"{name}.json"))
    return core


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
        zero = 8 if getattr(kind, "REQUIRES_FORMAT_V2", False) else 7  # version 1 stores zero points minus one
        nibbles_of_zero = torch.tensor(zero * 0x11111111).to(torch.int32)  # 0x88888888 wraps to a negative number
        linear.qzeros.data = nibbles_of_zero.repeat(groups, outputs // 8).to(codes.device)
        linear.scales.data = scales.contiguous()
        linear.g_idx.data = torch.arange(inputs, dtype=torch.int32, device=codes.device) // GROUP
        linear.post_init()
        product: Matmul = linear.eval()
        return product

    return make


PACKED = 4 + 16 / GROUP
MARLIN, TRITON = ("MarlinLinear", "MarlinQuantLinear"), ("TritonV2Linear", "TritonV2QuantLinear")
PEERS = {
    CUBLAS: Peer(cublas, torch.float16, 16),
    "torch int4": Peer(torch_int4, torch.bfloat16, 4 + 32 / GROUP),
    "gemlite": Peer(gemlite, torch.float16, PACKED, "gemlite"),
    "GPTQModel Marlin": Peer(gptqmodel("marlin", MARLIN), torch.float16, PACKED, "gptqmodel"),
    "GPTQModel Triton": Peer(gptqmodel("tritonv2", TRITON), torch.float16, PACKED, "gptqmodel"),
}
