"""The reference kernel against the formula in NumPy, for everything that the format allows."""

import pytest
import torch
from conftest import TOLERANCES
from oracle_format import codes_along, formula, random_words

from gptq_belle.formats import gptq_weight, packing, zero_points
from gptq_belle.kernels import reference
from gptq_belle.kernels.layout import checked_weight

BITS = [2, 3, 4, 8]
# Inputs and group size; (160, 64) and (96, 64) end in a short group, as old files may.
GROUPS = [(128, 32), (128, 64), (256, 128), (96, -1), (160, 64), (96, 64)]


def weight_and_formula(bits, inputs, outputs, group_size, *, v1=True, act_order=False):
    words = random_words(bits, inputs, outputs, group_size, act_order=act_order)
    weight = checked_weight(*words.values(), bits, 1 if v1 else 0)
    return weight, formula(*words.values(), bits, v1=v1)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("v1", [True, False])
@pytest.mark.parametrize(("inputs", "group_size"), GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_equals_the_formula(bits, inputs, group_size, v1, act_order):
    weight, expected = weight_and_formula(bits, inputs, 64, group_size, v1=v1, act_order=act_order)
    assert torch.equal(reference.dequantize(weight).double().t(), expected)
    assert torch.equal(reference.dequantize(weight, torch.float64).t(), expected)


@pytest.mark.parametrize(("bits", "outputs"), [(2, 16), (3, 32), (4, 8), (8, 4), (4, 24), (8, 12), (2, 48)])
def test_small_and_odd_numbers_of_outputs(bits, outputs):
    weight, expected = weight_and_formula(bits, 32, outputs, 32)
    assert torch.equal(reference.dequantize(weight).double().t(), expected)


@pytest.mark.parametrize("bits", BITS)
def test_unpack_agrees_with_packing(bits):
    words = random_words(bits, 96, 32, 32)["qweight"]
    ours = reference.unpack(words, bits)
    assert torch.equal(ours, packing.unpack_rows(words, bits).int())
    assert ours.t().tolist() == codes_along(words.numpy().T, bits).tolist()


@pytest.mark.parametrize("checkpoint_format", [zero_points.V1, zero_points.V2])
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_agrees_with_packing(bits, checkpoint_format):
    v1 = checkpoint_format == zero_points.V1
    weight, _ = weight_and_formula(bits, 128, 64, 32, v1=v1, act_order=True)
    packed = gptq_weight.PackedWeight(*weight[:4])
    theirs = gptq_weight.dequantize(gptq_weight.unpack(packed, bits, checkpoint_format))
    assert torch.equal(reference.dequantize(weight).t(), theirs)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_quant_matmul(dtype):
    weight, expected = weight_and_formula(4, 128, 64, 32, act_order=True)
    x, bias = torch.randn(2, 3, 128).to(dtype), torch.randn(64)
    y = reference.quant_matmul(x, weight, bias)
    assert y.dtype == dtype
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(y.double(), x.double() @ expected.t() + bias, rtol=rtol, atol=atol)
    torch.testing.assert_close(reference.quant_matmul(x[0, 0], weight, bias), y[0, 0], rtol=rtol, atol=atol)


def test_v1_stored_15_means_16():
    words = random_words(4, 32, 8, 32)
    words["qzeros"].fill_(-1)
    weight = checked_weight(*words.values(), 4, 1)
    codes = reference.unpack(words["qweight"], 4)
    assert torch.equal(reference.dequantize(weight), (codes - 16) * words["scales"].float())


def test_v2_stored_0_means_0():
    words = random_words(4, 32, 8, 32)
    words["qzeros"].fill_(0)
    weight = checked_weight(*words.values(), 4, 0)
    assert torch.equal(reference.dequantize(weight), reference.unpack(words["qweight"], 4) * words["scales"].float())
