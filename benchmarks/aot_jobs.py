"""Compilation jobs: a Triton kernel with all its constants, for a GPU that need not be present (sets: aot_sets.py)."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import aot_decode
import machine_code
from machine_code import MachineCode, Turn

from gptq_belle.kernels import triton_gptq
from gptq_belle.kernels.triton_config import TENSOR_CORES, TileConfig, launch_options
from gptq_belle.kernels.triton_dequant import dequant_kernel
from gptq_belle.kernels.triton_gemm import gemm_kernel
from gptq_belle.kernels.triton_layout import block_inputs
from gptq_belle.kernels.triton_reduce import arrange_kernel, reduce_kernel
from gptq_belle.kernels.triton_skinny import skinny_kernel
from gptq_belle.kernels.triton_skinny_launch import ACTIVATIONS

# Multiprocessors of T4, A100, 3090, 4090, H100, B200 and 5090.
PROCESSORS = {75: 40, 80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
DTYPES = {"float16": "fp16", "bfloat16": "bf16"}
SAME, EACH = "one", "each"  # zero point

# What the products of a decode step do besides multiplying: types of the tensors that they have, "*x" is that of x.
EPILOGUES: dict[str, dict[str, str]] = {
    "gelu": {"bias": "*fp32", "moments": "*fp32", "gamma_product": "*fp32", "out_places": "*i32"},
    "silu_mul": {"moments": "*fp32", "out_places": "*i32"},
    "stream": {"bias": "*fp32", "residual": "*x", "next_gamma": "*fp32", "next_places": "*i32", "next_x": "*x",
               "next_moments": "*fp32"},
}
OPTIONAL = ("zeros", "sums", "tickets", "bias", "residual", "out_places", "moments", "gamma_product", "next_gamma",
            "next_places", "next_x", "next_moments")


class Job(NamedTuple):
    """One kernel with all its constants for one architecture; fields that do not apply to the kernel are None."""

    arch: int
    kernel: str  # a key of KERNELS or of aot_decode.DECODE_KERNELS
    bits: int | None = None
    dtype: str | None = None
    run: int | None = None
    zero: str | None = None
    config: TileConfig | None = None
    epilogue: str | None = None  # a key of EPILOGUES; None: the sums alone


class Kernel(NamedTuple):
    """How to compile a kernel: the function, and its argument types and constants as functions of the job."""

    function: Any
    types: Callable[[Job], dict[str, str]]
    constants: Callable[[Job], dict[str, Any]]
    options: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}


def _weight(job: Job) -> dict[str, Any]:
    bits, run = job.bits or 4, job.run or 128
    return {"BITS": bits, "RUN": run, "BLOCK": block_inputs(bits, run),
            "ZERO": 2 ** (bits - 1) if job.zero == SAME else -1, "ASM": job.arch >= TENSOR_CORES}


def _tile(job: Job) -> dict[str, Any]:
    assert job.config is not None
    return _weight(job) | {"BM": job.config.BM, "BN": job.config.BN, "BK": job.config.step(_weight(job)["BLOCK"])}


def _gemm(job: Job) -> dict[str, Any]:
    assert job.config is not None
    return _tile(job) | {"HAS_BIAS": False, "SPLIT_K": job.config.SPLIT_K, "SWIZZLE": 8}


def _skinny(job: Job) -> dict[str, Any]:
    """Constants of the kernel for few rows; tensors that the job does not have are None."""
    assert job.config is not None
    activation = job.epilogue if job.epilogue in ACTIVATIONS else "none"
    absent = {name: None for name in OPTIONAL if name not in _skinny_types(job)}
    return _tile(job) | absent | {
        "ACTIVATION": activation, "WIDTH": 5120, "TILE": 32 if job.config.BM == 8 else 64,
        "K_WARPS": job.config.K_WARPS, "SPLIT": job.config.SPLIT_K > 1,
        "PDL": job.epilogue is not None and job.arch >= aot_decode.MIN_PDL}


def inputs_of_step(job: Job) -> int:
    """Inputs that a program processes at a time."""
    assert job.config is not None
    return job.config.step(_weight(job)["BLOCK"]) * job.config.K_WARPS


def _skinny_types(job: Job) -> dict[str, str]:
    assert job.config is not None
    x = f"*{DTYPES[job.dtype or 'float16']}"
    types = {"x": x, "words": "*i16", "scales": "*fp16", "out": x, "eps": "fp32", "M": "i32", "N": "i32", "K": "i32",
             "out_row": "i32", "next_row": "i32"}
    if job.zero == EACH:
        types["zeros"] = "*fp16"
    if job.config.SPLIT_K > 1:
        types |= {"sums": "*fp32", "tickets": "*i32"}
    return types | {name: kind.replace("*x", x) for name, kind in EPILOGUES.get(job.epilogue or "", {}).items()}


def _product(job: Job) -> dict[str, str]:
    assert job.config is not None
    x = f"*{DTYPES[job.dtype or 'float16']}"
    return {"x": x, "words": "*i16", "scales": "*fp16", "zeros": "*fp16", "bias": "*fp16",
            "out": x if job.config.SPLIT_K == 1 else "*fp32", "M": "i32", "N": "i32", "K": "i32"}


def _dequant(job: Job) -> dict[str, str]:
    return {"words": "*i16", "scales": "*fp16", "zeros": "*fp16", "out": f"*{DTYPES[job.dtype or 'float16']}",
            "start": "i32", "N": "i32", "K": "i32"}


REDUCE = {"parts": "*fp32", "bias": "*fp16", "out": "*fp16", "M": "i32", "N": "i32"}
ARRANGE = {"x": "*fp16", "order": "*i32", "out": "*fp16", "M": "i32", "inputs": "i32", "places": "i32"}
GPTQ = {"weight": "*fp32", "factor": "*fp32", "codes": "*u8", "errors": "*fp32", "scales": "*fp32", "zeros": "*fp32",
        "inputs": "i32", "N": "i32", "stride": "i32", "own": "i32"}
DESCENT = {"codes": "*fp32", "residual": "*fp32", "scales": "*fp32", "zeros": "*fp32", "hessian": "*fp32",
           "diagonal": "*fp32", "inputs": "i32", "N": "i32", "stride": "i32"}
KERNELS = {
    "skinny": Kernel(skinny_kernel, _skinny_types, _skinny),
    "gemm": Kernel(gemm_kernel, _product, _gemm),
    "dequant": Kernel(dequant_kernel, _dequant, lambda job: _weight(job) | {"BN": 64}),
    "reduce": Kernel(reduce_kernel, lambda job: REDUCE, lambda job: {"HAS_BIAS": True, "SPLIT_K": 4, "WIDTH": 256}),
    "arrange": Kernel(arrange_kernel, lambda job: ARRANGE, lambda job: {"WIDTH": 1024}),
    "gptq": Kernel(triton_gptq.gptq_block, lambda job: GPTQ, lambda job: {
        "GROUP": job.run, "LEVELS": 2 ** (job.bits or 4) - 1, "SYM": job.zero == SAME,
        "BLOCK": triton_gptq.BLOCK, "OUTPUTS": triton_gptq.OUTPUTS}, triton_gptq.OPTIONS),
    "descent": Kernel(triton_gptq.descent_block, lambda job: DESCENT, lambda job: {
        "LEVELS": 2 ** (job.bits or 4) - 1, "BLOCK": triton_gptq.BLOCK, "OUTPUTS": triton_gptq.OUTPUTS},
        triton_gptq.OPTIONS),
}


def turn(job: Job) -> Turn | None:
    """An iteration of a job's main loop; None for kernels without one."""
    if job.kernel in aot_decode.DECODE_KERNELS:
        return aot_decode.decode_kernel(job.kernel, job.arch).turn
    if job.config is None:
        return None
    numbers = job.config.BN * inputs_of_step(job)
    return Turn(numbers, job.config.BM * numbers, job.config.num_warps)


@cache
def compiled(job: Job) -> MachineCode:
    """Compile a job; errors of Triton and ptxas propagate."""
    if job.kernel in aot_decode.DECODE_KERNELS:
        return machine_code.compile_kernel(*aot_decode.decode_kernel(job.kernel, job.arch)[:5])
    kernel = KERNELS[job.kernel]
    options = dict(kernel.options)
    if job.config is not None:
        options |= launch_options(job.kernel, job.config, job.bits or 4, job.run or 128, job.arch)
    return machine_code.compile_kernel(kernel.function, kernel.types(job), kernel.constants(job), job.arch, options)
