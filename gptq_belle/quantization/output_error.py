"""How much of a layer's output a quantized weight loses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_belle.formats.gptq_weight import ROWS_AT_A_TIME, QuantizedWeight, dequantize

COLUMNS_AT_A_TIME = 512


def output_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor | None) -> float:
    """tr(D H D^T) / tr(W H W^T), D = W - Q; H = I where there is none. Summed over some rows at a time."""
    if hessian is not None:
        hessian = hessian.to(weight.dtype)
    whole = lost = 0.0
    for start in range(0, weight.shape[0], ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        lost += _energy(weight[part] - dequantize(_some_rows(quantized, part)), hessian)
        whole += _energy(weight[part], hessian)
    return max(0.0, lost) / whole if whole > 0 else 0.0


def held_out_error(quantized: QuantizedWeight, weight: Tensor, held: Sequence[tuple[Tensor, Tensor]]) -> float:
    """||Q X - W F||^2 / ||W F||^2: how far a layer's outputs are from the full-precision model's.

    Args:
        quantized: Q (N, K).
        weight: W (N, K).
        held: the layer's inputs X (tokens, K) in the quantized model and F (tokens, K) in the full-precision one.
    """
    whole = lost = 0.0
    for start in range(0, weight.shape[0], ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        rows = dequantize(_some_rows(quantized, part))
        for x, full in held:
            wanted = full @ weight[part].t()
            lost += float(torch.sum((x @ rows.t()).sub_(wanted).square_(), dtype=torch.float64))
            whole += float(torch.sum(wanted.square_(), dtype=torch.float64))
    return lost / whole if whole > 0 else 0.0


def _some_rows(quantized: QuantizedWeight, part: slice) -> QuantizedWeight:
    codes, scales, zeros = (tensor[part] for tensor in quantized[:3])
    return QuantizedWeight(codes, scales, zeros, quantized.g_idx)


def _energy(matrix: Tensor, hessian: Tensor | None) -> float:
    """tr(M H M^T), of whose two equal triangles one is computed."""
    if hessian is None:
        return float(torch.sum(matrix * matrix, dtype=torch.float64))
    total, K = 0.0, matrix.shape[1]
    for k1 in range(0, K, COLUMNS_AT_A_TIME):
        k2 = min(k1 + COLUMNS_AT_A_TIME, K)
        image = (matrix[:, k1:k2] @ hessian[k1:k2, k1:]).mul_(matrix[:, k1:])
        total += 2 * float(image.sum(dtype=torch.float64)) - float(image[:, : k2 - k1].sum(dtype=torch.float64))
    return total
