"""The attention of new tokens with the KV cache, which a decode step launches, compared with float64."""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptq_belle.engine.kv_cache import KVCache
from gptq_belle.kernels.triton_config import TENSOR_CORES
from gptq_belle.kernels.triton_launch import Workspace
from gpu_check.agreement import WrongProduct, accepted, relative_error
from gpu_check.folded_checks import launch_modes
from gpu_check.kernel_recording import Case
from gpu_check.plan import Step
from gpu_check.setting import Setting

ERRORS = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative
INT8_ERROR = 1e-2  # of appended keys and values, which are rounded to a 127th of the largest


class Attention(NamedTuple):
    """Decode attention: heads of queries, heads of keys, size of a head, BLOOM's arrangement and ALiBi or rotary."""

    heads: int
    kv_heads: int
    head_dim: int
    bloom: bool
    kind: str  # of the KV cache
    dtype: torch.dtype
    lengths: tuple[int, ...]  # tokens in the cache by row; -1 for an idle row
    pdl: bool

    def __str__(self) -> str:
        return (f"attention, {self.heads} on {self.kv_heads} heads of {self.head_dim}, "
                f"{'ALiBi' if self.bloom else 'rotary'}, {self.kind} cache, {str(self.dtype)[6:]}")


def attentions(setting: Setting, arch: int) -> list[Attention]:
    """Heads of BELLE-7B and LLaMA-7B, and keys that several queries share, with every cache; none before 8.0."""
    if arch < TENSOR_CORES:
        return []
    shapes = [(2, 2, 64, True), (4, 2, 64, False)] if setting.toy else [
        (32, 32, 128, True), (32, 32, 128, False), (32, 8, 128, False)]
    lengths = (0, 31, -1, 95) if setting.toy else (0, 1, 255, 256, 700, -1, 1023)
    return [Attention(*shape, kind, dtype, lengths, pdl) for shape in shapes for kind in ("float16", "int8")
            for dtype in setting.sizes.checked_dtypes for pdl in launch_modes(setting, arch)[:1]]


def steps(setting: Setting, arch: int) -> list[Step]:
    """All checks."""
    return [Step(str(one), partial(check_attention, setting, one)) for one in attentions(setting, arch)]


def cases(setting: Setting, arch: int) -> list[Case]:
    """Their kernels, for compilation."""
    return [partial(run_attention, one) for one in attentions(setting, arch)]


def run_attention(one: Attention, device: torch.device) -> dict[str, Any]:
    """Launch one decode step on random values; returns all tensors by name."""
    from gptq_belle.kernels.triton_attention import HeadLayout, attention_launch, workspace_size

    layout = HeadLayout(one.heads, one.kv_heads, one.head_dim, one.bloom)
    rows, d, bucket = len(one.lengths), one.head_dim, max(one.lengths) + 1
    cache = KVCache(1, rows, one.kv_heads, bucket, d, one.kind, device)
    tables = (cache.keys[0], cache.values[0], *(cache.scales(0) or (None, None)))
    for table in tables:
        if table is not None and table.dtype == torch.int8:
            table.copy_(torch.randint(-127, 128, table.shape, device=device))
        elif table is not None:
            table.copy_(torch.rand(table.shape, device=device) * (0.02 if table.shape[-1] == 1 else 1.0))
    angles = torch.arange(bucket, device=device)[:, None] * 10000.0 ** (-torch.arange(0, d, 2, device=device) / d)
    rotation = None if one.bloom else torch.cat((angles.cos(), angles.sin()), 1)
    slopes = 2.0 ** (-8 * (torch.arange(one.heads, device=device) + 1) / one.heads) if one.bloom else None
    qkv = torch.randn(rows, (one.heads + 2 * one.kv_heads) * d, device=device).to(one.dtype)
    out = torch.zeros(rows, one.heads * d, dtype=one.dtype, device=device)
    slots = torch.arange(rows - 1, -1, -1, dtype=torch.int32, device=device)
    floats, tickets = workspace_size(rows, layout, bucket)
    workspace = Workspace(torch.empty(floats, device=device), torch.zeros(tickets, dtype=torch.int32, device=device))
    attention_launch(qkv, tables, slots, torch.tensor(one.lengths, dtype=torch.int32, device=device), out, workspace,
                     layout, rotation=rotation, slopes=slopes, places=None, bucket=bucket, pdl=one.pdl)()
    return {"qkv": qkv, "tables": tables, "slots": slots, "rotation": rotation, "slopes": slopes, "out": out}


def check_attention(setting: Setting, one: Attention) -> dict[str, float]:
    """The largest relative error of a row, with the keys and values that the cache holds after the step.

    Raises:
        WrongProduct: it is too large, or an idle row was written.
    """
    t = run_attention(one, setting.device)
    keys, values = (table.double() * (1 if scale is None else scale.double())
                    for table, scale in zip(t["tables"][:2], t["tables"][2:], strict=True))
    error = 0.0
    for row, length in enumerate(one.lengths):
        if length < 0:
            error = max(error, math.inf if t["out"][row].any() else 0.0)
            continue
        query, key, value = _heads(one, t["qkv"][row].double())
        if t["rotation"] is not None:
            query, key = (_rotated(part, t["rotation"][length].double()) for part in (query, key))
        slot = int(t["slots"][row])
        appended = max(relative_error(keys[slot, :, length], key), relative_error(values[slot, :, length], value))
        if not appended < (INT8_ERROR if one.kind == "int8" else ERRORS[one.dtype]):
            raise WrongProduct(f"appended keys or values have a relative error of {appended:.1e}")
        error = max(error, relative_error(t["out"][row], _attended(one, t["slopes"], query, keys[slot], values[slot],
                                                                   length)))
    return accepted(error, ERRORS[one.dtype])


def _heads(one: Attention, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (heads, D) of a row of qkv."""
    parts = row.view(-1, one.head_dim)
    query, key, value = (parts.view(one.heads, 3, -1).unbind(1) if one.bloom
                         else parts.split([one.heads, one.kv_heads, one.kv_heads]))
    return query, key, value


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.chunk(2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _attended(one: Attention, slopes: Tensor | None, query: Tensor, keys: Tensor, values: Tensor,
              length: int) -> Tensor:
    """The output (heads * D,) for one query, on keys and values (kv_heads, capacity, D) up to `length`."""
    keys, values = (table[:, : length + 1].repeat_interleave(one.heads // one.kv_heads, 0) for table in (keys, values))
    scores = (keys @ query[:, :, None]).squeeze(-1) / math.sqrt(one.head_dim)
    if slopes is not None:
        scores += slopes[:, None].double() * (torch.arange(length + 1, device=scores.device) - length)
    return (scores.softmax(-1)[:, None] @ values).flatten()
