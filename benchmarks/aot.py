"""Compile the jobs of aot_sets.py ahead of time and check registers, shared memory and instructions against limits.

    python benchmarks/aot.py                              # all architectures, all jobs: an hour on two cores
    python benchmarks/aot.py --archs 86 90 --jobs usual   # some architectures, the formats of most checkpoints
    python benchmarks/aot.py --jobs decode                # the kernels of a decode step, with what is folded into them
    python benchmarks/aot.py --jobs usual --triton 3.5.1 3.6.0 --environments FOLDER

With --triton, it runs once for each of these versions, in environments that are installed in FOLDER where they are
missing. Writes benchmarks/results/triton_aot.json, with --jobs decode or decode-usual triton_decode.json: one table per
Triton version and architecture. Tables that were not compiled again are kept.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import machine_code
import records
import triton
from aot_jobs import PROCESSORS, SAME, Job, compiled, inputs_of_step, turn
from aot_sets import JOBS, plain_product
from machine_code import MachineCode

from gptq_belle.kernels.triton_config import REGISTERS, SHARED_MEMORY_KIB, TENSOR_CORES, TileConfig

COLUMNS = ("sm", "kernel", "bits", "dtype", "run", "zero", "tile", "split", "warps", "stages", "registers", "spilled",
           "shared", "loop", "per_weight", "matrix", "LDGSTS.128", "LOP3", "I2F", "of_plain")
VERSIONS = ("3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")  # of torch 2.9, 2.10 and 2.11, 2.12, 2.14, and later
# Largest allowed number of main-loop instructions per weight and thread: 4 bits, float16, one zero point, runs of 128.
LIMITS = {8: 2.0, 16: 2.3, 32: 2.8, 64: 4.4}  # by rows of a tile
SHARED_K_LIMIT = 2.12  # where warps share K (8 rows): at most 1.93 with 3.5.1 and 3.6, 2.11 with 3.7.1, 2.07 with 3.9
LONGER = {"3.8": 1.1}  # versions of Triton whose code is longer everywhere
LIMITED = (80, 86, 89, 90)
FOLDED_LIMIT = 1.1  # times the instructions of the product that has nothing folded into it
MOST_REGISTERS = 168  # with 33 to 64 rows: three programs per multiprocessor


def per_weight(job: Job, code: MachineCode) -> float | None:
    """Main-loop instructions per weight, or number of the KV cache, of a thread; None without such a loop."""
    own = turn(job)
    return None if own is None else code.per_number(own)


def of_plain(job: Job, code: MachineCode) -> float | None:
    """The same divided by that of the product with nothing folded into it; None for other kernels."""
    plain, share = plain_product(job), per_weight(job, code)
    whole = None if plain is None else per_weight(plain, compiled(plain))
    return None if share is None or whole is None else share / whole


def problems(job: Job, code: MachineCode) -> list[str]:
    """List the limits that a kernel exceeds."""
    found = []
    if code.stack or code.local:
        found.append(f"registers spill: {code.stack} bytes of stack, {code.local} local")
    if code.unordered_tickets:
        found.append(f"{code.unordered_tickets} tickets without the barriers around them")
    if code.shared > SHARED_MEMORY_KIB[job.arch] * 1024:
        found.append(f"{code.shared} bytes of shared memory, the limit is {SHARED_MEMORY_KIB[job.arch]} KiB")
    if job.config is not None and code.registers * machine_code.WARP * job.config.num_warps > REGISTERS:
        found.append(f"{code.registers} registers of {job.config.num_warps} warps, a multiprocessor has {REGISTERS}")
    if (share := of_plain(job, code)) is not None and share > FOLDED_LIMIT:
        found.append(f"{share:.2f} times the instructions of the plain product, the limit is {FOLDED_LIMIT}")
    if job.kernel.startswith(("attention", "head")) and not code.loop["LDGSTS.128"]:
        found.append("no asynchronous 16-byte copies")
    if job.config is None or job.arch < TENSOR_CORES:
        return found
    if not code.matrix_instructions:
        return [*found, "no matrix instructions in a loop"]
    if not code.loop["LDGSTS.128"]:
        found.append("no asynchronous 16-byte copies")
    if code.products and (converted := sum(count for kind, count in code.loop.items() if kind.startswith("I2F"))):
        found.append(f"{converted} integer-to-float conversions")
    if job.config.BM == 64 and job.kernel == "skinny" and code.registers > MOST_REGISTERS:
        found.append(f"{code.registers} registers, the limit is {MOST_REGISTERS}")
    limit = instruction_limit(job.config) if job.arch in LIMITED else None
    plain = (job.kernel, job.bits, job.dtype, job.run, job.zero, job.epilogue) == (
        "skinny", 4, "float16", 128, SAME, None)
    share = per_weight(job, code)
    if plain and limit and share and share > limit:
        found.append(f"{share:.2f} instructions per weight, the limit is {limit}")
    return found


def instruction_limit(config: TileConfig) -> float | None:
    """The largest allowed number of instructions per weight of a tile with this version of Triton."""
    limit = LIMITS.get(config.BM) if config.K_WARPS == 1 else SHARED_K_LIMIT
    minor_version = ".".join(triton.__version__.split(".")[:2])
    return None if limit is None else limit * LONGER.get(minor_version, 1.0)


def row(job: Job, code: MachineCode) -> str:
    """One line of the record, in the order of COLUMNS."""
    config, share, folded = job.config, per_weight(job, code), of_plain(job, code)
    tile = f"{config.BM}x{config.BN}x{inputs_of_step(job)}" if config else None
    loop = code.loop
    kernel = job.kernel if job.epilogue is None else f"{job.kernel}+{job.epilogue}"
    values = (job.arch, kernel, job.bits, job.dtype, job.run, job.zero, tile,
              config and ("yes" if config.SPLIT_K > 1 else "no"), config and config.num_warps,
              config and config.num_stages, code.registers, code.stack + code.local, code.shared,
              sum(loop.values()) or None, None if share is None else f"{share:.2f}",
              code.matrix_instructions, loop["LDGSTS.128"], loop["LOP3"], loop["I2F"] + loop["I2FP"],
              None if folded is None else f"{folded:.2f}")
    return " ".join("-" if value is None else str(value) for value in values)


def check(arch: int, kind: str) -> dict[str, Any]:
    """Compile the jobs of one of JOBS for an architecture; return the exceeded limits and the rows of the record."""
    rows, broken = [], []
    for job in JOBS[kind](arch):
        try:
            code = compiled(job)
        except Exception as error:  # from any compiler stage: reported together with the others
            broken.append(f"{job}: {type(error).__name__}: {error}")
            continue
        rows.append(row(job, code))
        broken += [f"{job}: {problem}" for problem in problems(job, code)]
        print(rows[-1], flush=True)
    print(*broken, sep="\n")
    return {"date": datetime.date.today().isoformat(), "jobs": kind, "broken": broken, "rows": rows}


def environment(version: str, folder: Path) -> dict[str, str]:
    """Environment variables with which Python imports a version of Triton, installed in a folder if it is missing."""
    target = folder / version
    if not target.is_dir():
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target,
                        f"triton=={version}"], check=True)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])}


def run_versions(args: argparse.Namespace) -> bool:
    """Run this program with each version of Triton; return whether any run exceeded a limit."""
    command = [sys.executable, __file__, "--jobs", args.jobs, "--archs", *map(str, args.archs)]
    if args.out.parent != records.RESULTS:
        command += ["--out", args.out]  # which the record shows
    codes = [subprocess.run(command, env=environment(version, args.environments)).returncode for version in args.triton]
    return any(codes)


def compile_here(args: argparse.Namespace) -> bool:
    """Compile with the installed version of Triton and update the record; return whether a limit was exceeded."""
    tables = json.loads(args.out.read_text(encoding="utf-8"))["tables"] if args.out.is_file() else {}
    mine = tables.setdefault(triton.__version__, {})
    broken = False
    for arch in filter(JOBS[args.jobs], args.archs):
        mine[f"sm_{arch}"] = found = check(arch, args.jobs)
        broken = broken or bool(found["broken"])
        records.write(args.out.stem, {"columns": " ".join(COLUMNS), "tables": tables}, args.out.parent)
    return broken


def main() -> None:
    """Run the command line; exit with code 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--archs", nargs="+", type=int, choices=PROCESSORS, default=list(PROCESSORS))
    parser.add_argument("--jobs", choices=JOBS, default="all", help="which formats to compile (default: all)")
    parser.add_argument("--triton", nargs="+", help=f"versions of Triton to compile with, such as {' '.join(VERSIONS)}")
    parser.add_argument("--environments", type=Path, default=Path("build/triton"), help="folder of their installations")
    parser.add_argument("--out", type=Path, help="the record to update")
    args = parser.parse_args()
    if args.out is None:
        args.out = records.RESULTS / f"triton_{'decode' if args.jobs.startswith('decode') else 'aot'}.json"
    sys.exit(run_versions(args) if args.triton else compile_here(args))


if __name__ == "__main__":
    main()
