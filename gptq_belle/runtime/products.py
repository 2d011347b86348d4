"""Products with a weight, as decoders call them: packed, dense, or several side by side."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gptq_belle.kernels.cpu_layout import CpuWeight
from gptq_belle.kernels.dispatch import PreparedWeight, bind

ROWS_ALONE = 64


class Packed:
    """x (..., K) to (..., N) through a packed weight, plus its bias and, where there is one, `plus` (..., N)."""

    def __init__(self, weight: PreparedWeight, bias: Tensor | None) -> None:
        self.weight, self._product = weight, bind(weight, bias)
        self.native = isinstance(weight, CpuWeight)

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        return self._product(x, plus)


@dataclass(slots=True)
class Dense:
    """x (M, K) to (M, N) through a weight (N, K).

    On a CPU up to ROWS_ALONE rows are multiplied one by one: a BLAS rounds by the number of rows, and a row of a batch
    must come out as it does alone. That reads the weight for each of them; packed weights need no such thing.
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        if x.is_cpu and 1 < len(x) <= ROWS_ALONE:
            y = torch.cat([F.linear(row, self.weight, self.bias) for row in x.split(1)])
        else:
            y = F.linear(x, self.weight, self.bias)
        return y if plus is None else y.add_(plus)


@dataclass(slots=True)
class SideBySide:
    """Several products of the same x, their outputs one after another."""

    parts: list[Packed | Dense]

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        y = torch.cat([part(x) for part in self.parts], -1)
        return y if plus is None else y.add_(plus)


Product = Packed | Dense | SideBySide
