"""KV cache: written keys and values are read back with the precision of the dtype; slots are independent."""

import pytest
import torch
from conftest import naming

from gptq_belle.engine.kv_cache import KVCache, quantize_int8
from gptq_belle.errors import HardwareError, UsageError

CPU = torch.device("cpu")


@pytest.mark.parametrize(("kind", "step"), [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_written_keys_and_values_are_read_back(kind, step):
    cache = KVCache(2, 3, 2, 10, 8, kind, CPU)
    pieces = [(0, 0, torch.randn(4, 2, 8)), (2, 0, torch.randn(3, 2, 8)), (0, 4, torch.randn(1, 2, 8)),
              (2, 3, torch.randn(7, 2, 8))]
    for slot, start, new in pieces:
        cache.write(1, slot, start, new, -new)
    for slot, length in ((0, 5), (2, 10)):
        wanted = torch.cat([new for s, _, new in pieces if s == slot]).transpose(0, 1)
        keys, values = cache.read(1, slot, length, torch.float32)
        assert (keys - wanted).abs().max() <= step * wanted.abs().max()
        assert torch.equal(values, -keys)


def test_int8_error_is_at_most_half_a_step():
    cache, new = KVCache(1, 1, 2, 5, 64, "int8", CPU), torch.randn(5, 2, 64) * torch.tensor([1e-3, 50.0]).view(1, 2, 1)
    cache.write(0, 0, 0, new, new * 2)
    keys, values = cache.read(0, 0, 5, torch.float32)
    for found, wanted in ((keys, new), (values, new * 2)):
        wanted = wanted.transpose(0, 1)
        step = wanted.abs().amax(-1, keepdim=True) / 127
        assert ((found - wanted).abs() <= 0.55 * step).all()  # the scale itself is rounded to float16


def test_int8_cache_of_zeros_stays_zero():
    codes, scales = quantize_int8(torch.zeros(3, 4))
    assert not codes.any()
    assert (scales > 0).all()


def test_nbytes():
    assert KVCache(2, 3, 2, 10, 8, "float16", CPU).nbytes == 2 * 2 * 3 * 2 * 10 * 8 * 2
    assert KVCache(2, 3, 2, 10, 8, "int8", CPU).nbytes == 2 * 2 * 3 * 2 * 10 * (8 + 2)


def test_copy_of_the_first_positions_of_a_slot():
    cache = KVCache(1, 2, 1, 4, 8, "int8", CPU)
    new = torch.randn(3, 1, 8)
    cache.write(0, 0, 0, new, new)
    cache.copy(0, 1, 2)
    assert torch.equal(cache.read(0, 1, 2, torch.float32)[0], cache.read(0, 0, 2, torch.float32)[0])


def test_unknown_dtype_and_too_large_cache_are_refused():
    with pytest.raises(UsageError, match=naming("int3")):
        KVCache(1, 1, 1, 1, 8, "int3", CPU)
    with pytest.raises(HardwareError, match=naming(4096, 1 << 30)):
        KVCache(1, 4096, 4096, 1 << 30, 128, "float16", CPU)
