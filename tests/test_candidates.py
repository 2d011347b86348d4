"""Which solution is taken: by rows that none has seen, or the recipe's last word where there are none."""

import numpy as np
import pytest
import torch
from test_targets import streams

from gptq_belle.formats.gptq_weight import dequantize
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.solution_choice import best_solution
from gptq_belle.quantization.solver import factorize
from gptq_belle.quantization.stage_hessians import StageHessians

NAMES = ["own gptq", "own refined", "full gptq", "full refined"]


def inputs(seed=1, gap=1.0):
    """Weight, and moments with held-out rows; `gap` scales the models' difference in the rows that are seen."""
    weight, x, full = (torch.from_numpy(part).float() for part in streams(64, seed))
    seen, held = slice(0, 192), slice(192, None)
    cross = gap * (full - x)[seen].t() @ x[seen] / 192
    return weight, StageHessians(x[seen].t() @ x[seen] / 192, cross, [(x[held], full[held])])


def chosen(weight, moments, **options):
    config = QuantConfig(bits=3, group_size=32, **options)
    return best_solution(weight, moments, factorize(moments.hessian, config), config)


def test_the_choice_has_the_least_error_on_held_out_rows():
    weight, moments = inputs()
    choice = chosen(weight, moments)
    assert list(choice.held_out) == NAMES
    assert choice.held_out[choice.won] == min(choice.held_out.values())
    (x, full), = moments.held_out
    wanted = full.double().numpy() @ weight.double().numpy().T
    got = x.double().numpy() @ dequantize(choice.solution.weight).double().numpy().T
    assert choice.held_out[choice.won] == pytest.approx(np.sum((got - wanted) ** 2) / np.sum(wanted**2), rel=1e-4)


def test_targets_win_where_the_models_differ_alike_and_lose_where_they_mislead():
    assert chosen(*inputs()).won.startswith("full")
    assert chosen(*inputs(gap=-3.0)).won.startswith("own")


def test_without_held_out_rows_the_recipes_last_word_counts():
    weight, moments = inputs(gap=-3.0)
    choice = chosen(weight, moments._replace(held_out=()))
    assert choice.won == "full refined"
    assert choice.held_out == {}


def test_equal_models_and_switched_off_ideas_are_no_candidates():
    weight, moments = inputs(gap=0.0)
    assert list(chosen(weight, moments).held_out) == NAMES[:2]
    assert list(chosen(weight, moments._replace(cross=None), without=("refine", "targets")).held_out) == NAMES[:1]
