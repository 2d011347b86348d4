"""Scale refit and coordinate descent against exhaustive search (tests/oracle_exhaustive.py)."""

import numpy as np
import oracle_exhaustive
import pytest
import torch
from oracle_gptq import relative_error
from test_solver import problem

from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.refine import descend, refine, refit_scales
from gptq_belle.quantization.solver import candidate_weights, factorize, gptq


def solved(config, rows, columns, seed, **options):
    """Weight and Hessian in float64, and their solution by GPTQ alone."""
    weight, hessian = problem(rows, columns, seed, **options)
    return weight, hessian, gptq(weight, hessian, config).weight


def swept(quantized, weight, hessian, **options):
    """`refine` of a solution: codes (N, K) and scales (N, G)."""
    codes, scales = quantized.codes.t().contiguous(), quantized.scales.t().double().contiguous()
    refine(codes, scales, quantized.zeros.t().double(), weight.t().contiguous(), hessian, **options)
    return codes.t().numpy(), scales.t().numpy()


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize(("bits", "group_size", "sym"), [(2, 32, True), (3, -1, True), (4, 32, False), (4, 64, True)])
def test_every_step_equals_exhaustive_search(bits, group_size, sym, positive):
    config = QuantConfig(bits=bits, group_size=group_size, sym=sym, preset="fast")
    weight, hessian, quantized = solved(config, 3, 128, seed=bits)
    found = swept(quantized, weight, hessian, bits=bits, sweeps=2, positive=positive)
    expected = oracle_exhaustive.refined(*(t.double().numpy() for t in quantized[:3]), weight.numpy(), hessian.numpy(),
                                   bits=bits, sweeps=2, positive=positive)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert (found[0] != quantized.codes.numpy()).any()


def test_negative_scales_are_refined_too():
    """The sign of a scale is a convention: negated weights and scales give negated results, unless codes clamp."""
    weight, hessian, quantized = solved(QuantConfig(bits=8, group_size=32, preset="fast"), 4, 64, seed=1)
    weight = weight * 0.9  # no code at the edge, of which there is one more on one side
    codes, scales = swept(quantized, weight, hessian, bits=8, sweeps=2)
    mirrored = quantized._replace(scales=-quantized.scales)
    others, negatives = swept(mirrored, -weight, hessian, bits=8, sweeps=2)
    np.testing.assert_array_equal(codes, others)
    np.testing.assert_array_equal(scales, -negatives)


@pytest.mark.parametrize("seed", range(5))
def test_no_sweep_increases_the_error(seed):
    weight, hessian, quantized = solved(QuantConfig(bits=3, group_size=32, preset="fast"), 8, 96, seed)
    errors = []
    for sweeps in range(5):
        codes, scales = swept(quantized, weight, hessian, bits=3, sweeps=sweeps)
        errors.append(relative_error(weight.numpy(), np.repeat(scales, 32, 1) * (codes - 4.0), hessian.numpy()))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.95 * errors[0]


def test_a_ridge_is_added_to_the_diagonal_of_the_hessian():
    weight, hessian, quantized = solved(QuantConfig(bits=3, group_size=32, preset="fast"), 8, 96, seed=1)
    ridge = 0.5 * float(hessian.diagonal().mean())
    found = swept(quantized, weight, hessian, bits=3, sweeps=2, ridge=ridge)
    wanted = swept(quantized, weight, hessian + ridge * torch.eye(96), bits=3, sweeps=2)
    plain = swept(quantized, weight, hessian, bits=3, sweeps=2)
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_array_equal(found[1], wanted[1])
    assert (found[0] != plain[0]).any()


def test_never_active_inputs_and_zero_outputs_are_unchanged():
    weight, hessian = problem(4, 64, seed=2, dead=(5, 40))
    weight[1] = 0
    config = QuantConfig(group_size=32)
    before, after = candidate_weights(weight, hessian, config, factorize(hessian, config)).values()
    assert (after.codes[:, [5, 40]] == 8).all()
    assert (after.codes[1] == 8).all()
    assert (after.scales[1] == 1).all()
    assert (before.scales[1] == 1).all()


def test_a_group_without_codes_keeps_its_scale_and_residual():
    code, scale = torch.zeros(32, 3, dtype=torch.float64), torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    residual = torch.randn(32, 3, dtype=torch.float64)
    before = residual.clone()
    found = refit_scales(code, scale, residual, torch.eye(32, dtype=torch.float64))
    assert torch.equal(found, scale)
    assert torch.equal(residual, before)


def test_the_residual_follows_a_refit():
    weight, block = problem(5, 64, seed=3)
    scale = torch.full((5,), 0.5, dtype=torch.float64)
    code = (weight.t() / scale).round().clamp(-8, 7)
    residual = block @ (code * scale - weight.t())
    found = refit_scales(code, scale, residual, block)
    assert (found != scale).any()
    torch.testing.assert_close(residual, block @ (code * found - weight.t()), rtol=1e-9, atol=1e-9)


def test_descent_compensates_in_later_inputs():
    """The second of two equal inputs compensates the remaining error of the first."""
    block = torch.ones(2, 2, dtype=torch.float64)
    code, ones = torch.zeros(2, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    residual = block @ (code - torch.tensor([[9.4], [0.7]], dtype=torch.float64))
    descend(code, ones, 8 * ones, residual, block, torch.ones(2, dtype=torch.float64), 4)
    assert code.tolist() == [[7.0], [3.0]]  # 10.1 in all; the largest code is 7
