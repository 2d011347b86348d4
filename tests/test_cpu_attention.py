"""Native attention of a decode step against softmax in float64: cache dtypes, position encodings, shared keys."""

import pytest
import torch
from conftest import naming

from gptq_belle.engine.kv_cache import quantize_int8
from gptq_belle.kernels.cpu_attention import DecodeStep, KvCacheBlock, unsupported_reason
from gptq_belle.kernels.native_library import load_library

if isinstance(load_library(), str):
    pytest.skip(load_library(), allow_module_level=True)
SLOTS, CAPACITY = 5, 300
STEP_SLOTS, LENGTHS = torch.tensor([3, 0, 4, 1]), torch.tensor([0, 63, 64, CAPACITY - 1])


def cache_tensors(dtype, kv_heads=2, size=48):
    """Keys, values and scales."""
    keys, values = torch.randn(2, SLOTS, kv_heads, CAPACITY, size)
    if dtype != torch.int8:
        return keys.to(dtype), values.to(dtype), None
    (keys, first), (values, second) = quantize_int8(keys), quantize_int8(values)
    return keys, values, (first, second)


def new_tokens(heads=4, kv_heads=2, size=48, rows=4):
    """Query, key and value of a fused projection, as views of one tensor."""
    return torch.randn(rows, heads + 2 * kv_heads, size).split([heads, kv_heads, kv_heads], 1)


def rotation_of(size, rows=4):
    angles = 3 * torch.rand(rows, 1, size // 2)
    return torch.cat([angles.cos(), angles.cos()], -1), torch.cat([-angles.sin(), angles.sin()], -1)


def rotated(x, rotation):
    if rotation is None:
        return x.double()
    first, second = x.double().chunk(2, -1)
    (cos, _), (_, sin) = (table.double().chunk(2, -1) for table in rotation)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def expected(query, key, value, kept, rotation=None, slopes=None):
    """Attention in float64, with keys and values of the cache up to the row's length, then its new ones."""
    keys, values = (t.double() for t in kept[:2])
    if kept[2] is not None:
        keys, values = keys * kept[2][0].double(), values * kept[2][1].double()
    query, key, out = rotated(query, rotation), rotated(key, rotation), []
    for m, (slot, length) in enumerate(zip(STEP_SLOTS, LENGTHS, strict=True)):
        group = query.shape[1] // keys.shape[1]
        k, v = (torch.cat([old[slot, :, :length], new[m].double()[:, None]], 1).repeat_interleave(group, 0)
                for old, new in ((keys, key), (values, value)))
        scores = torch.einsum("hd,htd->ht", query[m], k) / query.shape[-1] ** 0.5
        if slopes is not None:
            scores += slopes.double()[:, None] * torch.arange(-int(length), 1)
        out.append(torch.einsum("ht,htd->hd", scores.softmax(-1), v).flatten())
    return torch.stack(out)


# By cache dtype: the error of a new key and value in the cache.
ROUNDING = {torch.float32: 2e-5, torch.float16: 1e-3, torch.int8: 2e-2}


@pytest.mark.parametrize("isa", load_library().usable_isas)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 48), (3, 3, 16), (8, 1, 64), (2, 2, 128), (6, 2, 80)])
def test_attention(isa, dtype, heads, kv_heads, size):
    for rotation, slopes in ((None, None), (rotation_of(size), None), (None, torch.rand(heads))):
        kept, new = cache_tensors(dtype, kv_heads, size), new_tokens(heads, kv_heads, size)
        wanted = expected(*new, kept, rotation, slopes)
        found = DecodeStep(STEP_SLOTS, LENGTHS, rotation, slopes).attend(KvCacheBlock(*kept), *new, isa=isa)
        torch.testing.assert_close(found.double(), wanted, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize("isa", load_library().usable_isas)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", [16, 80, 128])
def test_cache_holds_what_torch_would_store(isa, dtype, size):
    kept, (query, key, value), rotation = cache_tensors(dtype, 2, size), new_tokens(size=size), rotation_of(size)
    key[0, 0], value[1, 1], value[2, 0], value[3, 1] = 0, 1e-7, 70000, -torch.inf
    keys, values, scales = (kept[0].clone(), kept[1].clone(), kept[2] and tuple(t.clone() for t in kept[2]))
    DecodeStep(STEP_SLOTS, LENGTHS, rotation).attend(KvCacheBlock(*kept), query, key, value, isa=isa)
    first, second = (table.chunk(2, -1) for table in rotation)
    left, right = key.chunk(2, -1)
    key = torch.cat([left * first[0] + right * second[0], right * first[1] + left * second[1]], -1)
    for new, old, found, place in ((key, keys, kept[0], 0), (value, values, kept[1], 1)):
        if scales is None:
            old[STEP_SLOTS, :, LENGTHS] = new.to(dtype)
            assert torch.equal(found, old)
        else:
            codes, scale = quantize_int8(new)
            whole = scale.isfinite().flatten(1).all(1)  # how int8 represents infinity depends on the processor
            old[STEP_SLOTS[whole], :, LENGTHS[whole]] = codes[whole]
            found[STEP_SLOTS[~whole], :, LENGTHS[~whole]] = old[STEP_SLOTS[~whole], :, LENGTHS[~whole]]
            assert torch.equal(found, old)
            scales[place][STEP_SLOTS, :, LENGTHS] = scale
            assert torch.equal(kept[2][place], scales[place])


@pytest.mark.parametrize("dtype", ROUNDING)
def test_nan_affects_its_row_only(dtype):
    kept, (query, key, value) = cache_tensors(dtype), new_tokens()
    key[0, 0, 5], value[1, 1, 7] = torch.nan, torch.nan
    found = DecodeStep(STEP_SLOTS, LENGTHS, rotation_of(48)).attend(KvCacheBlock(*kept), query, key, value)
    assert found[0].isnan().any()
    assert found[1].isnan().any()
    assert not found[2:].isnan().any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_row_has_the_same_bits_in_a_batch_and_alone(threads):
    torch.set_num_threads(threads)
    kept, new, rotation = cache_tensors(torch.float16, size=128), new_tokens(size=128), rotation_of(128)
    together = DecodeStep(STEP_SLOTS, LENGTHS, rotation).attend(KvCacheBlock(*kept), *new)
    torch.set_num_threads(1)
    for i in range(4):
        row = slice(i, i + 1)
        step = DecodeStep(STEP_SLOTS[row], LENGTHS[row], tuple(table[row] for table in rotation))
        assert torch.equal(step.attend(KvCacheBlock(*kept), *(part[row] for part in new))[0], together[i])


@pytest.mark.parametrize("scale", [1e-4, 30.0])
def test_flat_and_steep_scores(scale):
    kept, (query, key, value) = cache_tensors(torch.float32), new_tokens()
    wanted = expected(query * scale, key, value, kept)
    found = DecodeStep(STEP_SLOTS, LENGTHS).attend(KvCacheBlock(*kept), query * scale, key, value)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_positions_after_the_end_of_a_sequence_are_not_read():
    kept, new = cache_tensors(torch.float32), new_tokens()
    before = DecodeStep(STEP_SLOTS, LENGTHS).attend(KvCacheBlock(*kept), *new)
    kept[0][3, :, 1:], kept[1][3, :, 1:] = torch.nan, torch.nan
    assert torch.equal(DecodeStep(STEP_SLOTS, LENGTHS).attend(KvCacheBlock(*kept), *new), before)


@pytest.mark.parametrize(("change", "message"), [
    ({"keys": torch.zeros(5, 2, 300, 48).double()}, "float64"), ({"values": torch.randn(5, 2, 299, 48)}, "values"),
    ({"keys": torch.randn(5, 2, 300, 96)[..., ::2]}, "keys"),
    ({"scales": (torch.ones(1), torch.ones(1))}, "with scales"),
    ({"keys": torch.randn(2, 300, 48)}, "keys"), ({"keys": torch.randn(5, 2, 300, 40)}, "values"),
    ({"keys": torch.zeros(5, 2, 300, 48).char(), "values": torch.zeros(5, 2, 300, 48).char()}, "without scales")])
def test_malformed_cache_is_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        KvCacheBlock(**dict(zip(("keys", "values", "scales"), cache_tensors(torch.float32), strict=True)) | change)
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
    ({"value": torch.randn(3, 2, 48)}, "value"), ({"rotation": rotation_of(32)}, "rotation"),
    ({"rotation": rotation_of(48, 3)}, "rotation"), ({"slopes": torch.ones(3)}, "slopes"),
    ({"slopes": torch.ones(4).double()}, "slopes"), ({"isa": "x"}, "instruction set")])
def test_malformed_step_and_tokens_are_rejected(change, message):
    new = dict(zip(("query", "key", "value"), new_tokens(), strict=True))
    given = {"slots": STEP_SLOTS, "lengths": LENGTHS, "rotation": None, "slopes": None, "isa": None} | new | change
    kept = cache_tensors(torch.float32)
    before = kept[0].clone()
    with pytest.raises(ValueError, match=message):
        DecodeStep(given["slots"], given["lengths"], given["rotation"], given["slopes"]).attend(
            KvCacheBlock(*kept), given["query"], given["key"], given["value"], isa=given["isa"])
    assert torch.equal(kept[0], before)


def test_unsupported_reason():
    cpu = torch.device("cpu")
    assert unsupported_reason(128, torch.float16, cpu) is None
    assert "heads of 20" in unsupported_reason(20, torch.float16, cpu)
    assert "bfloat16" in unsupported_reason(128, torch.bfloat16, cpu)
    assert "cuda" in unsupported_reason(128, torch.float16, torch.device("cuda"))
