"""Which jobs of aot_jobs.py are compiled: sets of formats, tiles and epilogues, by name in JOBS.

Every split of K is compiled as a split in two; the others differ in one constant only.
"""

import itertools
from collections.abc import Iterator

import aot_decode
from aot_jobs import DTYPES, EACH, EPILOGUES, PROCESSORS, SAME, Job

from gptq_belle.kernels.triton_config import (
    ROW_BUCKETS,
    TENSOR_CORES,
    LaunchPlan,
    MatmulProblem,
    TileConfig,
    default_plan,
    tuned_plans,
)

SHAPES = [(4096, 4096), (4096, 12288), (4096, 16384), (16384, 4096), (4096, 11008), (11008, 4096), (5120, 5120),
          (5120, 13824), (13824, 5120)]  # inputs, outputs: BELLE-7B, LLaMA-7B and 13B
RUNS = (128, 64, 32)
# Four formats that together hold every property of a format.
OTHER_FORMATS = ((4, "bfloat16", 64, SAME), (4, "float16", 32, EACH), (8, "float16", 128, EACH),
                 (8, "bfloat16", 32, EACH))
VARIANTS = list(itertools.product((4, 8), DTYPES, RUNS))


def configs(arch: int, bits: int = 4, dtype: str = "float16", run: int = 128) -> set[tuple[str, TileConfig]]:
    """Kernels and configurations that the rule selects for a format, over all shapes and numbers of rows."""
    plans = {default_plan(MatmulProblem(rows, outputs, inputs, bits, run, dtype), arch, PROCESSORS[arch])
             for rows in ROW_BUCKETS for inputs, outputs in SHAPES}
    return {(plan.kernel, split_in_two(plan.config)) for plan in plans if plan.config is not None}


def decode_steps(products: list[Job]) -> list[Job]:
    """The products of a decode step of up to 8 rows with everything that is folded into them."""
    return [job._replace(epilogue=epilogue) for job in products for epilogue in EPILOGUES
            if job.kernel == "skinny" and job.config is not None and job.config.BM == 8 and job.arch >= TENSOR_CORES]


def decode(arch: int) -> list[Job]:
    """All kernels of a decode step, which needs 16-bit tensor cores: products of all tiles, and other formats."""
    if arch < TENSOR_CORES:
        return []
    others = [job._replace(epilogue="stream") for format_ in OTHER_FORMATS for job in _few_rows(arch, *format_)
              if job.config is not None and job.config.BM in (8, 64)]
    return [*(Job(arch, name) for name in aot_decode.DECODE_KERNELS),
            *(job._replace(epilogue=epilogue) for job in _few_rows(arch) for epilogue in EPILOGUES), *others]


def decode_usual(arch: int) -> list[Job]:
    """A part of `decode`: BELLE-7B in 4 bits and float16, and the epilogues that need the most registers."""
    return [job for job in decode(arch) if job.kernel in aot_decode.VARIED or (
        job.config is not None and (job.bits, job.dtype, job.run) == (4, "float16", 128)
        and job.epilogue == ("stream" if job.config.BM == 8 else "gelu") and job.config.BM != 16)]


def plain_product(job: Job) -> Job | None:
    """The product with the same tile and format and nothing folded into it; None for other kernels."""
    if job.epilogue is not None:
        return job._replace(epilogue=None)
    function, *arguments = aot_decode.DECODE_KERNELS.get(job.kernel, (None,))
    if function is not aot_decode.head or arguments[0] == 16:
        return None
    bits, rows, _, dtype = (*arguments, "float16")[:4]
    return Job(job.arch, "skinny", bits, dtype, 128, SAME, aot_decode.head_tile(job.arch, bits, rows, dtype))


def split_in_two(config: TileConfig) -> TileConfig:
    """The same configuration with its split of K replaced by a split in two."""
    return config._replace(SPLIT_K=min(config.SPLIT_K, 2))


def usual(arch: int) -> list[Job]:
    """Jobs for most checkpoints (4 bits, float16, one zero point) and for the solver."""
    products = [Job(arch, kernel, 4, "float16", 128, SAME, config) for kernel, config in sorted(configs(arch))]
    return [*products, *decode_steps(products), *(Job(arch, name) for name in aot_decode.USUAL if arch >= TENSOR_CORES),
            Job(arch, "dequant", 4, "float16", 128, SAME), Job(arch, "gptq", 4, run=128, zero=SAME),
            Job(arch, "descent", 4)]


def covering(arch: int) -> list[Job]:
    """The usual jobs, and each kernel and tile with four other formats that together hold every property of one."""
    products = [job for format_ in OTHER_FORMATS for job in _one_split(arch, *format_)]
    return [*usual(arch), *products, Job(arch, "dequant", 4, "float16", 64, EACH),
            Job(arch, "dequant", 8, "bfloat16", 32, SAME), Job(arch, "reduce"), Job(arch, "arrange"),
            Job(arch, "gptq", 4, run=64, zero=EACH), Job(arch, "gptq", 4, run=0, zero=SAME)]


def every(arch: int) -> list[Job]:
    """All jobs for one architecture."""
    formats = [(*variant, zero) for variant in VARIANTS for zero in (SAME, EACH)]
    found = [*usual(arch), *decode(arch), *(job for format_ in formats for job in _one_split(arch, *format_)),
             *(job for problem, plan in tuned_plans(arch).items() for job in _tuned(arch, problem, plan)),
             *(Job(arch, "dequant", *format_) for format_ in formats), Job(arch, "reduce"), Job(arch, "arrange"),
             *(Job(arch, "gptq", 4, run=group, zero=zero) for group in (32, 64, 128, 0) for zero in (SAME, EACH))]
    return list(dict.fromkeys(found))


JOBS = {"usual": usual, "covering": covering, "all": every, "decode": decode, "decode-usual": decode_usual}


def _one_split(arch: int, bits: int, dtype: str, run: int, zero: str) -> list[Job]:
    """Jobs of a format; of configurations that differ in their split of K only, the one with the larger split."""
    whole = {(kernel, config._replace(SPLIT_K=1)): config
             for kernel, config in sorted(configs(arch, bits, dtype, run))}
    return [Job(arch, kernel, bits, dtype, run, zero, config) for (kernel, _), config in whole.items()]


def _few_rows(arch: int, bits: int = 4, dtype: str = "float16", run: int = 128, zero: str = SAME) -> list[Job]:
    return [job for job in _one_split(arch, bits, dtype, run, zero) if job.kernel == "skinny"]


def _tuned(arch: int, problem: MatmulProblem, plan: LaunchPlan) -> Iterator[Job]:
    if plan.config is not None:
        config = split_in_two(plan.config)
        yield from (Job(arch, plan.kernel, problem.bits, problem.dtype, problem.run, zero, config)
                    for zero in (SAME, EACH))
