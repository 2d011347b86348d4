"""Compilation jobs: every Triton kernel in every planned or tuned configuration, for GPUs that need not be present.

Every split of K is compiled as a split in two; the others differ in one constant only.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import aot_decode
import machine_code
from machine_code import MachineCode

from gptq_belle.kernels import triton_gptq
from gptq_belle.kernels.triton_config import (
    ROW_BUCKETS,
    TENSOR_CORES,
    LaunchPlan,
    MatmulProblem,
    TileConfig,
    default_plan,
    launch_options,
    tuned_plans,
)
from gptq_belle.kernels.triton_dequant import dequant_kernel
from gptq_belle.kernels.triton_gemm import gemm_kernel
from gptq_belle.kernels.triton_layout import block_inputs
from gptq_belle.kernels.triton_reduce import arrange_kernel, reduce_kernel
from gptq_belle.kernels.triton_skinny import skinny_kernel
from gptq_belle.kernels.triton_skinny_launch import ACTIVATIONS

# Multiprocessors of T4, A100, 3090, 4090, H100, B200 and 5090.
PROCESSORS = {75: 40, 80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
SHAPES = [(4096, 4096), (4096, 12288), (4096, 16384), (16384, 4096), (4096, 11008), (11008, 4096), (5120, 5120),
          (5120, 13824), (13824, 5120)]  # inputs, outputs: BELLE-7B, LLaMA-7B and 13B
DTYPES = {"float16": "fp16", "bfloat16": "bf16"}
RUNS = (128, 64, 32)
SAME, EACH = "one", "each"  # zero point
VARIANTS = list(itertools.product((4, 8), DTYPES, RUNS))


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
        "ACTIVATION": activation, "WIDTH": 4096, "TILE": 32, "K_WARPS": job.config.K_WARPS,
        "SPLIT": job.config.SPLIT_K > 1, "PDL": job.epilogue is not None and job.arch >= aot_decode.MIN_PDL}


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


def configs(arch: int, bits: int = 4, dtype: str = "float16", run: int = 128) -> set[tuple[str, TileConfig]]:
    """Kernels and configurations that the rule selects for a format, over all shapes and numbers of rows."""
    plans = {default_plan(MatmulProblem(rows, outputs, inputs, bits, run, dtype), arch, PROCESSORS[arch])
             for rows in ROW_BUCKETS for inputs, outputs in SHAPES}
    return {(plan.kernel, split_in_two(plan.config)) for plan in plans if plan.config is not None}


def decode_steps(products: list[Job]) -> list[Job]:
    """The products of a decode step of up to 8 rows with everything that is folded into them."""
    return [job._replace(epilogue=epilogue) for job in products for epilogue in EPILOGUES
            if job.kernel == "skinny" and job.config is not None and job.config.BM == 8 and job.arch >= TENSOR_CORES]


def split_in_two(config: TileConfig) -> TileConfig:
    """The same configuration with its split of K replaced by a split in two."""
    return config._replace(SPLIT_K=min(config.SPLIT_K, 2))


def usual(arch: int) -> list[Job]:
    """Jobs for most checkpoints (4 bits, float16, one zero point) and for the solver."""
    products = [Job(arch, kernel, 4, "float16", 128, SAME, config) for kernel, config in sorted(configs(arch))]
    return [*products, *decode_steps(products), *(job for job in decode(arch) if job.kernel in aot_decode.USUAL),
            Job(arch, "dequant", 4, "float16", 128, SAME), Job(arch, "gptq", 4, run=128, zero=SAME),
            Job(arch, "descent", 4)]


def covering(arch: int) -> list[Job]:
    """The usual jobs, and each kernel and tile with four other formats that together hold every property of one."""
    products = [job for bits, dtype, run, zero in (
        (4, "bfloat16", 64, SAME), (4, "float16", 32, EACH), (8, "float16", 128, EACH), (8, "bfloat16", 32, EACH))
        for job in _one_split(arch, bits, dtype, run, zero)]
    return [*usual(arch), *products, Job(arch, "dequant", 4, "float16", 64, EACH),
            Job(arch, "dequant", 8, "bfloat16", 32, SAME), Job(arch, "reduce"), Job(arch, "arrange"),
            Job(arch, "gptq", 4, run=64, zero=EACH), Job(arch, "gptq", 4, run=0, zero=SAME)]


def decode(arch: int) -> list[Job]:
    """The kernels of a decode step that are not products; they need 16-bit tensor cores."""
    return [Job(arch, name) for name in aot_decode.DECODE_KERNELS if arch >= TENSOR_CORES]


def every(arch: int) -> list[Job]:
    """All jobs for one architecture."""
    formats = [(*variant, zero) for variant in VARIANTS for zero in (SAME, EACH)]
    found = [*usual(arch), *decode(arch), *(job for format_ in formats for job in _one_split(arch, *format_)),
             *(job for problem, plan in tuned_plans(arch).items() for job in _tuned(arch, problem, plan)),
             *(Job(arch, "dequant", *format_) for format_ in formats), Job(arch, "reduce"), Job(arch, "arrange"),
             *(Job(arch, "gptq", 4, run=group, zero=zero) for group in (32, 64, 128, 0) for zero in (SAME, EACH))]
    return list(dict.fromkeys(found))


JOBS = {"usual": usual, "covering": covering, "decode": decode, "all": every}


def _one_split(arch: int, bits: int, dtype: str, run: int, zero: str) -> list[Job]:
    """Jobs of a format; of configurations that differ in their split of K only, the one with the larger split."""
    whole = {(kernel, config._replace(SPLIT_K=1)): config
             for kernel, config in sorted(configs(arch, bits, dtype, run))}
    return [Job(arch, kernel, bits, dtype, run, zero, config) for (kernel, _), config in whole.items()]


def _tuned(arch: int, problem: MatmulProblem, plan: LaunchPlan) -> Iterator[Job]:
    if plan.config is not None:
        config = split_in_two(plan.config)
        yield from (Job(arch, plan.kernel, problem.bits, problem.dtype, problem.run, zero, config)
                    for zero in (SAME, EACH))


def compiled(job: Job) -> MachineCode:
    """Compile a job; errors of Triton and ptxas propagate."""
    if job.kernel in aot_decode.DECODE_KERNELS:
        return machine_code.compile_kernel(*aot_decode.decode_kernel(job.kernel, job.arch))
    kernel = KERNELS[job.kernel]
    options = dict(kernel.options)
    if job.config is not None:
        options |= launch_options(job.kernel, job.config, job.bits or 4, job.run or 128, job.arch)
    return machine_code.compile_kernel(kernel.function, kernel.types(job), kernel.constants(job), job.arch, options)
