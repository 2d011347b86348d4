"""The native attention of a decoding step against softmax in float64: every cache, ALiBi, shared keys, any length."""

import pytest
import torch

from gptq_belle.kernels.cpu_attention import attend, refusal
from gptq_belle.kernels.library import library
from gptq_belle.runtime.cache import quantized

if isinstance(library(), str):
    pytest.skip(library(), allow_module_level=True)
SLOTS, CAPACITY = 5, 300


def case(dtype, heads=4, kv_heads=2, size=48, rows=4):
    keys, values = torch.randn(2, SLOTS, kv_heads, CAPACITY, size)
    scales = None
    if dtype == torch.int8:
        (keys, first), (values, second) = quantized(keys), quantized(values)
        scales = first, second
    query = torch.randn(rows, 3 * heads, size)[:, heads : 2 * heads]  # as it lies between others
    slots = torch.tensor([3, 0, 4, 1])[:rows]
    lengths = torch.tensor([1, 64, 65, CAPACITY])[:rows]
    return query, keys.to(dtype), values.to(dtype), slots, lengths, scales


def expected(query, keys, values, slots, lengths, scales, slopes=None):
    keys, values = keys.double(), values.double()
    if scales is not None:
        keys, values = keys * scales[0].double(), values * scales[1].double()
    out = []
    for row, slot, length in zip(query.double(), slots, lengths, strict=True):
        group = len(row) // keys.shape[1]
        k, v = (t[slot, :, :length].repeat_interleave(group, 0) for t in (keys, values))
        scores = torch.einsum("hd,htd->ht", row, k) / row.shape[-1] ** 0.5
        if slopes is not None:
            scores += slopes.double()[:, None] * torch.arange(1 - int(length), 1)
        out.append(torch.einsum("ht,htd->hd", scores.softmax(-1), v))
    return torch.stack(out)


@pytest.mark.parametrize("isa", library().usable)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 48), (3, 3, 16), (8, 1, 64), (2, 2, 128), (6, 2, 80)])
def test_attention(isa, dtype, heads, kv_heads, size):
    query, *rest = case(dtype, heads, kv_heads, size)
    for slopes in (None, torch.rand(heads)):
        found = attend(query, *rest[:4], scales=rest[4], slopes=slopes, isa=isa)
        torch.testing.assert_close(found.double(), expected(query, *rest, slopes), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_is_the_same_to_the_bit_alone(threads):
    torch.set_num_threads(threads)
    query, keys, values, slots, lengths, _ = case(torch.float16, size=128)
    together = attend(query, keys, values, slots, lengths)
    torch.set_num_threads(1)
    for i in range(4):
        alone = attend(query[i : i + 1], keys, values, slots[i : i + 1], lengths[i : i + 1])
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("scale", [1e-4, 30.0])
def test_flat_and_steep_scores(scale):
    query, *rest = case(torch.float32)
    found = attend(query * scale, *rest[:4])
    torch.testing.assert_close(found.double(), expected(query * scale, *rest), rtol=1e-4, atol=1e-5)


def test_what_stands_behind_a_sequence_is_not_read():
    query, keys, values, slots, lengths, _ = case(torch.float32)
    before = attend(query, keys, values, slots, lengths)
    keys[3, :, 1:], values[3, :, 1:] = torch.nan, torch.nan
    assert torch.equal(attend(query, keys, values, slots, lengths), before)


@pytest.mark.parametrize(("change", "message"), [
    ({"slots": torch.tensor([5, 0, 0, 0])}, "beyond the cache's 5 and 300"),
    ({"slots": torch.tensor([-1, 0, 0, 0])}, "beyond"), ({"lengths": torch.tensor([0, 1, 1, 1])}, "beyond"),
    ({"lengths": torch.tensor([301, 1, 1, 1])}, "beyond"), ({"slots": torch.zeros(3, dtype=torch.int64)}, "slots"),
    ({"lengths": torch.ones(4, dtype=torch.int32)}, "lengths"), ({"query": torch.randn(4, 3, 48)}, "3 heads"),
    ({"query": torch.randn(4, 4, 32)}, "heads of 32"), ({"query": torch.randn(4, 4, 48).half()}, "float16"),
    ({"values": torch.randn(5, 2, 299, 48)}, "values"), ({"keys": torch.zeros(5, 2, 300, 48).double()}, "float64"),
    ({"scales": (torch.ones(1), torch.ones(1))}, "with scales"), ({"slopes": torch.ones(3)}, "slopes"),
    ({"isa": "x"}, "instruction set")])
def test_what_does_not_fit_is_refused(change, message):
    names = ("query", "keys", "values", "slots", "lengths", "scales")
    arguments = dict(zip(names, case(torch.float32), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        attend(arguments.pop("query"), arguments.pop("keys"), arguments.pop("values"), arguments.pop("slots"),
               arguments.pop("lengths"), **arguments)


def test_refusal():
    cpu = torch.device("cpu")
    assert refusal(128, torch.float16, cpu) is None
    assert "heads of 20" in refusal(20, torch.float16, cpu)
    assert "bfloat16" in refusal(128, torch.bfloat16, cpu)
    assert "cuda" in refusal(128, torch.float16, torch.device("cuda"))
