"""The native attention of a decoding step against softmax in float64: every cache, positions, shared keys."""

import pytest
import torch
from conftest import naming

from gptq_belle.engine.kv_cache import quantize_int8
from gptq_belle.kernels.cpu_attention import DecodeStep, KvCacheBlock, unsupported_reason
from gptq_belle.kernels.native_library import load_library

if isinstance(load_library(), str):
    pytest.skip(load_library(), allow_module_level=True)
SLOTS, CAPACITY = 5, 300
PLACES, LENGTHS = torch.tensor([3, 0, 4, 1]), torch.tensor([0, 63, 64, CAPACITY - 1])


def tables(dtype, kv_heads=2, size=48):
    """Keys, values and scales."""
    keys, values = torch.randn(2, SLOTS, kv_heads, CAPACITY, size)
    if dtype != torch.int8:
        return keys.to(dtype), values.to(dtype), None
    (keys, first), (values, second) = quantize_int8(keys), quantize_int8(values)
    return keys, values, (first, second)


def fresh(heads=4, kv_heads=2, size=48, rows=4):
    """Query, key and value as they lie beside each other."""
    return torch.randn(rows, heads + 2 * kv_heads, size).split([heads, kv_heads, kv_heads], 1)


def turns(size, rows=4):
    angles = 3 * torch.rand(rows, 1, size // 2)
    return torch.cat([angles.cos(), angles.cos()], -1), torch.cat([-angles.sin(), angles.sin()], -1)


def turned(x, rotation):
    if rotation is None:
        return x.double()
    first, second = x.double().chunk(2, -1)
    (cos, _), (_, sin) = (table.double().chunk(2, -1) for table in rotation)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def expected(query, key, value, kept, rotation=None, slopes=None):
    """What the rows get; their keys and values are taken from the tables up to their place, and then from the new."""
    keys, values = (t.double() for t in kept[:2])
    if kept[2] is not None:
        keys, values = keys * kept[2][0].double(), values * kept[2][1].double()
    query, key, out = turned(query, rotation), turned(key, rotation), []
    for m, (slot, length) in enumerate(zip(PLACES, LENGTHS, strict=True)):
        group = query.shape[1] // keys.shape[1]
        k, v = (torch.cat([old[slot, :, :length], new[m].double()[:, None]], 1).repeat_interleave(group, 0)
                for old, new in ((keys, key), (values, value)))
        scores = torch.einsum("hd,htd->ht", query[m], k) / query.shape[-1] ** 0.5
        if slopes is not None:
            scores += slopes.double()[:, None] * torch.arange(-int(length), 1)
        out.append(torch.einsum("ht,htd->hd", scores.softmax(-1), v).flatten())
    return torch.stack(out)


# What a new key and value lose in the cache; the rest is held against float64.
ROUNDING = {torch.float32: 2e-5, torch.float16: 1e-3, torch.int8: 2e-2}


@pytest.mark.parametrize("isa", load_library().usable_isas)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 48), (3, 3, 16), (8, 1, 64), (2, 2, 128), (6, 2, 80)])
def test_attention(isa, dtype, heads, kv_heads, size):
    for rotation, slopes in ((None, None), (turns(size), None), (None, torch.rand(heads))):
        kept, new = tables(dtype, kv_heads, size), fresh(heads, kv_heads, size)
        wanted = expected(*new, kept, rotation, slopes)
        found = DecodeStep(PLACES, LENGTHS, rotation, slopes).attend(KvCacheBlock(*kept), *new, isa=isa)
        torch.testing.assert_close(found.double(), wanted, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize("isa", load_library().usable_isas)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", [16, 80, 128])
def test_what_is_kept_is_what_torch_would_keep(isa, dtype, size):
    kept, (query, key, value), rotation = tables(dtype, 2, size), fresh(size=size), turns(size)
    key[0, 0], value[1, 1], value[2, 0], value[3, 1] = 0, 1e-7, 70000, -torch.inf
    keys, values, scales = (kept[0].clone(), kept[1].clone(), kept[2] and tuple(t.clone() for t in kept[2]))
    DecodeStep(PLACES, LENGTHS, rotation).attend(KvCacheBlock(*kept), query, key, value, isa=isa)
    first, second = (table.chunk(2, -1) for table in rotation)
    left, right = key.chunk(2, -1)
    key = torch.cat([left * first[0] + right * second[0], right * first[1] + left * second[1]], -1)
    for new, old, found, place in ((key, keys, kept[0], 0), (value, values, kept[1], 1)):
        if scales is None:
            old[PLACES, :, LENGTHS] = new.to(dtype)
            assert torch.equal(found, old)
        else:
            codes, scale = quantize_int8(new)
            whole = scale.isfinite().flatten(1).all(1)  # 8 bits of infinity are whatever a processor makes of it
            old[PLACES[whole], :, LENGTHS[whole]] = codes[whole]
            found[PLACES[~whole], :, LENGTHS[~whole]] = old[PLACES[~whole], :, LENGTHS[~whole]]
            assert torch.equal(found, old)
            scales[place][PLACES, :, LENGTHS] = scale
            assert torch.equal(kept[2][place], scales[place])


@pytest.mark.parametrize("dtype", ROUNDING)
def test_nan_stays_in_its_row(dtype):
    kept, (query, key, value) = tables(dtype), fresh()
    key[0, 0, 5], value[1, 1, 7] = torch.nan, torch.nan
    found = DecodeStep(PLACES, LENGTHS, turns(48)).attend(KvCacheBlock(*kept), query, key, value)
    assert found[0].isnan().any()
    assert found[1].isnan().any()
    assert not found[2:].isnan().any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_is_the_same_to_the_bit_alone(threads):
    torch.set_num_threads(threads)
    kept, new, rotation = tables(torch.float16, size=128), fresh(size=128), turns(128)
    together = DecodeStep(PLACES, LENGTHS, rotation).attend(KvCacheBlock(*kept), *new)
    torch.set_num_threads(1)
    for i in range(4):
        row = slice(i, i + 1)
        step = DecodeStep(PLACES[row], LENGTHS[row], tuple(table[row] for table in rotation))
        assert torch.equal(step.attend(KvCacheBlock(*kept), *(part[row] for part in new))[0], together[i])


@pytest.mark.parametrize("scale", [1e-4, 30.0])
def test_flat_and_steep_scores(scale):
    kept, (query, key, value) = tables(torch.float32), fresh()
    wanted = expected(query * scale, key, value, kept)
    found = DecodeStep(PLACES, LENGTHS).attend(KvCacheBlock(*kept), query * scale, key, value)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_what_stands_behind_a_sequence_is_not_read():
    kept, new = tables(torch.float32), fresh()
    before = DecodeStep(PLACES, LENGTHS).attend(KvCacheBlock(*kept), *new)
    kept[0][3, :, 1:], kept[1][3, :, 1:] = torch.nan, torch.nan
    assert torch.equal(DecodeStep(PLACES, LENGTHS).attend(KvCacheBlock(*kept), *new), before)


@pytest.mark.parametrize(("change", "message"), [
    ({"keys": torch.zeros(5, 2, 300, 48).double()}, "float64"), ({"values": torch.randn(5, 2, 299, 48)}, "values"),
    ({"keys": torch.randn(5, 2, 300, 96)[..., ::2]}, "keys"),
    ({"scales": (torch.ones(1), torch.ones(1))}, "with scales"),
    ({"keys": torch.randn(2, 300, 48)}, "keys"), ({"keys": torch.randn(5, 2, 300, 40)}, "values"),
    ({"keys": torch.zeros(5, 2, 300, 48).char(), "values": torch.zeros(5, 2, 300, 48).char()}, "without scales")])
def test_tables_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        KvCacheBlock(**dict(zip(("keys", "values", "scales"), tables(torch.float32), strict=True)) | change)
    with pytest.raises(ValueError, match=naming("40")):
        KvCacheBlock(torch.randn(5, 2, 300, 40), torch.randn(5, 2, 300, 40))


@pytest.mark.parametrize(("change", "message"), [
    ({"slots": torch.tensor([5, 0, 1, 2])}, "slot"),
    ({"slots": torch.tensor([-1, 0, 1, 2])}, "slot"), ({"slots": torch.tensor([0, 1, 2, 2])}, "slot"),
    ({"lengths": torch.tensor([-1, 1, 1, 1])}, "length"), ({"lengths": torch.tensor([300, 1, 1, 1])}, "length"),
    ({"slots": torch.zeros(3, dtype=torch.int64)}, "lengths"),
    ({"lengths": torch.ones(4, dtype=torch.int32)}, "lengths"), ({"query": torch.randn(4, 3, 48)}, "3 heads"),
    ({"query": torch.randn(4, 4, 32)}, "query"), ({"query": torch.randn(4, 4, 48).half()}, "float16"),
    ({"key": torch.randn(4, 1, 48)}, "key"), ({"value": torch.randn(4, 48, 2).transpose(1, 2)}, "value"),
    ({"value": torch.randn(3, 2, 48)}, "value"), ({"rotation": turns(32)}, "rotation"),
    ({"rotation": turns(48, 3)}, "rotation"), ({"slopes": torch.ones(3)}, "slopes"),
    ({"slopes": torch.ones(4).double()}, "slopes"), ({"isa": "x"}, "instruction set")])
def test_what_does_not_fit_is_refused(change, message):
    new = dict(zip(("query", "key", "value"), fresh(), strict=True))
    given = {"slots": PLACES, "lengths": LENGTHS, "rotation": None, "slopes": None, "isa": None} | new | change
    kept = tables(torch.float32)
    before = kept[0].clone()
    with pytest.raises(ValueError, match=message):
        DecodeStep(given["slots"], given["lengths"], given["rotation"], given["slopes"]).attend(
            KvCacheBlock(*kept), given["query"], given["key"], given["value"], isa=given["isa"])
    assert torch.equal(kept[0], before)


def test_refusal():
    cpu = torch.device("cpu")
    assert unsupported_reason(128, torch.float16, cpu) is None
    assert "heads of 20" in unsupported_reason(20, torch.float16, cpu)
    assert "bfloat16" in unsupported_reason(128, torch.bfloat16, cpu)
    assert "cuda" in unsupported_reason(128, torch.float16, torch.device("cuda"))
