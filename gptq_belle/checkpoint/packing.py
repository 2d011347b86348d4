"""The GPTQ format: codes <-> int32 words, and the zero point's offset by one.

Shapes: K = in_features, N = out_features, G = groups. Codes form one little-endian stream of bits along K (for
``qweight``) or along N (for ``qzeros``), the lowest index in the lowest bits. 2, 4 and 8 bits never straddle a word;
with 3 bits, 32 codes take 3 words and codes 10 and 21 straddle.

The zero point's story: the first GPTQ kernels computed ``scale * (code - (stored + 1))``, so format "gptq" (v1) holds
zero - 1, and "gptq_v2" holds the zero itself. A true zero of 0 does not exist in v1 (it would be -1, and packers that
did not mask it spoiled the neighbours); a stored 15 means 16 there and is never masked on reading.
"""

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.errors import InputError

V1, V2 = "gptq", "gptq_v2"
ROWS_AT_A_TIME = 256  # bounds what expanding a weight takes beside it


class QuantizedWeight(NamedTuple):
    """What the solver returns: ``W[n, k] = scales[n, g_idx[k]] * (codes[n, k] - zeros[n, g_idx[k]])``."""

    codes: Tensor  # (N, K) uint8
    scales: Tensor  # (N, G) float32 that float16 holds exactly
    zeros: Tensor  # (N, G) int32
    g_idx: Tensor  # (K,) int32, the group of each input


class PackedWeight(NamedTuple):
    """What the disk holds for one linear."""

    qweight: Tensor  # (K * bits / 32, N) int32
    qzeros: Tensor  # (G, N * bits / 32) int32
    scales: Tensor  # (G, N) float16
    g_idx: Tensor  # (K,) int32


def all_finite(tensor: Tensor) -> bool:
    """True where a tensor holds neither NaN nor infinity; unlike isfinite().all(), it takes no memory."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def dequantize(w: QuantizedWeight, out: Tensor | None = None) -> Tensor:
    """The weight (N, K) float32 that the codes stand for, in `out` where it is given; some rows at a time."""
    out = torch.empty(w.codes.shape, dtype=torch.float32, device=w.codes.device) if out is None else out
    groups = w.g_idx.long()
    for rows in torch.arange(w.codes.shape[0], device=w.codes.device).split(ROWS_AT_A_TIME):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        torch.mul(w.codes[part].float().sub_(w.zeros[part][:, groups]), w.scales[part].float()[:, groups],
                  out=out[part])
    return out


def cycle(bits: int) -> tuple[int, int]:
    """(codes, words) after which the pattern of bits in words repeats: (8, 1) for 4 bits, (32, 3) for 3."""
    common = gcd(bits, 32)
    return 32 // common, bits // common


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (C, J), each below 2**bits, along the first axis into int32 words (C * bits / 32, J).

    Raises:
        InputError: C is not a multiple of the codes that fill whole words.
    """
    per_cycle, words_per_cycle = cycle(bits)
    count, columns = codes.shape
    if count % per_cycle:
        raise InputError(f"{count} codes of {bits} bits do not fill whole 32-bit words",
                         f"The layer's size must be a multiple of {per_cycle}; keep this layer in full precision.")
    stream = codes.reshape(count // per_cycle, per_cycle, columns)
    words = torch.zeros(count // per_cycle, words_per_cycle, columns, dtype=torch.int32, device=codes.device)
    for i in range(per_cycle):
        word, shift = divmod(i * bits, 32)
        code = stream[:, i].to(torch.int32)
        words[:, word] |= code << shift
        if shift + bits > 32:
            words[:, word + 1] |= code >> (32 - shift)
    return words.reshape(-1, columns)


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_rows`: int32 words (C * bits / 32, J) to codes (C, J) uint8."""
    per_cycle, words_per_cycle = cycle(bits)
    rows, columns = words.shape
    if rows % words_per_cycle:
        raise InputError(f"{rows} rows of words are not a multiple of {words_per_cycle}, which {bits} bits need",
                         "The file is damaged or its configuration states wrong bits.")
    stream = words.reshape(rows // words_per_cycle, words_per_cycle, columns)
    codes = torch.empty(rows // words_per_cycle, per_cycle, columns, dtype=torch.uint8, device=words.device)
    for i in range(per_cycle):
        word, shift = divmod(i * bits, 32)
        value = stream[:, word] >> shift
        if shift + bits > 32:  # the sign that >> repeats gives way to the next word's bits
            low = 32 - shift
            value = (value & ((1 << low) - 1)) | (stream[:, word + 1] << low)
        codes[:, i] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return codes.reshape(-1, columns)


def stored_zeros(zeros: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """Zero points as their bits are written: minus one in v1, masked to `bits` so that none reaches its neighbour.

    Raises:
        InputError: a zero point that the format cannot hold (0 in v1, 2**bits in v2).
    """
    low, high = (1, 1 << bits) if checkpoint_format == V1 else (0, (1 << bits) - 1)
    if int(zeros.min()) < low or int(zeros.max()) > high:
        raise InputError(f"zero points {int(zeros.min())}..{int(zeros.max())} do not fit format {checkpoint_format}",
                         f"Format {checkpoint_format} with {bits} bits holds {low}..{high}; write asymmetric as {V2}.")
    return zeros - 1 if checkpoint_format == V1 else zeros


def true_zeros(stored: Tensor, checkpoint_format: str) -> Tensor:
    """Zero points as the formula needs them: plus one in v1 (so up to 2**bits, on purpose not masked)."""
    return stored.to(torch.int32) + (1 if checkpoint_format == V1 else 0)


def pack(w: QuantizedWeight, bits: int, checkpoint_format: str = V1) -> PackedWeight:
    """Codes to words.

    Args:
        w: codes (N, K), scales and zeros (N, G), g_idx (K,).
        bits: 2, 3, 4 or 8.
        checkpoint_format: "gptq" or "gptq_v2".
    Raises:
        InputError: sizes that do not fill whole words; zero points that the format cannot hold.
    """
    zeros = stored_zeros(w.zeros, bits, checkpoint_format)
    return PackedWeight(
        qweight=pack_rows(w.codes.t(), bits),
        qzeros=pack_rows(zeros, bits).t().contiguous(),
        scales=w.scales.t().to(torch.float16).contiguous(),
        g_idx=w.g_idx.to(torch.int32),
    )


def unpack(p: PackedWeight, bits: int, checkpoint_format: str = V1) -> QuantizedWeight:
    """Words to codes: the exact inverse of `pack`."""
    return QuantizedWeight(
        codes=unpack_rows(p.qweight, bits).t().contiguous(),
        scales=p.scales.t().float().contiguous(),
        zeros=true_zeros(unpack_rows(p.qzeros.t(), bits), checkpoint_format).contiguous(),
        g_idx=p.g_idx.to(torch.int32),
    )
