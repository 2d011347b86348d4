"""The gradient of a product with a packed weight to its activations: grad_y @ W^T, W expanded some inputs at a time.

The codes have no gradient. At most SCRATCH bytes are expanded at a time, by a function for each layout; every part
computes its own columns of the result, so that nothing is rounded twice.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import cpu_layout, reference, triton_matmul
from .cpu_layout import CpuWeight
from .layout import CanonicalWeight, restore_input_order
from .triton_layout import SlicedWeight

# Bytes of expanded weight at a time. 512 rows through 4 bits, 4096 x 11008, on two cores: 288 ms with 16 MiB, 341 with
# 64, 392 with the whole weight; the dense product alone takes 261.
SCRATCH = 16 << 20
INPUT_MULTIPLE = 256  # parts are multiples of this many inputs, at which every layout can be cut


def input_gradient(grad: Tensor, weight: CanonicalWeight | CpuWeight | SlicedWeight) -> Tensor:
    """The gradient (..., K) to the activations of a product, from the gradient (..., N) to its result, in its dtype.

    On a CPU, arithmetic is in float32 (float64 if grad is); on CUDA it is in grad's dtype, by cuBLAS.
    """
    dtype = grad.dtype if grad.is_cuda else torch.promote_types(grad.dtype, torch.float32)
    rows = grad.reshape(-1, weight.out_features).to(dtype)
    padded_inputs, expand = _EXPANSIONS[type(weight)]
    count = padded_inputs(weight)
    step = max(INPUT_MULTIPLE, SCRATCH // (weight.out_features * dtype.itemsize) // INPUT_MULTIPLE * INPUT_MULTIPLE)
    result = rows.new_empty(rows.shape[0], count)
    for begin in range(0, count, step):
        end = min(begin + step, count)
        torch.mm(rows, expand(weight, begin, end, dtype).t(), out=result[:, begin:end])
    order = None if isinstance(weight, CanonicalWeight) else weight.order
    restored = restore_input_order(result, order, weight.in_features)
    return restored.to(grad.dtype).view(*grad.shape[:-1], weight.in_features)


# Each of these returns the weight (end - begin, N) of the layout's inputs begin .. end.


def _expand_canonical(weight: CanonicalWeight, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    words = slice(begin * weight.bits // 32, end * weight.bits // 32)
    part = weight._replace(qweight=weight.qweight[words], g_idx=weight.g_idx[begin:end])
    return reference.dequantize(part, dtype)


def _expand_cpu(weight: CpuWeight, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    runs = slice(begin // weight.run, end // weight.run)
    codes = cpu_layout.unpack_codes(weight.codes[:, runs], weight.bits)
    grouped = codes.view(-1, weight.run, codes.shape[1]).to(dtype)
    zeros: int | Tensor = weight.zero
    if weight.zeros is not None:
        zeros = cpu_layout.merge_blocks(weight.zeros[:, runs]).to(dtype).unsqueeze(1)
    scales = cpu_layout.merge_blocks(weight.scales[:, runs]).to(dtype).unsqueeze(1)
    return grouped.sub_(zeros).mul_(scales).flatten(0, 1)[:, : weight.out_features]


def _expand_sliced(weight: SlicedWeight, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    runs = slice(begin // weight.run, end // weight.run)
    part = weight._replace(words=weight.words[begin // weight.block : end // weight.block], scales=weight.scales[runs],
                           zeros=None if weight.zeros is None else weight.zeros[runs])
    out = torch.empty(weight.words.shape[1], end - begin, dtype=dtype, device=weight.words.device)
    with torch.cuda.device_of(out):
        triton_matmul.dequantize(part, 0, out)
    return out[: weight.out_features].t()


# By layout: the number of its inputs with padding, and how to expand some of them.
_EXPANSIONS: dict[type, tuple[Callable[[Any], int], Callable[[Any, int, int, torch.dtype], Tensor]]] = {
    CanonicalWeight: (lambda weight: weight.in_features, _expand_canonical),
    CpuWeight: (lambda weight: weight.codes.shape[1] * weight.run, _expand_cpu),
    SlicedWeight: (lambda weight: weight.places, _expand_sliced),
}
