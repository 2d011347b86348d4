"""The oracle: the packed format in plain torch, stated apart from the code that writes it. Any device, any dtype."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from .layout import CanonicalWeight


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes (C, J) int32 of a little-endian stream of bits along the first axis of int32 words (C * bits / 32, J)."""
    mask = 2**bits - 1
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device).view(1, -1, 1)
        return (words.unsqueeze(1) >> shifts).bitwise_and_(mask).flatten(0, 1)
    first_bit = torch.arange(words.shape[0] * 32 // bits, device=words.device) * bits
    word, shift = first_bit // 32, (first_bit % 32).unsqueeze(1)
    unsigned = words.long() & 0xFFFFFFFF
    behind = unsigned.roll(-1, 0)  # the last code ends with its word, so what wraps around is masked off
    return ((unsigned[word] | behind[word] << 32) >> shift).bitwise_and_(mask).int()


def dequantize(weight: CanonicalWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight (K, N) that the words stand for.

    In float32 it is exact where scales are float16: 11 bits of a scale times 9 bits of code - zero. In float16 and
    bfloat16 it is rounded once: code - zero is exact, and scales keep their dtype until they are multiplied.
    """
    zeros = unpack(weight.qzeros.t(), weight.bits).t().to(dtype) + weight.zero_offset
    codes = unpack(weight.qweight, weight.bits).to(dtype)
    return codes.sub_(zeros[weight.g_idx]).mul_(weight.scales[weight.g_idx])


def lookup_rows(weight: CanonicalWeight, ids: Tensor) -> Tensor:
    """Rows ids (n,) of the matrix (N, K) whose product this is: (n, K) float32, exact where scales are float16."""
    zeros = unpack(weight.qzeros.t(), weight.bits)[ids].t().float() + weight.zero_offset
    codes = unpack(weight.qweight[:, ids], weight.bits).float()
    return codes.sub_(zeros[weight.g_idx]).mul_(weight.scales[:, ids].float()[weight.g_idx]).t().contiguous()


def quant_matmul(x: Tensor, weight: CanonicalWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times the weight (K, N), plus bias (N,), in x's dtype.

    Arithmetic is in float32 (float64 where x is), and rounded once at the end.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(dtype)
    return linear(x.to(dtype), dequantize(weight, dtype).t(), bias).to(x.dtype)
