"""The order in which inputs are quantized, and the groups that follow from it."""

import pytest
import torch

from gptq_belle.quantization.activation_order import (
    activation_order,
    group_and_solve_order,
    group_indices,
    permuted,
    unpermuted,
)
from gptq_belle.quantization.config import QuantConfig

ORDER = torch.tensor([2, 0, 3, 1])
PLAIN, ACT_ORDER = QuantConfig(preset="fast"), QuantConfig(preset="fast", act_order=True)
STATIC = QuantConfig(preset="best")


@pytest.mark.parametrize("config", [ACT_ORDER, STATIC])
def test_most_active_inputs_come_first_and_equal_ones_keep_their_order(config):
    hessian = torch.diag(torch.tensor([2.0, 5.0, 2.0, 0.0, 7.0]))  # an input that was never active counts as 1
    assert activation_order(hessian, config).tolist() == [4, 1, 0, 2, 3]


def test_plain_gptq_keeps_the_order_of_the_layer():
    assert activation_order(torch.eye(4), PLAIN) is None


def test_groups_follow_the_order_with_act_order_only():
    assert group_and_solve_order(ORDER, ACT_ORDER) == (ORDER, None)
    assert group_and_solve_order(ORDER, STATIC) == (None, ORDER)


@pytest.mark.parametrize("dim", [0, 1])
def test_restored_is_the_inverse_of_permuted(dim):
    matrix = torch.arange(16).view(4, 4)
    moved = permuted(matrix, ORDER, dim)
    assert moved.select(dim, 0).tolist() == matrix.select(dim, 2).tolist()
    assert torch.equal(unpermuted(moved, ORDER, dim), matrix)
    assert permuted(matrix, None, dim) is unpermuted(matrix, None, dim) is matrix


def test_group_of_each_input():
    assert group_indices(4, 2, None, torch.device("cpu")).tolist() == [0, 0, 1, 1]
    assert group_indices(4, 2, ORDER, torch.device("cpu")).tolist() == [0, 1, 0, 1]
