"""Compile the jobs of aot_jobs.py ahead of time and check registers, shared memory and instructions against limits.

    python benchmarks/aot.py                    # all architectures, all variants: an hour on two cores
    python benchmarks/aot.py --archs 86 90      # some architectures
    python benchmarks/aot.py --usual            # most checkpoints: 4 bits, float16, one zero point

Writes benchmarks/results/triton_aot.json: one table per Triton version and architecture. Tables of architectures that
were not compiled are kept.
"""

import argparse
import datetime
import json
import sys
from typing import Any

import machine_code
import records
import triton
from aot_jobs import PROCESSORS, SAME, Job, compiled, inputs_of_step, jobs, usual
from machine_code import MachineCode

from gptq_belle.kernels.triton_config import SHARED_MEMORY_KIB

COLUMNS = ("sm", "kernel", "bits", "dtype", "run", "zero", "tile", "split", "warps", "stages", "registers", "spilled",
           "shared", "loop", "per_weight", "matrix", "LDGSTS.128", "LOP3", "I2F")
# Largest allowed number of main-loop instructions per weight and thread: 4 bits, float16, one zero point, runs of 128.
SKINNY_LIMITS = {8: 2.6, 16: 2.9, 32: 3.3, 64: 4.5}
HOPPER_LIMITS = {8: 3.3, 16: 3.4, 32: 3.5, 64: 3.9}
LIMITS = {80: SKINNY_LIMITS, 86: SKINNY_LIMITS, 89: SKINNY_LIMITS, 90: HOPPER_LIMITS}


def per_weight(job: Job, code: MachineCode) -> float | None:
    """Main-loop instructions per weight that a thread processes; None if the kernel has no main loop."""
    if job.config is None or not code.products:
        return None
    turns = code.products / (job.config.BM * job.config.BN * inputs_of_step(job))
    weights = job.config.BN * inputs_of_step(job) / (machine_code.WARP * job.config.num_warps)
    return sum(code.loop.values()) / (turns * weights)


def problems(job: Job, code: MachineCode) -> list[str]:
    """List the limits that a kernel exceeds."""
    found = []
    if code.stack or code.local:
        found.append(f"registers spill: {code.stack} bytes of stack, {code.local} local")
    if code.shared > SHARED_MEMORY_KIB[job.arch] * 1024:
        found.append(f"{code.shared} bytes of shared memory, the limit is {SHARED_MEMORY_KIB[job.arch]} KiB")
    if job.config is None:
        return found
    if not code.products:
        return [*found, "no matrix instructions in a loop"]
    if not code.loop["LDGSTS.128"]:
        found.append("no asynchronous 16-byte copies")
    if converted := sum(count for kind, count in code.loop.items() if kind.startswith("I2F")):
        found.append(f"{converted} integer-to-float conversions")
    limit = LIMITS.get(job.arch, {}).get(job.config.BM)
    plain = (job.kernel, job.bits, job.dtype, job.run, job.zero) == ("skinny", 4, "float16", 128, SAME)
    share = per_weight(job, code)
    if plain and limit and share and share > limit:
        found.append(f"{share:.2f} instructions per weight, the limit is {limit}")
    return found


def row(job: Job, code: MachineCode) -> str:
    """One line of the record, in the order of COLUMNS."""
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
    """Compile for one architecture; return the exceeded limits and the rows of the record."""
    rows, broken = [], []
    for job in dict.fromkeys(jobs(arch) if every else usual(arch)):
        try:
            code = compiled(job)
        except Exception as error:  # from any compiler stage: reported together with the others
            broken.append(f"{job}: {type(error).__name__}: {error}")
            continue
        rows.append(row(job, code))
        broken += [f"{job}: {problem}" for problem in problems(job, code)]
        print(rows[-1], flush=True)
    print(*broken, sep="\n")
    return {"date": datetime.date.today().isoformat(), "everything": every, "broken": broken, "rows": rows}


def main() -> None:
    """Run the command line; exit with code 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--archs", nargs="+", type=int, choices=PROCESSORS, default=list(PROCESSORS))
    parser.add_argument("--usual", action="store_true", help="only the variants of most checkpoints")
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
