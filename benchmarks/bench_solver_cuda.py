"""Compare the GPTQ solver kernel on a GPU with the same steps in torch, on layers of LLaMA-7B.

    python benchmarks/bench_solver_cuda.py --out FOLDER

Both are timed as called from Python, including the products after each block: the time of a layer without the
factorization of its Hessian. Writes cuda_solver.json.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from cuda_common import Deadline, head, require_device, write

from gptq_belle.common.timers import seconds
from gptq_belle.quantization import grid, solver
from gptq_belle.quantization.config import QuantConfig

LAYERS = ((4096, 4096), (11008, 4096), (4096, 11008))  # in_features, out_features
GOAL = 10.0  # minimum speed relative to torch


def solve(inputs: int, outputs: int, config: QuantConfig, by_kernel: bool, device: torch.device) -> Any:
    """Solve random weights with a random factor; return the median seconds and the last solution."""
    generator = torch.Generator(device=device).manual_seed(inputs)
    weight = torch.randn(inputs, outputs, device=device, generator=generator)
    factor = torch.randn(inputs, inputs, device=device, generator=generator).mul_(0.01).triu_()
    factor.diagonal().add_(1.0)
    taken = grid.fused_kernels
    if not by_kernel:
        grid.fused_kernels = lambda tensor: None
    try:
        found = []
        group = config.group_size
        took = [seconds(lambda: found.append(solver._solve(weight.clone(), factor, group, config)), device)
                for _ in range(3 if by_kernel else 2)]
    finally:
        grid.fused_kernels = taken
    return statistics.median(took[1:]), found[-1]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=120, help="time limit in seconds; no layer is started after it")
    parser.add_argument("--out", type=Path, default=Path("cuda-results"), help="folder of the results")
    args = parser.parse_args()
    device, deadline = require_device(), Deadline(args.budget)
    lines = []
    for inputs, outputs in LAYERS:
        if deadline.over():
            break
        config = QuantConfig(bits=4, group_size=128, sym=False, preset="fast")
        ours, mine = solve(inputs, outputs, config, True, device)
        torchs, theirs = solve(inputs, outputs, config, False, device)
        lines.append({"inputs": inputs, "outputs": outputs, "seconds": ours, "torch_seconds": torchs,
                      "times_torch": torchs / ours, "same_codes": float((mine[0] == theirs[0]).float().mean())})
        print(f"{inputs} x {outputs}: {1e3 * ours:.1f} ms, torch {1e3 * torchs:.1f} ms, {torchs / ours:.1f} times; "
              f"{100 * lines[-1]['same_codes']:.2f} % equal codes", flush=True)
        slowest = min(line["times_torch"] for line in lines)
        write(args.out, "cuda_solver", head(device) | {
            "goals": [{"goal": "speed of the solver in torch", "least": GOAL, "worst": slowest,
                       "reached": slowest >= GOAL}], "results": lines})


if __name__ == "__main__":
    main()
