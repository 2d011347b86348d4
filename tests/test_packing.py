"""The packed format: literal words, exact round trips, and rejected input."""

import pytest
import torch
from conftest import naming
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_format import codes_along, formula

from gptq_belle.errors import InputError
from gptq_belle.formats.gptq_weight import PackedWeight, QuantizedWeight, dequantize, pack, unpack
from gptq_belle.formats.packing import pack_rows, packing_cycle, unpack_rows
from gptq_belle.formats.zero_points import V1, V2, stored_zeros, true_zeros

few = settings(max_examples=25, deadline=None)
bits_strategy = st.sampled_from([2, 3, 4, 8])


def unsigned(words):
    return [int(word) & 0xFFFFFFFF for word in words.flatten()]


def column(values):
    return torch.tensor(values).view(-1, 1)


@pytest.mark.parametrize(("bits", "codes", "words"), [
    (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4]),
    (3, list(range(8)) * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),  # 0o76543210 = 0xFAC688, four times end to end
    (3, [0] * 10 + [7] + [0] * 21, [0xC0000000, 0x00000001, 0]),  # code 10: two bits in one word, one in the next
    (3, [0] * 21 + [7] + [0] * 10, [0, 0x80000000, 0x00000003]),  # code 21: one bit, then two
    (4, list(range(8)), [0x76543210]),
    (4, list(range(8, 16)), [0xFEDCBA98]),
    (8, [1, 2, 3, 4], [0x04030201]),
    (8, [255] * 4, [0xFFFFFFFF]),
])
def test_codes_are_packed_into_known_words(bits, codes, words):
    packed = pack_rows(column(codes), bits)
    assert packed.dtype == torch.int32
    assert unsigned(packed) == words
    assert unpack_rows(packed, bits).flatten().tolist() == codes


@pytest.mark.parametrize(("bits", "checkpoint_format", "word"), [
    (4, V1, 0x77777777), (4, V2, 0x88888888), (8, V1, 0x7F7F7F7F), (8, V2, 0x80808080),
])
def test_symmetric_zero_words(bits, checkpoint_format, word):
    weight = random_weight(bits, 32, 32, 32, sym=True)
    packed = pack(weight, bits, checkpoint_format)
    assert set(unsigned(packed.qzeros)) == {word}
    assert packed.qzeros.shape == (1, bits)


def test_zero_point_of_16_is_stored_as_15_in_v1():
    zeros = torch.tensor([[16], [1], [16], [8], [1], [1], [1], [1]])
    weight = QuantizedWeight(torch.zeros(8, 8, dtype=torch.uint8), torch.ones(8, 1), zeros, torch.zeros(8).int())
    packed = pack(weight, 4, V1)
    assert unsigned(packed.qzeros) == [0x00007F0F]
    assert unpack(packed, 4, V1).zeros.flatten().tolist() == zeros.flatten().tolist()


def random_weight(bits, n, k, group, *, sym=False, checkpoint_format=V1):
    g_idx = (torch.arange(k) // group)[torch.randperm(k)]
    low = 1 if checkpoint_format == V1 else 0
    zeros = torch.randint(low, 2**bits + low, (n, k // group)).int()
    if sym:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    codes = torch.randint(0, 2**bits, (n, k)).to(torch.uint8)
    return QuantizedWeight(codes, torch.randn(n, k // group).half().float(), zeros, g_idx.int())


@few
@given(bits_strategy, st.integers(1, 3), st.integers(1, 3), st.sampled_from([V1, V2]), st.integers(0, 2**31))
def test_round_trip(bits, blocks_of_32, groups, checkpoint_format, seed):
    torch.manual_seed(seed)
    weight = random_weight(bits, 32 * blocks_of_32, 32 * groups, 32, checkpoint_format=checkpoint_format)
    packed = pack(weight, bits, checkpoint_format)
    for before, after in zip(weight, unpack(packed, bits, checkpoint_format), strict=True):
        assert torch.equal(before, after)
        assert before.dtype == after.dtype


@few
@given(bits_strategy, st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31))
def test_words_of_every_size_round_trip(bits, cycles, columns, seed):
    torch.manual_seed(seed)
    per_cycle, words = packing_cycle(bits)
    codes = torch.randint(0, 2**bits, (per_cycle * cycles, columns)).to(torch.uint8)
    packed = pack_rows(codes, bits)
    assert packed.shape == (words * cycles, columns)
    assert torch.equal(unpack_rows(packed, bits), codes)
    assert codes_along(packed.numpy().T, bits).T.tolist() == codes.tolist()


@pytest.mark.parametrize("checkpoint_format", [V1, V2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantize_equals_the_formula(bits, checkpoint_format):
    weight = random_weight(bits, 64, 96, 32, checkpoint_format=checkpoint_format)
    packed = pack(weight, bits, checkpoint_format)
    expected = formula(*packed, bits, v1=checkpoint_format == V1)
    assert torch.equal(dequantize(weight).double(), expected)


def test_shapes_and_dtypes_on_disk():
    packed = pack(random_weight(3, 64, 128, 32), 3)
    assert [tuple(t.shape) for t in packed] == [(12, 64), (4, 6), (4, 64), (128,)]
    assert [t.dtype for t in packed] == [torch.int32, torch.int32, torch.float16, torch.int32]
    assert isinstance(packed, PackedWeight)
    assert all(t.is_contiguous() for t in packed)


@pytest.mark.parametrize(("bits", "count"), [(2, 8), (3, 16), (4, 4), (8, 2)])
def test_codes_that_do_not_fill_whole_words_are_rejected(bits, count):
    with pytest.raises(InputError, match=naming(f"{bits}", f"{count}")):
        pack_rows(torch.zeros(count, 1, dtype=torch.uint8), bits)


def test_wrong_number_of_words_for_3_bits_is_rejected():
    with pytest.raises(InputError, match=naming("3", "4")):
        unpack_rows(torch.zeros(4, 1, dtype=torch.int32), 3)


@pytest.mark.parametrize(("zero", "checkpoint_format"), [(0, V1), (17, V1), (-1, V2), (16, V2)])
def test_zero_points_out_of_range_are_rejected(zero, checkpoint_format):
    with pytest.raises(InputError, match=naming(checkpoint_format, zero)):
        stored_zeros(torch.tensor([8, zero]), 4, checkpoint_format)


def test_true_zeros_do_not_wrap():
    assert true_zeros(torch.tensor([0, 7, 15]), V1).tolist() == [1, 8, 16]
    assert true_zeros(torch.tensor([0, 7, 15]), V2).tolist() == [0, 7, 15]
