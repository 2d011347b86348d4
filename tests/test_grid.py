"""Scale and zero point of a group."""

import oracle_exhaustive
import pytest
import torch
from conftest import naming

from gptq_belle.errors import InputError
from gptq_belle.quantization import grid
from gptq_belle.quantization.grid import min_max_grid, searched_grid, to_codes


def test_symmetric_span_is_twice_the_largest_magnitude():
    weight = torch.tensor([[-3.0, 0.5], [1.5, 0.25]])
    scales, zeros = min_max_grid(weight, 4, sym=True)
    assert torch.equal(scales, (torch.tensor([6 / 15, 1 / 15])).half().float())
    assert zeros.tolist() == [8, 8]


def test_asymmetric_grid_reaches_both_ends():
    weight = torch.linspace(-1, 2, 32).unsqueeze(1)
    scales, zeros = min_max_grid(weight, 4, sym=False)
    codes = to_codes(weight, scales, zeros, 4)
    assert (codes.min(), codes.max()) == (0, 15)
    assert ((codes - zeros) * scales - weight).abs().max() <= scales / 2 + 1e-3


def test_all_positive_groups_have_zero_point_zero():
    _, zeros = min_max_grid(torch.rand(32, 4) + 1, 4, sym=False)
    assert zeros.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("sym", [True, False])
def test_an_all_zero_group_has_scale_one_and_decodes_to_zero(sym):
    weight = torch.zeros(32, 3)
    scales, zeros = min_max_grid(weight, 4, sym)
    assert scales.tolist() == [1, 1, 1]
    assert torch.equal(to_codes(weight, scales, zeros, 4), zeros.expand(32, 3))


def test_weights_beyond_float16_scales_are_refused():
    with pytest.raises(InputError, match=naming("float16")):
        min_max_grid(torch.full((32, 1), 1e6), 4, sym=True)


# The weighted search against trying every span (tests/oracle_exhaustive.py).


def error(weight, importance, scale, zero, bits):
    return float(importance @ (oracle_exhaustive.rounded(weight, scale, zero, bits) - weight) ** 2)


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_search_finds_the_best_span(bits, sym, positive):
    weight, importance = torch.randn(32, 24, dtype=torch.float64) ** 3, torch.rand(32, dtype=torch.float64) ** 2 + 0.01
    scales, zeros = searched_grid(weight, importance, bits, sym, positive=positive)
    assert bool((scales > 0).all()) == (positive or not sym)
    assert torch.equal(scales, scales.half().double())
    for output in range(24):
        column = weight[:, output].numpy()
        found = error(column, importance.numpy(), float(scales[output]), int(zeros[output]), bits)
        expected = oracle_exhaustive.searched(column, importance.numpy(), bits, sym, positive)
        assert found == pytest.approx(expected, rel=1e-12)


def test_single_large_weight_is_represented_exactly():
    """absmax / 2**(b-1) is a candidate: it gives the additional code below zero to the largest weight."""
    weight = torch.zeros(32, 2)
    weight[3] = torch.tensor([4.0, -4.0])
    scales, zeros = searched_grid(weight, torch.ones(32), 4, sym=True)
    assert scales.tolist() == [-0.5, 0.5]
    assert to_codes(weight, scales, zeros, 4)[3].tolist() == [0, 0]


def test_search_weighs_errors_by_importance():
    weight = torch.tensor([[1.0], [0.11], [0.13], [-0.09]]).repeat(8, 1)
    small = (weight.abs() < 1).flatten()
    losses = []
    for importance in (torch.ones(32), torch.where(small, 1.0, 1e-6)):
        scales, zeros = searched_grid(weight, importance, 3, sym=True)
        decoded = (to_codes(weight, scales, zeros, 3) - zeros) * scales
        losses.append(float((decoded - weight)[small].square().sum()))
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("size", [0, 1e-7])
def test_searched_group_of_tiny_weights_has_scale_one_and_decodes_to_zero(size, sym):
    weight = size * torch.randn(32, 3)
    scales, zeros = searched_grid(weight, torch.ones(32), 4, sym)
    assert scales.tolist() == [1, 1, 1]
    assert torch.equal(to_codes(weight, scales, zeros, 4), zeros.expand(32, 3))


def test_search_in_chunks_equals_search_at_once(monkeypatch):
    weight, importance = torch.randn(32, 50), torch.rand(32)
    whole = searched_grid(weight, importance, 4, sym=True)
    monkeypatch.setattr(grid, "VALUES_AT_A_TIME", 32 * 7)
    parts = searched_grid(weight, importance, 4, sym=True)
    assert torch.equal(whole[0], parts[0])


def test_a_search_refuses_weights_beyond_float16_scales():
    with pytest.raises(InputError, match=naming("float16")):
        searched_grid(torch.full((32, 1), 1e6), torch.ones(32), 4, sym=True)
