"""Tune the kernels for the layers of BELLE-7B, LLaMA-7B and 13B on this GPU with random 4-bit weights.

    python benchmarks/tune_cuda.py --budget 70 --out FOLDER

Small numbers of rows come first, because they determine the decode speed. Writes FOLDER/sm_NN.json as `gptq-belle tune`
does; set GPTQ_BELLE_TUNING to the folder, or move the file to kernels/tuning.
"""

import argparse
import itertools
from pathlib import Path

import torch
from cuda_common import SHAPES, Deadline, random_weight, require_device

from gptq_belle.bench.kernel_tuning import describe_problem, device_timer, tune, write_table
from gptq_belle.kernels import triton_matmul
from gptq_belle.kernels.triton_config import ROW_BUCKETS


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=1800,
                        help="time limit in seconds; no new problem is started after it")
    parser.add_argument("--rows", nargs="+", type=int, choices=ROW_BUCKETS, default=ROW_BUCKETS)
    parser.add_argument("--out", type=Path, default=Path("cuda-results"), help="folder of the tuning table")
    args = parser.parse_args()
    device, deadline = require_device(), Deadline(args.budget)
    arch, processors = triton_matmul.device_properties(device)
    results = []
    for rows, (inputs, outputs) in itertools.product(args.rows, dict.fromkeys(itertools.chain(*SHAPES.values()))):
        if deadline.over():
            break
        weight = random_weight(inputs, outputs, 4, device)
        problem = triton_matmul.problem_of(weight, rows, torch.float16)
        found = tune(problem, arch, processors, device_timer(problem, [weight]))
        results.append(found)
        print(f"{describe_problem(problem)}: {1e6 * found.seconds:.1f} us, "
              f"{found.rule_seconds / found.seconds:.2f} times the rule's speed, {found.tried} tried: "
              f"{found.plan}", flush=True)
        write_table(results, arch, torch.cuda.get_device_name(device), args.out)
    print(f"{len(results)} problems tuned")


if __name__ == "__main__":
    main()
