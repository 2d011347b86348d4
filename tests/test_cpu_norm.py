"""RMS normalisation against float64, at widths that fill no register, and row by row."""

import pytest
import torch
from torch.nn import functional as F

from gptq_belle.kernels import cpu_norm
from gptq_belle.kernels.cpu_norm import rms_norm


def expected(x, weight, eps):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("width", [1, 15, 16, 17, 100, 4096])
@pytest.mark.parametrize("rows", [(), (1,), (3,), (2, 5), (40,)])
@pytest.mark.parametrize("threads", [1, 2])
def test_against_float64(width, rows, threads):
    torch.set_num_threads(threads)
    x, weight = 30 * torch.randn(*rows, width), torch.randn(width)
    found = rms_norm(x, weight, 1e-5)
    assert found.shape == x.shape
    torch.testing.assert_close(found.double(), expected(x, weight, 1e-5), rtol=2e-6, atol=1e-6)


def test_rows_of_zeros_and_eps():
    assert not rms_norm(torch.zeros(2, 32), torch.ones(32), 1e-6).any()
    torch.testing.assert_close(rms_norm(torch.full((1, 64), 1e-3), torch.ones(64), 1e-6), torch.full((1, 64), 0.5**0.5))


def test_nan_and_infinity_stay_in_their_row():
    x = torch.randn(3, 64)
    x[0, 5], x[1, 7] = torch.nan, torch.inf
    found, weight = rms_norm(x, torch.ones(64), 1e-6), torch.ones(64)
    assert found[0].isnan().all()
    assert found[1, 7].isnan()
    assert torch.equal(found[2], rms_norm(x[2], weight, 1e-6))


def test_a_row_is_the_same_to_the_bit_alone():
    torch.set_num_threads(2)
    x, weight = torch.randn(70, 4096), torch.randn(4096)
    together = rms_norm(x, weight, 1e-6)
    assert all(torch.equal(rms_norm(row, weight, 1e-6), found) for row, found in zip(x, together, strict=True))


@pytest.mark.parametrize("case", ["bfloat16", "strided", "no library", "gradient"])
def test_torch_serves_the_rest(case, monkeypatch):
    x, weight = torch.randn(4, 64), torch.randn(64)
    if case == "no library":
        monkeypatch.setattr(cpu_norm, "library", lambda: "not built")
    x = {"bfloat16": x.bfloat16(), "strided": torch.randn(64, 4).t()}.get(case, x).requires_grad_(case == "gradient")
    found = rms_norm(x, weight, 1e-6)
    assert torch.equal(found, F.rms_norm(x, (64,), weight, 1e-6))
    assert found.requires_grad == (case == "gradient")


def test_another_width_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        rms_norm(torch.randn(2, 64), torch.randn(32), 1e-6)
