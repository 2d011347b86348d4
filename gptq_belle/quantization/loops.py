"""Where the inner loops of quantizing run: in kernels where there are some, else in torch, operation by operation."""

from types import ModuleType

import torch
from torch import Tensor

from gptq_belle.kernels import cpu_solver, triton_matmul


def kernels(tensor: Tensor) -> ModuleType | None:
    """The module whose `solve_block` and `descend` serve such tensors, `BLOCK` inputs at a time; None: torch does."""
    if cpu_solver.serves(tensor):
        return cpu_solver
    if not tensor.is_cuda or tensor.dtype != torch.float32 or triton_matmul.unavailable(tensor.device):
        return None
    from gptq_belle.kernels import triton_gptq

    return triton_gptq
