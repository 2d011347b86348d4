"""GPTQ's tensors of a linear from those of compressed-tensors (`pack-quantized`) and of AWQ (`gemm`).

K = in_features, N = out_features, G = groups, f = 32 / bits.

- pack-quantized: ``weight_packed`` (N, K / f) holds codes + 2**(bits - 1) along K in the same stream of bits as GPTQ's
  qweight, ``weight_scale`` (N, G), ``weight_zero_point`` (N / f, G) likewise, absent where symmetric, and
  ``weight_g_idx`` (K,) where groups follow the activation order. GPTQ's are their transposes.
- AWQ: ``qweight`` (K, N / 8) and ``qzeros`` (G, N / 8) hold 8 neighbouring outputs in a word in the order
  0, 2, 4, 6, 1, 3, 5, 7; ``scales`` (G, N) are GPTQ's.

True zero points are stored: format gptq_v2.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.formats.foreign_config import AWQ, PACK_QUANTIZED
from gptq_belle.formats.packing import pack_rows, unpack_rows
from gptq_belle.formats.quantize_config import Quantization

PARTS: Mapping[str, tuple[str, ...]] = {  # tensors of a linear that others replace, by the last part of their names
    PACK_QUANTIZED: ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
    AWQ: ("qweight", "qzeros")}
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place in the word of each of 8 neighbouring outputs
AWQ_BITS = 4
Header = Callable[[str], tuple[tuple[int, ...], torch.dtype]]


class DerivedTensor(NamedTuple):
    """A tensor that is computed from one of the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str  # name in the file
    compute: Callable[[Tensor], Tensor]


def derived_tensors(names: Iterable[str], header: Header, layout: str,
                    settings: Callable[[str], Quantization]) -> tuple[dict[str, DerivedTensor], set[str]]:
    """GPTQ's tensors of all packed linears of a file.

    Args:
        names: the file's tensors.
        header: shape and dtype of one of them.
        layout: "pack-quantized" or "awq"; no tensors for any other.
        settings: settings of a linear by its full name.
    Returns:
        the derived tensors by name, and the names of the file's tensors that they replace. Shapes and dtypes are not
        checked here: `packed_reader` compares those of the derived tensors with config.json.
    """
    names = set(names)
    derive = {PACK_QUANTIZED: _pack_quantized, AWQ: _awq}.get(layout)
    if derive is None:
        return {}, set()
    leaves = PARTS[layout]
    stems = sorted({stem for name in names for stem, _, leaf in [name.rpartition(".")] if leaf in leaves})
    found = {name: tensor for stem in stems for name, tensor in derive(stem, names, header, settings(stem))}
    return found, {name for name in names if name.rpartition(".")[2] in leaves}


def _pack_quantized(stem: str, names: set[str], header: Header,
                    own: Quantization) -> Iterator[tuple[str, DerivedTensor]]:
    for leaf, part in (("weight_packed", "qweight"), ("weight_scale", "scales"), ("weight_zero_point", "qzeros")):
        if f"{stem}.{leaf}" in names:
            shape, dtype = header(f"{stem}.{leaf}")
            yield f"{stem}.{part}", DerivedTensor(shape[::-1], dtype, f"{stem}.{leaf}", _transposed)
    if f"{stem}.weight_g_idx" in names:
        yield f"{stem}.g_idx", DerivedTensor(*header(f"{stem}.weight_g_idx"), f"{stem}.weight_g_idx", _unchanged)
    scales = header(f"{stem}.weight_scale")[0] if f"{stem}.weight_scale" in names else ()
    if own.sym and f"{stem}.weight_zero_point" not in names and len(scales) == 2:
        shape = scales[1], scales[0] * own.bits // 32
        yield f"{stem}.qzeros", DerivedTensor(shape, torch.int32, f"{stem}.weight_scale",
                                              partial(_symmetric_zeros, bits=own.bits))


def _awq(stem: str, names: set[str], header: Header, own: Quantization) -> Iterator[tuple[str, DerivedTensor]]:
    for part, factor, compute in (("qweight", 8, _awq_words), ("qzeros", 1, _awq_zeros)):
        shape, dtype = header(name) if (name := f"{stem}.{part}") in names else ((), torch.int32)
        if len(shape) == 2:
            yield name, DerivedTensor((shape[0] // factor, shape[1] * factor), dtype, name, compute)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous()


def _symmetric_zeros(scales: Tensor, bits: int) -> Tensor:
    """Words (G, N * bits / 32) of the zero point 2**(bits - 1) for scales (N, G)."""
    return pack_rows(torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8), bits).t().contiguous()


def _awq_codes(words: Tensor) -> Tensor:
    """Codes (R, N) uint8 of AWQ's words (R, N / 8)."""
    stored = unpack_rows(words.t().contiguous(), AWQ_BITS).t()
    return stored.unflatten(1, (-1, 8))[:, :, list(AWQ_ORDER)].flatten(1)


def _awq_words(words: Tensor) -> Tensor:
    return pack_rows(_awq_codes(words), AWQ_BITS)


def _awq_zeros(words: Tensor) -> Tensor:
    return pack_rows(_awq_codes(words).t(), AWQ_BITS).t().contiguous()
