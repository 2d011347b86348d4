"""The fallback on CUDA: the weight is expanded some outputs at a time, and cuBLAS multiplies each part.

It serves activations in float32, GPUs below compute capability 7.5, bfloat16 below 8.0, and machines without Triton or
a C compiler.
"""

import torch
from torch import Tensor

from . import reference
from .layout import CanonicalWeight

SCRATCH = 64 << 20  # bytes of the largest tensor that an expansion allocates
OUTPUTS = 32  # parts begin at multiples of this, where the words of zero points begin for any number of bits


def quant_matmul(x: Tensor, weight: CanonicalWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times the weight (K, N), plus bias (N,), in x's dtype; the weight is rounded once to that dtype."""
    rows = x.reshape(-1, weight.in_features)
    y = rows.new_empty(rows.shape[0], weight.out_features)
    step = outputs_at_a_time(weight, x.dtype)
    for start in range(0, weight.out_features, step):
        stop = min(start + step, weight.out_features)
        part = reference.dequantize(outputs_of(weight, start, stop), x.dtype)
        if bias is None:
            torch.mm(rows, part, out=y[:, start:stop])
        else:
            torch.addmm(bias[start:stop].to(x.dtype), rows, part, out=y[:, start:stop])
    return y.view(*x.shape[:-1], weight.out_features)


def outputs_at_a_time(weight: CanonicalWeight, dtype: torch.dtype) -> int:
    """How many outputs are expanded at a time so that no temporary tensor takes more than SCRATCH bytes."""
    # Codes are int32 before they are converted to dtype; those of 3 bits, which cross words, are int64.
    bytes_per_code = max(dtype.itemsize, 4 if 32 % weight.bits == 0 else 8)
    return max(OUTPUTS, SCRATCH // (weight.in_features * bytes_per_code) // OUTPUTS * OUTPUTS)


def outputs_of(weight: CanonicalWeight, start: int, stop: int) -> CanonicalWeight:
    """Outputs start..stop of a weight, as views; start is a multiple of OUTPUTS."""
    return weight._replace(qweight=weight.qweight[:, start:stop], scales=weight.scales[:, start:stop],
                           qzeros=weight.qzeros[:, start * weight.bits // 32 : stop * weight.bits // 32])
