"""Accumulation of X^T X, and the factor of its inverse."""

import pytest
import torch
from conftest import naming

from gptq_belle.errors import InputError
from gptq_belle.quantization.hessian import HessianMean, inverse_cholesky


def test_mean_does_not_depend_on_batching():
    x = torch.randn(60, 16)
    total = HessianMean(16)
    for batch in x.view(5, 3, 4, 16).split([2, 1, 2]):
        total.add(batch.half().float())
    exact = x.half().double()
    assert total.tokens == 60
    assert torch.allclose(total.value.double(), exact.t() @ exact / 60, atol=1e-5)


def test_half_precision_activations_are_summed_in_float32():
    total = HessianMean(4)
    for _ in range(4):
        total.add(torch.full((1000, 4), 0.1, dtype=torch.float16))
    assert total.value.dtype == torch.float32
    assert torch.allclose(total.value, torch.full((4, 4), float(torch.tensor(0.1).half()) ** 2), rtol=1e-4)


def test_factor_of_the_damped_inverse():
    x = torch.randn(100, 24, dtype=torch.float64)
    hessian = x.t() @ x
    upper, damp = inverse_cholesky(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    assert damp == 0.01
    assert torch.allclose(upper.t() @ upper, damped.inverse())
    assert torch.equal(upper, upper.triu())


def test_damping_is_raised_tenfold_and_then_fails():
    hessian = torch.eye(8, dtype=torch.float64)
    hessian[0, 0] = -0.03
    assert inverse_cholesky(hessian, 0.01)[1] == pytest.approx(0.1)
    hessian[0, 0] = -5
    with pytest.raises(InputError, match=naming(1)):
        inverse_cholesky(hessian, 0.01)


def test_wide_hessian_is_symmetric_and_readable_between_batches():
    x = torch.randn(300, 1300)
    total = HessianMean(1300)
    total.add(x[:100])
    assert torch.allclose(total.value, x[:100].t() @ x[:100] / 100, atol=1e-4)
    total.add(x[100:])
    exact = x.double().t() @ x.double() / 300
    assert torch.allclose(total.value.double(), exact, atol=1e-5)
    assert torch.equal(total.value[:512, 512:], total.value[512:, :512].t())
