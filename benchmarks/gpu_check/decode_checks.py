"""What a decode step launches besides plain products, compared with float64: norms, activations and residuals that are
folded into products, and the attention of new tokens with the KV cache."""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gptq_belle.engine.kv_cache import KVCache
from gptq_belle.kernels.triton_config import MatmulProblem, TileConfig, default_plan
from gptq_belle.kernels.triton_launch import Workspace
from gptq_belle.kernels.triton_layout import gate_order, interleave_gates
from gpu_check.kernel_recording import Case
from gpu_check.plan import Step
from gpu_check.setting import Setting, WrongProduct
from gpu_check.weights import expanded, random_weight

ERRORS = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative, of the attention; the norms' are 4 times as large
EPS = 1e-5
ROWS = 5
MIN_PDL = 90  # compute capability that has programmatic dependent launch


class Block(NamedTuple):
    """A product with the residual stream and the norm after it, and the product after that norm."""

    gated: bool  # RMS norm and SiLU(gate) * value, as in LLaMA; else layer norm and GELU, as in BLOOM
    dtype: torch.dtype
    config: TileConfig
    pdl: bool

    def __str__(self) -> str:
        kind = "RMS norm, SiLU" if self.gated else "layer norm, GELU"
        return f"folded {kind}, {str(self.dtype)[6:]}, {tuple(self.config)}{', PDL' if self.pdl else ''}"


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


def blocks(setting: Setting, arch: int, processors: int) -> list[Block]:
    """Both kinds with every tile that the rule takes for few rows of the measured shapes."""
    plans = [default_plan(MatmulProblem(8, outputs, inputs, 4, 128, "float16"), arch, processors)
             for inputs, outputs in setting.sizes.shapes]
    configs = {plan.config for plan in plans if plan.config is not None}
    return [Block(gated, dtype, config, pdl) for config in sorted(configs) for gated in (False, True)
            for dtype in setting.sizes.checked_dtypes for pdl in _pdl(setting, arch)]


def attentions(setting: Setting, arch: int) -> list[Attention]:
    """Heads of BELLE-7B and LLaMA-7B, and heads of keys that several queries share, with every cache."""
    shapes = [(2, 2, 64, True), (4, 2, 64, False)] if setting.toy else [
        (32, 32, 128, True), (32, 32, 128, False), (32, 8, 128, False)]
    lengths = (0, 31, -1, 95) if setting.toy else (0, 1, 255, 256, 700, -1, 1023)
    return [Attention(*shape, kind, dtype, lengths, pdl) for shape in shapes for kind in ("float16", "int8")
            for dtype in setting.sizes.checked_dtypes for pdl in _pdl(setting, arch)[:1]]


def _pdl(setting: Setting, arch: int) -> tuple[bool, ...]:
    return (True, False) if arch >= MIN_PDL and not setting.toy else (False,)


def steps(setting: Setting, arch: int, processors: int) -> list[Step]:
    """All checks."""
    return [*(Step(str(one), partial(check_block, setting, one)) for one in blocks(setting, arch, processors)),
            *(Step(str(one), partial(check_attention, setting, one)) for one in attentions(setting, arch))]


def cases(setting: Setting, arch: int, processors: int) -> list[Case]:
    """Their kernels, for compilation."""
    return [*(partial(run_block, setting, one) for one in blocks(setting, arch, processors)),
            *(partial(run_attention, one) for one in attentions(setting, arch))]


def run_block(setting: Setting, one: Block, device: torch.device) -> dict[str, Any]:
    """Launch both products on random values; returns all tensors by name."""
    from gptq_belle.kernels.triton_norm import FoldedNorm, NextNorm
    from gptq_belle.kernels.triton_skinny_launch import skinny_launch, skinny_workspace

    width, inner = setting.sizes.checked
    first = random_weight(width, width, 4, device)
    second = random_weight(width, 2 * inner if one.gated else inner, 4, device)
    config = one.config._replace(SPLIT_K=min(one.config.SPLIT_K, width // 128))
    x, stream = (torch.randn(ROWS, width, device=device).to(one.dtype) for _ in range(2))
    gamma, bias = torch.rand(width, device=device) + 0.5, torch.randn(second.out_features, device=device)
    following = NextNorm(gamma, None, torch.empty_like(x),
                         torch.empty(2, -(-width // config.BN), ROWS, device=device))
    after, hidden = torch.empty_like(stream), torch.empty(ROWS, inner, dtype=one.dtype, device=device)
    product = None if one.gated else gamma @ expanded(second)
    norm = FoldedNorm(following.moments, product, EPS, width, config.BN)
    weight = interleave_gates(second) if one.gated else second
    given_bias = bias[gate_order(len(bias), device)] if one.gated else bias

    def workspace(outputs: int) -> Workspace:
        sums, tickets = skinny_workspace(ROWS, outputs, config)
        return Workspace(torch.empty(max(sums, 1), device=device),
                         torch.zeros(max(tickets, 1), dtype=torch.int32, device=device))

    skinny_launch(x, first, after, config, workspace(width), residual=stream, next_norm=following, pdl=one.pdl)()
    skinny_launch(following.x, weight, hidden, config, workspace(weight.out_features), bias=given_bias,
                  activation="silu_mul" if one.gated else "gelu", norm=norm, pdl=one.pdl)()
    return {"first": first, "second": second, "x": x, "stream": stream, "gamma": gamma, "bias": bias, "after": after,
            "hidden": hidden}


def check_block(setting: Setting, one: Block) -> dict[str, float]:
    """The largest relative error of both results.

    Raises:
        WrongProduct: it is too large.
    """
    t = run_block(setting, one, setting.device)
    expected = t["x"].double() @ expanded(t["first"]).double() + t["stream"].double()
    y, gamma, bias = t["after"].double(), t["gamma"].double(), t["bias"].double()
    weight = expanded(t["second"]).double()
    if one.gated:
        gate, value = (F.rms_norm(y, gamma.shape, gamma, EPS) @ weight + bias).chunk(2, -1)
        hidden = F.silu(gate) * value
    else:
        hidden = F.gelu(F.layer_norm(y, gamma.shape, gamma, None, EPS) @ weight + bias, approximate="tanh")
    error = max(relative_error(t["after"], expected), relative_error(t["hidden"], hidden))
    return accepted(error, 4 * ERRORS[one.dtype])


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
        if appended > (1e-2 if one.kind == "int8" else ERRORS[one.dtype]):  # int8 rounds to a 127th of the largest
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


def relative_error(found: Tensor, exact: Tensor) -> float:
    """In the Frobenius norm."""
    return float((found.double() - exact).norm() / exact.norm())


def accepted(error: float, allowed: float) -> dict[str, float]:
    """The error as a result.

    Raises:
        WrongProduct: it is too large.
    """
    if not error < allowed:
        raise WrongProduct(f"relative error {error:.2e}, {allowed:.0e} is allowed")
    return {"error": error}
