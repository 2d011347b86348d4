"""Targets of the full-precision model, against least squares on the inputs themselves."""

import numpy as np
import pytest
import torch
from test_solver import problem

from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.solution_choice import full_precision_target
from gptq_belle.quantization.solver import factorize


def streams(columns, seed):
    """Weight (N, K), inputs X of the quantized model and F of the full-precision one, (tokens, K); float64."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * columns, columns)) @ (np.eye(columns) + 0.3 * rng.standard_normal((columns, columns)))
    return rng.standard_normal((5, columns)), x, x @ (np.eye(columns) + 0.05 * rng.standard_normal((columns, columns)))


@pytest.mark.parametrize("without", [(), ("order",)])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_targets_are_ridge_regression_on_the_full_outputs(alpha, without):
    weight, x, full = streams(32, seed=1)
    hessian, cross = x.T @ x / len(x), (full - x).T @ x / len(x)
    factor = factorize(torch.from_numpy(hessian), QuantConfig(group_size=32, damp=0.05, without=without))
    found = full_precision_target(torch.from_numpy(weight), torch.from_numpy(cross), factor, alpha)
    # min ||(W + D) X - W F||^2 + ridge ||D||^2, as rows that lstsq sees below the inputs
    ridge = np.sqrt(len(x) * 0.05 * np.mean(np.diag(hessian)))
    rows = np.concatenate([x, ridge * np.eye(32)])
    wanted = np.concatenate([(full - x) @ weight.T, np.zeros((32, 5))])
    moved = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), weight + alpha * moved, rtol=1e-8, atol=1e-10)


def test_equal_streams_leave_the_weight_alone():
    weight, hessian = problem(4, 32, seed=2)
    factor = factorize(hessian, QuantConfig(group_size=32))
    assert torch.equal(full_precision_target(weight, torch.zeros_like(hessian), factor, 1.0), weight)
