"""The GPTQ format: codes <-> int32 words, and the zero point's offset by one.

Shapes: K = in_features, N = out_features, G = groups. Codes form one little-endian stream of bits along K (for
``qweight``) or along N (for ``qzeros``), the lowest index in the lowest bits. 2, 4 and 8 bits never straddle a word;
with 3 bits, 32 codes take 3 words and codes 10 and 21 straddle.

The zero point's story: the first GPTQ kernels computed ``scale * (code - (stored + 1))``, so format "gptq" (v1) holds
zero - 1, and "gptq_v2" holds the zero itself. A true zero of 0 does not exist in v1 (it would be -1, and packers that
did not mask it spoiled the neighbours); a stored 15 means 16 there and is never masked on reading.
"""

from math import gcd

import torch
from torch import Tensor

from gptq_belle.errors import InputError


def packing_cycle(bits: int) -> tuple[int, int]:
    """(codes, words) after which the pattern of bits in words repeats: (8, 1) for 4 bits, (32, 3) for 3."""
    common = gcd(bits, 32)
    return 32 // common, bits // common


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (C, J), each below 2**bits, along the first axis into int32 words (C * bits / 32, J).

    Raises:
        InputError: C is not a multiple of the codes that fill whole words.
    """
    per_cycle, words_per_cycle = packing_cycle(bits)
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
    per_cycle, words_per_cycle = packing_cycle(bits)
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
