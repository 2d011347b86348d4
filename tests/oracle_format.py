"""The formula of the packed format in NumPy and float64, written apart from the code under test."""

import numpy as np
import torch
from torch import Tensor


def codes_along(words: np.ndarray, bits: int) -> np.ndarray:
    """Words (J, R) of 32 bits, each row one little-endian stream: codes (J, R * 32 / bits)."""
    stream = np.unpackbits(np.ascontiguousarray(words).astype("<i4").view(np.uint8), axis=1, bitorder="little")
    return stream.reshape(words.shape[0], -1, bits).astype(np.int64) @ (1 << np.arange(bits))


def formula(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, *, v1: bool,
            group_size: int = -1) -> Tensor:
    """W (N, K) float64: ``scales[g_idx[k], n] * (code(k, n) - zero[g_idx[k], n])``."""
    codes = codes_along(qweight.numpy().T, bits)
    zeros = codes_along(qzeros.numpy(), bits) + (1 if v1 else 0)
    weight = np.empty(codes.shape)
    for k in range(codes.shape[1]):
        group = int(g_idx[k]) if g_idx is not None else 0 if group_size == -1 else k // group_size
        weight[:, k] = scales[group].double().numpy() * (codes[:, k] - zeros[group])
    return torch.from_numpy(weight)


def random_words(bits: int, inputs: int, outputs: int, group_size: int, *,
                 act_order: bool = False) -> dict[str, Tensor]:
    """qweight, qzeros, scales and g_idx of a weight in which every code, stored zero and sign of a scale occurs."""
    g_idx = torch.arange(inputs) // (inputs if group_size == -1 else group_size)
    groups = int(g_idx[-1]) + 1
    return {
        "qweight": torch.randint(-2**31, 2**31, (inputs * bits // 32, outputs)).int(),
        "qzeros": torch.randint(-2**31, 2**31, (groups, outputs * bits // 32)).int(),
        "scales": torch.randn(groups, outputs).mul(0.01).half(),
        "g_idx": (g_idx[torch.randperm(inputs)] if act_order else g_idx).int(),
    }
