"""Every Triton kernel in every config that is planned or tuned, compiled for GPUs that are not here, held to limits.

    python benchmarks/aot.py                    # all parts, everything: an hour on two cores
    python benchmarks/aot.py --archs 86 90      # some parts
    python benchmarks/aot.py --usual            # what most checkpoints are: 4 bits, float16, one zero point

Writes benchmarks/results/triton_aot.json: a table for each version of Triton and part, of which only those that were
compiled are replaced. A split of K is compiled as a split in two, which differs from the others in one constant.
"""

import argparse
import datetime
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import machine_code
import records
import triton
from machine_code import MachineCode

from gptq_belle.kernels import triton_gptq
from gptq_belle.kernels.triton_config import BUCKETS, REGISTERS, SHARED, Case, Config, Plan, rule, table
from gptq_belle.kernels.triton_dequant import dequant_kernel
from gptq_belle.kernels.triton_gemm import gemm_kernel
from gptq_belle.kernels.triton_layout import block_inputs
from gptq_belle.kernels.triton_reduce import arrange_kernel, reduce_kernel
from gptq_belle.kernels.triton_skinny import skinny_kernel

PROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 120: 170}  # multiprocessors of A100, 3090, 4090, H100, 5090
SHAPES = [(4096, 4096), (4096, 12288), (4096, 16384), (16384, 4096), (4096, 11008), (11008, 4096), (5120, 5120),
          (5120, 13824), (13824, 5120)]  # inputs, outputs: BELLE-7B, LLaMA-7B and 13B
DTYPES = {"float16": "fp16", "bfloat16": "bf16"}
RUNS = (128, 64, 32)
SAME, EACH = "one", "each"  # zero point
VARIANTS = list(itertools.product((4, 8), DTYPES, RUNS))
COLUMNS = ("sm", "kernel", "bits", "dtype", "run", "zero", "tile", "split", "warps", "stages", "registers", "spilled",
           "shared", "loop", "per_weight", "matrix", "LDGSTS.128", "LOP3", "I2F")
# Instructions of the main loop for each weight and thread, at most: 4 bits, float16, one zero point, runs of 128.
SKINNY_LIMITS = {8: 2.6, 16: 2.9, 32: 3.3, 64: 4.5}
HOPPER_LIMITS = {8: 3.3, 16: 3.4, 32: 3.5, 64: 3.9}
LIMITS = {80: SKINNY_LIMITS, 86: SKINNY_LIMITS, 89: SKINNY_LIMITS, 90: HOPPER_LIMITS}


class Job(NamedTuple):
    """One kernel with all its constants, for one part; the fields that a kernel knows nothing of are None."""

    arch: int
    kernel: str  # a key of KERNELS
    bits: int | None = None
    dtype: str | None = None
    run: int | None = None
    zero: str | None = None
    config: Config | None = None


class Kernel(NamedTuple):
    """How a kernel is compiled: the function, and for a job the types of its arguments and its constants."""

    function: Any
    types: Callable[[Job], dict[str, str]]
    constants: Callable[[Job], dict[str, Any]]
    options: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}


def _weight(job: Job) -> dict[str, Any]:
    bits, run = job.bits or 4, job.run or 128
    return {"BITS": bits, "RUN": run, "BLOCK": block_inputs(bits, run),
            "ZERO": 2 ** (bits - 1) if job.zero == SAME else -1, "ASM": True}


def _tile(job: Job) -> dict[str, Any]:
    assert job.config is not None
    return _weight(job) | {"HAS_BIAS": False, "BM": job.config.BM, "BN": job.config.BN, "BK": inputs_of_step(job),
                           "SPLIT_K": job.config.SPLIT_K}


def inputs_of_step(job: Job) -> int:
    """BK as the launcher takes it: at most a block of the layout, at least half of it."""
    assert job.config is not None
    block = _weight(job)["BLOCK"]
    return max(min(job.config.BK, block), block // 2)


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
    "skinny": Kernel(skinny_kernel, _product, _tile),
    "gemm": Kernel(gemm_kernel, _product, lambda job: _tile(job) | {"SWIZZLE": 8}),
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


def configs(arch: int) -> set[tuple[str, Config]]:
    """The kernels and configs that the rule takes on a part, over all shapes and numbers of rows."""
    plans = {rule(Case(rows, outputs, inputs, 4, 128, "float16"), arch, PROCESSORS[arch])
             for rows in BUCKETS for inputs, outputs in SHAPES}
    return {(plan.kernel, split_in_two(plan.config)) for plan in plans if plan.config is not None}


def split_in_two(config: Config) -> Config:
    """The same config with the split that stands for all of them."""
    return config._replace(SPLIT_K=min(config.SPLIT_K, 2))


def usual(arch: int) -> list[Job]:
    """The jobs of 4 bits in float16 with one zero point, which is what most checkpoints are, and the solver's."""
    return [*(Job(arch, kernel, 4, "float16", 128, SAME, config) for kernel, config in sorted(configs(arch))),
            Job(arch, "dequant", 4, "float16", 128, SAME), Job(arch, "gptq", 4, run=128, zero=SAME),
            Job(arch, "descent", 4)]


def jobs(arch: int) -> Iterator[Job]:
    """Everything that is compiled for a part."""
    yield from usual(arch)
    whole = {(kernel, config._replace(SPLIT_K=1)): config for kernel, config in sorted(configs(arch))}
    for (kernel, _), config in whole.items():
        for bits, dtype, run in VARIANTS:
            yield from (Job(arch, kernel, bits, dtype, run, zero, config) for zero in (SAME, EACH))
    for case, plan in table(arch).items():
        yield from _tuned(arch, case, plan)
    for bits, dtype, run in VARIANTS:
        yield from (Job(arch, "dequant", bits, dtype, run, zero) for zero in (SAME, EACH))
    yield Job(arch, "reduce")
    yield Job(arch, "arrange")
    for group in (32, 64, 128, 0):
        yield from (Job(arch, "gptq", 4, run=group, zero=zero) for zero in (SAME, EACH))


def _tuned(arch: int, case: Case, plan: Plan) -> Iterator[Job]:
    if plan.config is not None:
        config = split_in_two(plan.config)
        yield from (Job(arch, plan.kernel, case.bits, case.dtype, case.run, zero, config) for zero in (SAME, EACH))


def compiled(job: Job) -> MachineCode:
    """Compile a job; raises what Triton and ptxas raise."""
    kernel = KERNELS[job.kernel]
    options = dict(kernel.options)
    if job.config is not None:
        options |= {"num_warps": job.config.num_warps, "num_stages": job.config.num_stages}
    if job.kernel == "skinny" and job.config is not None:
        options["maxnreg"] = REGISTERS.get(job.config.BM)
    return machine_code.compile_kernel(kernel.function, kernel.types(job), kernel.constants(job), job.arch, options)


def per_weight(job: Job, code: MachineCode) -> float | None:
    """Instructions of the main loop for each weight that a thread meets; None where the kernel has no such loop."""
    if job.config is None or not code.products:
        return None
    turns = code.products / (job.config.BM * job.config.BN * inputs_of_step(job))
    weights = job.config.BN * inputs_of_step(job) / (machine_code.WARP * job.config.num_warps)
    return sum(code.loop.values()) / (turns * weights)


def problems(job: Job, code: MachineCode) -> list[str]:
    """Which limits a kernel breaks."""
    found = []
    if code.stack or code.local:
        found.append(f"registers spill: {code.stack} bytes of stack, {code.local} local")
    if code.shared > SHARED[job.arch] * 1024:
        found.append(f"{code.shared} bytes shared, a program has {SHARED[job.arch]} KiB")
    if job.config is None:
        return found
    if not code.products:
        return [*found, "no matrix instructions in a loop"]
    if not code.loop["LDGSTS.128"]:
        found.append("no asynchronous copies of 16 bytes")
    if converted := sum(count for kind, count in code.loop.items() if kind.startswith("I2F")):
        found.append(f"{converted} conversions from integers")
    limit = LIMITS.get(job.arch, {}).get(job.config.BM)
    plain = (job.kernel, job.bits, job.dtype, job.run, job.zero) == ("skinny", 4, "float16", 128, SAME)
    share = per_weight(job, code)
    if plain and limit and share and share > limit:
        found.append(f"{share:.2f} instructions a weight, not {limit}")
    return found


def row(job: Job, code: MachineCode) -> str:
    """A line of the record, in the order of COLUMNS."""
    config, share = job.config, per_weight(job, code)
    tile = f"{config.BM}x{config.BN}x{inputs_of_step(job)}" if config else None
    loop = code.loop
    values = (job.arch, job.kernel, job.bits, job.dtype, job.run, job.zero, tile,
              config and ("yes" if config.SPLIT_K > 1 else "no"), config and config.num_warps,
              config and config.num_stages, code.registers, code.stack + code.local, code.shared,
              sum(loop.values()) or None, None if share is None else f"{share:.2f}",
              loop["HMMA"] + loop["HGMMA"], loop["LDGSTS.128"], loop["LOP3"], loop["I2F"] + loop["I2FP"])
    return " ".join("-" if value is None else str(value) for value in values)


def check(arch: int, every: bool) -> dict[str, Any]:
    """Compile for a part: what broke a limit, and the rows of the record."""
    rows, broken = [], []
    for job in dict.fromkeys(jobs(arch) if every else usual(arch)):
        try:
            code = compiled(job)
        except Exception as error:  # of any of the compiler's stages: told beside the others, not instead of them
            broken.append(f"{job}: {type(error).__name__}: {error}")
            continue
        rows.append(row(job, code))
        broken += [f"{job}: {problem}" for problem in problems(job, code)]
        print(rows[-1], flush=True)
    print(*broken, sep="\n")
    return {"date": datetime.date.today().isoformat(), "everything": every, "broken": broken, "rows": rows}


def main() -> None:
    """The command line; exit code 1 where a limit is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--archs", nargs="+", type=int, choices=PROCESSORS, default=list(PROCESSORS))
    parser.add_argument("--usual", action="store_true", help="only what most checkpoints are")
    args = parser.parse_args()
    path = records.RESULTS / "triton_aot.json"
    tables = json.loads(path.read_text(encoding="utf-8"))["tables"] if path.is_file() else {}
    mine = tables.setdefault(triton.__version__, {})
    broken = False
    for arch in args.archs:
        mine[f"sm_{arch}"] = found = check(arch, not args.usual)
        broken = broken or bool(found["broken"])
        records.write("triton_aot", {"columns": " ".join(COLUMNS), "tables": tables})
    sys.exit(broken)


if __name__ == "__main__":
    main()
