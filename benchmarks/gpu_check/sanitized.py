"""Six products that run every kind of kernel once, for compute-sanitizer: `python -m gpu_check.sanitized`."""

import torch

from gptq_belle.kernels.triton_config import LaunchPlan, MatmulProblem, TileConfig
from gpu_check.weights import product_case

SKINNY, GEMM = TileConfig(8, 64, 128, 1, 2, 4), TileConfig(64, 64, 128, 2, 8, 3)
PROBLEM = MatmulProblem(5, 352, 1024, 4, 128, "float16")


def main() -> None:
    """Run them on the first GPU."""
    device = torch.device("cuda", 0)
    for case in (product_case(PROBLEM, LaunchPlan("skinny", SKINNY)),
                 product_case(PROBLEM, LaunchPlan("skinny", SKINNY._replace(SPLIT_K=8)), bias=True),
                 product_case(PROBLEM._replace(bits=8, run=32), zero=-1),
                 product_case(PROBLEM._replace(rows=70), LaunchPlan("gemm", GEMM), ordered=False),
                 product_case(PROBLEM._replace(rows=70), LaunchPlan("expand", None), bias=True),
                 product_case(PROBLEM._replace(rows=33, dtype="bfloat16"))):
        case(device)
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
