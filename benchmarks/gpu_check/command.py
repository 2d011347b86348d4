"""Everything that a machine with a GPU has to show, in four calls of less than ten minutes each.

    benchmarks/gpu_check.sh probe  [--out FOLDER]   # the machine; compiles all kernels, checks every one of them
    benchmarks/gpu_check.sh matmul [--out FOLDER]   # speed next to cuBLAS, torch's int4, gemlite and GPTQModel; solver
    benchmarks/gpu_check.sh tuning [--out FOLDER]   # tiles for 8 to 64 rows and nine shapes
    benchmarks/gpu_check.sh models [--out FOLDER]   # demo models, and BELLE-7B's shape with random weights

Each writes FOLDER/PART.json and ends with exit code 0 only if everything that it planned was done. Otherwise it prints
what failed and what the time limit left out, and ends with 1; with 3 where there is no GPU that the kernels support.
Nothing is downloaded. With --toy, all of it runs at toy sizes on a CPU in Triton's interpreter.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from gpu_check import cache_pack
from gpu_check.child import CallFailed, child
from gpu_check.compilation import compilers
from gpu_check.parts import CACHE, PARTS, Run
from gpu_check.plan import Deadline
from gpu_check.setting import ROOT, describe, prepare, restricted, setting_of, unsupported

BUDGET = 560.0  # seconds, of calls that may take 600
START = 120.0  # seconds in which a process has to import torch and to find the device


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-check")),
                        help="folder of the results (default: $OUT, or gpu-check)")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"time limit in seconds (default: {BUDGET:.0f})")
    parser.add_argument("--cache", type=Path,
                        help="kernels compiled in advance (default: OUT/triton-cache.zip and build/triton-cache.zip)")
    parser.add_argument("--toy", action="store_true", help="toy sizes on a CPU, in Triton's interpreter")
    args = parser.parse_args()
    if args.cache is not None and not args.cache.is_file():
        parser.error(f"{args.cache} does not exist")
    deadline, setting, cache = Deadline(args.budget), setting_of(args.toy), Path(os.environ["TRITON_CACHE_DIR"])
    for packed in [args.cache] if args.cache else [args.out / CACHE, ROOT / "build" / CACHE]:
        if packed.is_file():
            print(f"{cache_pack.unpack(packed, cache)} kernels from {packed}", flush=True)
    with child(partial(prepare, setting)) as gpu:
        try:
            if reason := gpu.call(partial(unsupported, setting), START):
                print(f"A GPU that the Triton kernels support is required: {reason}.", file=sys.stderr)
                return 3
            head = gpu.call(partial(describe, setting), START)
        except CallFailed as error:
            print(f"The device cannot be used: {error}", file=sys.stderr)
            return 1
        setting = restricted(setting, head["arch"])
        with compilers(head["arch"], head["processors"], not args.toy, setting.sizes.every) as compiling:
            run = Run(args.part, setting, head | {"budget": args.budget}, gpu, compiling, deadline, args.out, cache)
            try:
                PARTS[args.part](run)
            finally:
                run.save()
    report = run.record.report()
    print(report or f"{args.part}: everything that was planned is done", flush=True)
    return 0 if run.record.complete else 1
