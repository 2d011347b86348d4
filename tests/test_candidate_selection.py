"""The choice among solutions on held-out rows, and the full-precision target against least squares."""

import numpy as np
import pytest
import torch
from test_solver import problem

from gptq_belle.formats.gptq_weight import dequantize
from gptq_belle.quantization.candidate_selection import best_solution, full_precision_target
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.solver import factorize
from gptq_belle.quantization.stage_hessians import StageHessians

NAMES = ["own gptq", "own refined", "full gptq", "full refined"]


def problem_of_two_models(columns, seed):
    """Weight (N, K), inputs X of the quantized model and F of the full-precision one, (tokens, K); float64."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * columns, columns)) @ (np.eye(columns) + 0.3 * rng.standard_normal((columns, columns)))
    return rng.standard_normal((5, columns)), x, x @ (np.eye(columns) + 0.05 * rng.standard_normal((columns, columns)))


@pytest.mark.parametrize("without", [(), ("order",)])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_targets_are_ridge_regression_on_the_full_outputs(alpha, without):
    weight, x, full = problem_of_two_models(32, seed=1)
    hessian, cross = x.T @ x / len(x), (full - x).T @ x / len(x)
    factor = factorize(torch.from_numpy(hessian), QuantConfig(group_size=32, damp=0.05, without=without))
    found = full_precision_target(torch.from_numpy(weight), torch.from_numpy(cross), factor, alpha)
    # min ||(W + D) X - W F||^2 + ridge ||D||^2, the ridge as additional rows for lstsq
    ridge = np.sqrt(len(x) * 0.05 * np.mean(np.diag(hessian)))
    rows = np.concatenate([x, ridge * np.eye(32)])
    wanted = np.concatenate([(full - x) @ weight.T, np.zeros((32, 5))])
    moved = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), weight + alpha * moved, rtol=1e-8, atol=1e-10)


def test_equal_activations_leave_the_weight_unchanged():
    weight, hessian = problem(4, 32, seed=2)
    factor = factorize(hessian, QuantConfig(group_size=32))
    assert torch.equal(full_precision_target(weight, torch.zeros_like(hessian), factor, 1.0), weight)


def inputs(seed=1, gap=1.0):
    """Weight, and Hessians with held-out rows; `gap` scales the difference of the models in the Hessian's rows."""
    weight, x, full = (torch.from_numpy(part).float() for part in problem_of_two_models(64, seed))
    seen, held = slice(0, 192), slice(192, None)
    cross = gap * (full - x)[seen].t() @ x[seen] / 192
    return weight, StageHessians(x[seen].t() @ x[seen] / 192, cross, [(x[held], full[held])])


def chosen(weight, hessians, **options):
    config = QuantConfig(bits=3, group_size=32, **options)
    return best_solution(weight, hessians, factorize(hessians.hessian, config), config)


def test_candidate_with_least_held_out_error_is_chosen():
    weight, hessians = inputs()
    choice = chosen(weight, hessians)
    assert list(choice.held_out) == NAMES
    assert choice.held_out[choice.won] == min(choice.held_out.values())
    (x, full), = hessians.held_out
    wanted = full.double().numpy() @ weight.double().numpy().T
    got = x.double().numpy() @ dequantize(choice.solution.weight).double().numpy().T
    assert choice.held_out[choice.won] == pytest.approx(np.sum((got - wanted) ** 2) / np.sum(wanted**2), rel=1e-4)


def test_full_precision_targets_are_chosen_only_where_they_generalize():
    assert chosen(*inputs()).won.startswith("full")
    assert chosen(*inputs(gap=-3.0)).won.startswith("own")


def test_without_held_out_rows_the_last_candidate_is_taken():
    weight, hessians = inputs(gap=-3.0)
    choice = chosen(weight, hessians._replace(held_out=()))
    assert choice.won == "full refined"
    assert choice.held_out == {}


def test_equal_models_and_disabled_techniques_give_no_candidates():
    weight, hessians = inputs(gap=0.0)
    assert list(chosen(weight, hessians).held_out) == NAMES[:2]
    assert list(chosen(weight, hessians._replace(cross=None), without=("refine", "targets")).held_out) == NAMES[:1]
