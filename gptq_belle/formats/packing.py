"""Packing of codes into int32 words in the GPTQ format.

Codes form one little-endian bit stream along K = in_features (``qweight``) or N = out_features (``qzeros``), the lowest
index in the lowest bits. Codes of 2, 4 and 8 bits never cross a word boundary; with 3 bits, 32 codes fill 3 words, and
codes 10 and 21 cross a boundary.
"""

from math import gcd

import torch
from torch import Tensor

from gptq_belle.errors import InputError


def packing_cycle(bits: int) -> tuple[int, int]:
    """Period (codes, words) of the bit layout: (8, 1) for 4 bits, (32, 3) for 3 bits."""
    common = gcd(bits, 32)
    return 32 // common, bits // common


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (C, J), each below 2**bits, along the first axis into int32 words (C * bits / 32, J).

    Raises:
        InputError: the codes do not fill whole words.
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
    """Unpack int32 words (C * bits / 32, J) into codes (C, J) uint8: the inverse of `pack_rows`.

    Raises:
        InputError: the number of words is not a multiple of the words of a period.
    """
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
        if shift + bits > 32:  # replace the sign bits of the arithmetic shift by bits of the next word
            low = 32 - shift
            value = (value & ((1 << low) - 1)) | (stream[:, word + 1] << low)
        codes[:, i] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return codes.reshape(-1, columns)
