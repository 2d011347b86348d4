"""Norms and activation functions against float64, at widths that do not fill a register, and row by row."""

import math

import pytest
import torch
from torch.nn import functional as F

from gptq_belle.kernels import cpu_elementwise
from gptq_belle.kernels.cpu_elementwise import LayerNorm, RmsNorm, gelu_, silu_and_mul
from gptq_belle.kernels.native_library import NativeLibrary, load_library


def rms_norm(x, weight, eps):
    return RmsNorm(weight, eps)(x)


def expected(x, weight, eps):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("width", [1, 15, 16, 17, 100, 4096])
@pytest.mark.parametrize("rows", [(), (1,), (3,), (2, 5), (40,)])
@pytest.mark.parametrize("threads", [1, 2])
def test_rms_norm_against_float64(width, rows, threads):
    torch.set_num_threads(threads)
    x, weight = 30 * torch.randn(*rows, width), torch.randn(width)
    found = rms_norm(x, weight, 1e-5)
    assert found.shape == x.shape
    torch.testing.assert_close(found.double(), expected(x, weight, 1e-5), rtol=2e-6, atol=1e-6)


def test_rms_norm_of_zeros_and_of_values_near_eps():
    assert not rms_norm(torch.zeros(2, 32), torch.ones(32), 1e-6).any()
    torch.testing.assert_close(rms_norm(torch.full((1, 64), 1e-3), torch.ones(64), 1e-6), torch.full((1, 64), 0.5**0.5))


def test_nan_and_infinity_affect_their_row_only():
    x = torch.randn(3, 64)
    x[0, 5], x[1, 7] = torch.nan, torch.inf
    found, weight = rms_norm(x, torch.ones(64), 1e-6), torch.ones(64)
    assert found[0].isnan().all()
    assert found[1, 7].isnan()
    assert torch.equal(found[2], rms_norm(x[2], weight, 1e-6))


def test_normalized_row_has_the_same_bits_in_a_batch_and_alone():
    torch.set_num_threads(2)
    x, weight = torch.randn(70, 4096), torch.randn(4096)
    together = rms_norm(x, weight, 1e-6)
    assert all(torch.equal(rms_norm(row, weight, 1e-6), found) for row, found in zip(x, together, strict=True))


@pytest.mark.parametrize("case", ["bfloat16", "strided", "no library", "gradient"])
def test_torch_normalizes_tensors_that_the_kernel_does_not_take(case, monkeypatch):
    x, weight = torch.randn(4, 64), torch.randn(64)
    if case == "no library":
        monkeypatch.setattr(cpu_elementwise, "load_library", lambda: "not built")
    x = {"bfloat16": x.bfloat16(), "strided": torch.randn(64, 4).t()}.get(case, x).requires_grad_(case == "gradient")
    found = rms_norm(x, weight, 1e-6)
    assert torch.equal(found, F.rms_norm(x, (64,), weight, 1e-6))
    assert found.requires_grad == (case == "gradient")


def test_another_width_is_rejected():
    with pytest.raises(ValueError, match="weight"):
        rms_norm(torch.randn(2, 64), torch.randn(32), 1e-6)


def exact_silu_and_mul(x):
    gate, up = x.double().chunk(2, -1)
    return gate / (1 + (-gate).exp()) * up


@pytest.mark.parametrize("width", [1, 15, 16, 17, 11008])
@pytest.mark.parametrize("rows", [(), (1,), (3,), (2, 5), (40,)])
@pytest.mark.parametrize("threads", [1, 2])
def test_silu_and_mul_against_float64(width, rows, threads):
    torch.set_num_threads(threads)
    x = 5 * torch.randn(*rows, 2 * width)
    found = silu_and_mul(x)
    assert found.shape == (*rows, width)
    torch.testing.assert_close(found.double(), exact_silu_and_mul(x), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("isa", load_library().usable_isas if isinstance(load_library(), NativeLibrary) else ())
def test_silu_and_mul_with_every_instruction_set(isa, monkeypatch):
    monkeypatch.setattr(load_library(), "isa", isa)
    x = torch.linspace(-200, 200, 4001).repeat_interleave(2).view(-1, 2).t().reshape(1, -1)
    torch.testing.assert_close(silu_and_mul(x).double(), exact_silu_and_mul(x), rtol=2e-6, atol=1e-30)


def test_nan_and_infinity_in_silu_and_mul():
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0, 1.0, 2.0, 3.0, torch.nan]])
    found = silu_and_mul(x)[0]
    assert found[0].isnan()
    assert found[1] == torch.inf
    assert found[2].isnan()  # as in torch: minus infinity times 0
    assert found[3].isnan()
    huge = torch.tensor([[-3e38, 3e38, 1.0, 1.0]])
    assert torch.equal(silu_and_mul(huge), torch.tensor([[-0.0, 3e38]]))
    assert torch.equal(gelu_(torch.tensor([-1e38, -1e30, 1e30])), torch.tensor([-0.0, -0.0, 1e30]))


def test_silu_and_mul_row_has_the_same_bits_in_a_batch_and_alone():
    torch.set_num_threads(2)
    x = torch.randn(70, 4096)
    assert all(torch.equal(silu_and_mul(row), found) for row, found in zip(x, silu_and_mul(x), strict=True))


@pytest.mark.parametrize("case", ["bfloat16", "strided", "no library", "gradient"])
def test_torch_computes_silu_and_mul_of_other_tensors(case, monkeypatch):
    x = torch.randn(4, 64)
    if case == "no library":
        monkeypatch.setattr(cpu_elementwise, "load_library", lambda: "not built")
    x = {"bfloat16": x.bfloat16(), "strided": torch.randn(64, 4).t()}.get(case, x).requires_grad_(case == "gradient")
    found = silu_and_mul(x)
    assert torch.equal(found, F.silu(x[:, :32]) * x[:, 32:])
    assert found.requires_grad == (case == "gradient")


def test_odd_width_is_rejected():
    with pytest.raises(ValueError, match="33"):
        silu_and_mul(torch.randn(2, 33))


@pytest.mark.parametrize("width", [1, 15, 17, 4096])
@pytest.mark.parametrize("rows", [(), (3,), (2, 5), (40,)])
def test_layer_norm_against_float64(width, rows):
    torch.set_num_threads(2)
    x, weight, bias = 30 * torch.randn(*rows, width) + 100, torch.randn(width), torch.randn(width)
    norm, exact = LayerNorm(weight, bias, 1e-5), x.double() - x.double().mean(-1, keepdim=True)
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double() + bias.double()
    found = norm(x)
    torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=2e-5)
    assert all(torch.equal(norm(row), one) for row, one in zip(x.view(-1, width), found.view(-1, width), strict=True))
    torch.testing.assert_close(norm(x.bfloat16().float()), F.layer_norm(x.bfloat16().float(), (width,), weight, bias),
                               rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="weight"):
        norm(torch.randn(2, width + 1))


@pytest.mark.parametrize("isa", load_library().usable_isas if isinstance(load_library(), NativeLibrary) else ())
def test_gelu_against_float64(isa, monkeypatch):
    monkeypatch.setattr(load_library(), "isa", isa)
    x = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([0.0, -0.0, 1e4, -1e4, torch.inf])])
    wide = x.double()
    exact = wide / 2 * (1 + (math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)).tanh())
    found = x.clone()
    assert gelu_(found) is found
    torch.testing.assert_close(found.double(), exact, rtol=4e-6, atol=4e-7)
    assert gelu_(torch.tensor([torch.nan])).isnan()


@pytest.mark.parametrize("case", ["bfloat16", "strided", "no library"])
def test_torch_computes_gelu_of_other_tensors(case, monkeypatch):
    x = torch.randn(4, 64)
    if case == "no library":
        monkeypatch.setattr(cpu_elementwise, "load_library", lambda: "not built")
    x = {"bfloat16": x.bfloat16(), "strided": torch.randn(64, 4).t()}.get(case, x)
    wanted = F.gelu(x, approximate="tanh")
    assert torch.equal(gelu_(x), wanted)
