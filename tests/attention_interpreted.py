"""The decode attention in Triton's interpreter, compared with float64 arithmetic on what the cache holds.

`test_triton_decode.py` runs this file in a separate process: TRITON_INTERPRET has to be set before Triton is
imported.
"""

import math
from typing import NamedTuple

import pytest
import torch
from bfloat16_interpreter import teach
from conftest import naming
from covering import covering_cases, random_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from shuffled_programs import Shuffled
from torch import Tensor

from gptq_belle.engine.kv_cache import KVCache, quantize_int8
from gptq_belle.kernels.triton_attention import HeadLayout, attention_launch, workspace_size
from gptq_belle.kernels.triton_launch import Workspace

teach()

ERRORS = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative; measured up to 3.9e-4 and 3.0e-3
PIECE, STEP = 32, 16
SPARE = 24  # positions of the cache after the bucket
UNTOUCHED = 7.0
KINDS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


class Case(NamedTuple):
    """One decode step; `lengths` gives the rows."""

    layout: HeadLayout
    kind: str
    dtype: torch.dtype
    rotary: bool
    lengths: tuple[int, ...]
    act_order: bool = False


class Step(NamedTuple):
    """Tensors of a case."""

    qkv: Tensor
    cache: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    slots: Tensor
    rotation: Tensor | None
    slopes: Tensor | None
    places: Tensor | None


def tensors(case, bucket, value_scale=1.0):
    """Random tensors; everything from a slot's length on is NaN in the cache or in its scales.

    Args:
        value_scale: factor of all values.
    """
    layout, rows = case.layout, len(case.lengths)
    cache = KVCache(1, rows + 2, layout.kv_heads, bucket + SPARE, layout.head_dim, case.kind, torch.device("cpu"))
    slots = torch.randperm(rows + 2)[:rows].int()
    tables = cache.keys[0], cache.values[0]
    scales = cache.scales(0) or (None, None)
    for table, scale, size in zip(tables, scales, (1.0, value_scale), strict=True):
        if scale is None:
            table.copy_(torch.randn(table.shape) * size)
        else:
            table.copy_(torch.randint(-127, 128, table.shape))
            scale.copy_((torch.rand(scale.shape) * 0.02 + 0.002) * size)
        for slot, length in zip(slots.tolist(), case.lengths, strict=True):
            (table if scale is None else scale)[slot, :, max(length, 0) :] = math.nan
    d, heads = layout.head_dim, layout.heads
    angles = torch.arange(bucket + SPARE)[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
    qkv = torch.randn(rows, (heads + 2 * layout.kv_heads) * d)
    heads_of(case, qkv)[2].mul_(value_scale)
    return Step(
        qkv.to(case.dtype), (*tables, *scales), slots,
        torch.cat((angles.cos(), angles.sin()), 1) if case.rotary else None,
        None if case.rotary else 2.0 ** (-8 * (torch.arange(heads) + 1) / heads),
        torch.randperm(heads * d).int() if case.act_order else None)


def run(case, step, bucket, seed=0, piece=PIECE, iteration=STEP):
    """One launch in a random order of programs: the output and the cache after it."""
    rows, layout = len(case.lengths), case.layout
    cache = tuple(None if table is None else table.clone() for table in step.cache)
    floats, tickets = workspace_size(rows, layout, bucket, piece)
    workspace = Workspace(torch.full((floats,), math.nan), torch.zeros(tickets, dtype=torch.int32))
    out = torch.full((rows, layout.heads * layout.head_dim), UNTOUCHED, dtype=case.dtype)
    launch = attention_launch(step.qkv, cache, step.slots, torch.tensor(case.lengths, dtype=torch.int32), out,
                              workspace, layout, rotation=step.rotation, slopes=step.slopes, places=step.places,
                              bucket=bucket, piece=piece, step=iteration)
    with Shuffled(seed):
        launch()
    assert not workspace.tickets.any()
    return out, cache


def rotated(x, position):
    """x (..., D) float64, first and second half rotated against each other by the angles of a position."""
    d = x.shape[-1]
    angles = position * 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    a, b = x.chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


def heads_of(case, row):
    """Query, key and value (.., heads, D) of rows of qkv (.., n): views."""
    heads, kv_heads, d, interleaved = case.layout
    if interleaved:
        return row.view(*row.shape[:-1], heads, 3, d).unbind(-2)
    return row.view(*row.shape[:-1], -1, d).split([heads, kv_heads, kv_heads], -2)


def relative_error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


def check(case, bucket, value_scale=1.0):
    step = tensors(case, bucket, value_scale)
    out, cache = run(case, step, bucket)
    assert torch.equal(out, run(case, step, bucket, seed=1)[0]), "the order of programs changes the result"
    exact = [t.double() * (1 if s is None else s.double()) for t, s in zip(cache[:2], cache[2:], strict=True)]
    written = torch.zeros(cache[0].shape[:3], dtype=torch.bool)
    for row, (slot, length) in enumerate(zip(step.slots.tolist(), case.lengths, strict=True)):
        if length < 0:
            assert (out[row] == UNTOUCHED).all()
            continue
        written[slot, :, length] = True
        query, key, value = heads_of(case, step.qkv[row].double())
        if case.rotary:
            query, key = rotated(query, length), rotated(key, length)
        check_appended(case, cache, slot, length, key, value)
        group = case.layout.heads // case.layout.kv_heads
        keys, values = (table[slot, :, : length + 1].repeat_interleave(group, 0) for table in exact)
        scores = (keys @ query[:, :, None]).squeeze(-1) / math.sqrt(case.layout.head_dim)
        if step.slopes is not None:
            scores += step.slopes[:, None].double() * (torch.arange(length + 1) - length)
        expected = (scores.softmax(-1)[:, None] @ values).flatten()
        found = out[row] if step.places is None else out[row][step.places.long()]
        assert relative_error(found, expected) < ERRORS[case.dtype]
    for before, after in zip(step.cache, cache, strict=True):
        if before is not None:
            assert torch.equal(before[~written].view(torch.uint8), after[~written].view(torch.uint8))


def check_appended(case, cache, slot, length, key, value):
    """The new key and value are in the cache, rounded once; codes of int8 are those of the engine's cache."""
    for new, table, scale in ((key, cache[0], cache[2]), (value, cache[1], cache[3])):
        found = table[slot, :, length]
        if scale is None:
            assert relative_error(found, new) < ERRORS[found.dtype] / 2
        else:
            codes, scales = quantize_int8(new.float())
            assert torch.equal(scale[slot, :, length], scales)
            assert (found.int() - codes.int()).abs().max() <= (1 if case.rotary else 0)  # rotation rounds in float32


LLAMA, BLOOM, GROUPED = HeadLayout(2, 2, 64, False), HeadLayout(2, 2, 64, True), HeadLayout(8, 2, 64, False)
HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.mark.parametrize("case", [
    Case(LLAMA, "float16", HALF, True, (0, 1, 31, -1, 32, 95)),
    Case(BLOOM, "float16", HALF, False, (40, 3), act_order=True),
    Case(HeadLayout(2, 2, 80, False), "float16", HALF, True, (5, 64)),
    Case(HeadLayout(2, 2, 80, True), "int8", HALF, False, (5, 64)),
    Case(HeadLayout(2, 1, 128, False), "float16", HALF, True, (33, 40)),
    Case(HeadLayout(1, 1, 128, True), "int8", HALF, False, (0, 33, -1, 63)),
    Case(GROUPED, "int8", HALF, True, (17, 95)),
    Case(GROUPED, "bfloat16", BRAIN, True, (32, 63)),
    Case(BLOOM, "float16", BRAIN, False, (40, 3)),
    Case(LLAMA, "int8", BRAIN, True, (40, 31)),
    Case(HeadLayout(20, 1, 64, False), "float16", HALF, True, (34,)),  # more than 16 queries per key
], ids=lambda case: f"{case.layout.head_dim}-{case.kind}-{'rotary' if case.rotary else 'alibi'}")
def test_attention_equals_float64(case):
    check(case, 96)


@pytest.mark.parametrize("value_scale", [3e-3, 1e3])
def test_int8_values_far_from_1(value_scale):
    """Weights times scales of values are operands in float16: they neither vanish nor overflow."""
    check(Case(LLAMA, "int8", HALF, False, (95,)), 96, value_scale)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(layout=st.sampled_from([LLAMA, BLOOM, GROUPED]), kind=st.sampled_from(list(KINDS)),
       dtype=st.sampled_from([HALF, BRAIN]), rotary=st.booleans(), act_order=st.booleans(),
       lengths=st.lists(st.integers(-1, 71), min_size=1, max_size=3))
def test_attention_equals_float64_for_any_lengths(layout, kind, dtype, rotary, act_order, lengths):
    check(Case(layout, kind, dtype, rotary, tuple(lengths), act_order), 72)


GRID = {"heads": ((2, 2, True), (2, 2, False), (6, 2, False)), "d": (64, 80, 96, 128, 256), "kind": tuple(KINDS),
        "dtype": (HALF, BRAIN), "rotary": (False, True), "act_order": (False, True),
        "lengths": ((*range(0, 70, 7), -1), (127, 128, 129, 64), (0,), (15, 16, 17, 31, 32, 33, -1, 1))}


def check_grid(heads, d, kind, dtype, rotary, act_order, lengths):
    query_heads, kv_heads, interleaved = heads
    check(Case(HeadLayout(query_heads, kv_heads, d, interleaved), kind, dtype, rotary, lengths, act_order), 130)


@pytest.mark.slow
@pytest.mark.parametrize("case", covering_cases(GRID, 3, 0), ids=lambda case: "-".join(map(str, case.values())))
def test_three_properties_at_a_time(case):
    """All 1,440 cases would take 45 minutes."""
    check_grid(**case)


@pytest.mark.slow
def test_random_cases():
    seed, cases = random_cases(GRID, 20)
    torch.manual_seed(seed)
    for case in cases:
        print(f"GRID_SEED={seed}", case)
        check_grid(**case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotary", [False, True])
def test_64_rows_of_all_lengths(kind, rotary):
    check(Case(HeadLayout(2, 1, 64, False), kind, HALF, rotary, tuple(range(64))), 64)


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_result_of_a_row_does_not_depend_on_others(kind):
    """The same bits with other rows, another bucket and another capacity."""
    case = Case(LLAMA, kind, HALF, False, (70, 31, 12))
    step = tensors(case, 96)
    whole, _ = run(case, step, 96)
    for rows, bucket in (([0], 96), ([1], 64), ([2, 0], 112), ([1, 2], 32)):
        part = case._replace(lengths=tuple(case.lengths[row] for row in rows))
        room = bucket + len(rows)
        cut = step._replace(qkv=step.qkv[rows].contiguous(), slots=step.slots[rows], cache=tuple(
            None if table is None else table[:, :, :room].contiguous() for table in step.cache))
        assert torch.equal(run(part, cut, bucket)[0], whole[rows])


@pytest.mark.parametrize("length", [120, 400])  # no room in the bucket, no room in the slot
def test_row_without_room_is_idle(length):
    case = Case(LLAMA, "float16", HALF, True, (length, 5))
    step = tensors(case._replace(lengths=(0, 5)), 64)
    out, cache = run(case, step, 64)
    assert (out[0] == UNTOUCHED).all()
    assert out[1].isfinite().all()
    assert torch.equal(cache[0][step.slots[0]].view(torch.uint8), step.cache[0][step.slots[0]].view(torch.uint8))


@pytest.mark.parametrize("field", ["qkv", "keys", "slots", "slopes", "workspace"])
def test_mismatched_tensors_are_refused(field):
    case = Case(BLOOM, "float16", HALF, False, (3,))
    step = tensors(case, 32)
    given = {"qkv": step.qkv, "keys": step.cache[0], "slots": step.slots, "slopes": step.slopes,
             "workspace": torch.zeros(workspace_size(1, BLOOM, 32)[0])}
    given[field] = given[field][..., :-1]
    with pytest.raises(ValueError, match=naming(field)):
        attention_launch(given["qkv"], (given["keys"], *step.cache[1:]), given["slots"],
                         torch.zeros(1, dtype=torch.int32), torch.zeros(1, 128).half(),
                         Workspace(given["workspace"], torch.zeros(2, dtype=torch.int32)), BLOOM, rotation=None,
                         slopes=given["slopes"], places=None, bucket=32)
