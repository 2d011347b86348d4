"""Scale and zero point of a group."""

import pytest
import torch

from gptq_belle.errors import InputError
from gptq_belle.quantization.grid import min_max_grid, to_codes


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
    with pytest.raises(InputError, match="too large for float16"):
        min_max_grid(torch.full((32, 1), 1e6), 4, sym=True)
