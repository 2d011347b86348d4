"""One packed weight as the file holds it, checked: what `reference.py` reads and what other layouts are made from.

K = in_features, N = out_features, G = groups. `kernels/README.md` describes every layout.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)
RUNS = (256, 128, 64, 32)  # lengths in which kernels take inputs of one group, best first


class CanonicalWeight(NamedTuple):
    """``W[k, n] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n])``, words as on disk."""

    qweight: Tensor  # (K * bits / 32, N) int32: codes along K, the lowest input in the lowest bits
    qzeros: Tensor  # (G, N * bits / 32) int32: stored zeros along N; the true zero is stored + zero_offset
    scales: Tensor  # (G, N) float16, bfloat16 or float32; may be negative
    g_idx: Tensor  # (K,) int32: the group of each input
    bits: int  # 2, 3, 4 or 8
    zero_offset: int  # 1 in format "gptq" (v1), 0 in "gptq_v2"
    run: int  # the longest of RUNS of neighbouring inputs that always share a group; 0 where act-order mixes them

    @property
    def in_features(self) -> int:
        """K."""
        return self.g_idx.shape[0]

    @property
    def out_features(self) -> int:
        """N."""
        return self.qweight.shape[1]


def canonical(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int,
              zero_offset: int) -> CanonicalWeight:
    """Check one packed weight.

    Args:
        qweight, qzeros, scales: as in `CanonicalWeight`.
        g_idx: (K,) int32 or int64; None where the groups are K / G neighbouring inputs each.
        bits: 2, 3, 4 or 8.
        zero_offset: what is added to a stored zero: 1 for "gptq" (v1), 0 for "gptq_v2".
    Raises:
        ValueError: anything that does not fit together; the message says what is allowed.
    """
    _require(bits in BITS, f"bits {bits} is not one of {BITS}")
    _require(zero_offset in (0, 1), f"zero_offset {zero_offset} is not 1 (format gptq) or 0 (gptq_v2)")
    for name, words in (("qweight", qweight), ("qzeros", qzeros)):
        _require(words.dtype == torch.int32, f"{name} is {words.dtype}, not torch.int32")
        _require(words.dim() == 2 and words.numel() > 0, f"{name} of shape {tuple(words.shape)} is not a filled matrix")
    rows, outputs = qweight.shape
    _require(rows * 32 % bits == 0 and outputs * bits % 32 == 0,
             f"qweight of {rows} rows and {outputs} columns does not hold whole words of {bits} bits")
    inputs = rows * 32 // bits
    _require(scales.dtype in SCALE_DTYPES, f"scales are {scales.dtype}, not one of {SCALE_DTYPES}")
    _require(scales.dim() == 2 and scales.shape[1] == outputs,
             f"scales of shape {tuple(scales.shape)} do not match qweight: expected (groups, {outputs})")
    groups = scales.shape[0]
    _require(tuple(qzeros.shape) == (groups, outputs * bits // 32),
             f"qzeros of shape {tuple(qzeros.shape)} do not match scales: expected {(groups, outputs * bits // 32)}")
    # Of float16, isfinite() takes 20 times as long.
    _require(all(bool(end.isfinite()) for end in scales.aminmax()), "scales hold NaN or infinity")
    g_idx = _checked_groups(g_idx, inputs, groups).to(qweight.device)
    return CanonicalWeight(qweight, qzeros, scales, g_idx, bits, zero_offset, longest_run(g_idx))


def fuse(weights: Sequence[CanonicalWeight]) -> CanonicalWeight:
    """Weights that meet the same activations (query, key, value; gate, up) as one: their outputs one after another.

    Raises:
        ValueError: they differ in bits, in format, in the dtype of scales, or in the groups of inputs.
    """
    first = weights[0]
    for name in ("bits", "zero_offset"):
        found = [getattr(weight, name) for weight in weights]
        _require(len(set(found)) == 1, f"weights with {name} of {found} cannot be fused")
    dtypes = [weight.scales.dtype for weight in weights]
    _require(len(set(dtypes)) == 1, f"weights with scales of {dtypes} cannot be fused")
    _require(all(torch.equal(weight.g_idx, first.g_idx) for weight in weights),
             "weights whose inputs stand in different groups (g_idx) cannot be fused")
    return first._replace(
        qweight=torch.cat([weight.qweight for weight in weights], 1),
        qzeros=torch.cat([weight.qzeros for weight in weights], 1),
        scales=torch.cat([weight.scales for weight in weights], 1),
    )


def longest_run(groups: Tensor) -> int:
    """The longest of RUNS into which groups (K,) can be cut without mixing two of them in one; 0 for none."""
    for run in RUNS:
        if groups.numel() % run == 0 and bool((groups.view(-1, run) == groups.view(-1, run)[:, :1]).all()):
            return run
    return 0


def _checked_groups(g_idx: Tensor | None, inputs: int, groups: int) -> Tensor:
    if g_idx is None:
        _require(inputs % groups == 0, f"{inputs} inputs are not {groups} equal groups: g_idx is needed")
        return torch.arange(inputs, dtype=torch.int32) // (inputs // groups)
    _require(g_idx.dtype in INDEX_DTYPES, f"g_idx is {g_idx.dtype}, not one of {INDEX_DTYPES}")
    _require(tuple(g_idx.shape) == (inputs,), f"g_idx of shape {tuple(g_idx.shape)} does not match {(inputs,)}")
    low, high = int(g_idx.min()), int(g_idx.max())
    _require(low >= 0 and high < groups, f"g_idx holds {low}..{high}, not groups 0..{groups - 1}")
    return g_idx.to(torch.int32)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
