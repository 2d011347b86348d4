"""The gradient of a product with a packed weight, for every layout, against the formula in float64."""

import pytest
import torch
from oracle_format import formula, random_words

from gptq_belle.kernels import gradient
from gptq_belle.kernels.cpu_layout import CpuWeight
from gptq_belle.kernels.dispatch import prepare_tensors, quant_matmul
from gptq_belle.kernels.layout import CanonicalWeight

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SHAPES = [(128, 32), (320, 64), (96, 96), (544, -1)]  # inputs and group size; the last does not fill whole runs of 128


def relative_error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


def weight_and_gradients(words, bits, zero_offset, dtype, precision="exact", device=CPU, rows=(2, 5)):
    """The prepared weight, the gradient to x, and the same gradient in float64."""
    weight = prepare_tensors(**words, bits=bits, zero_offset=zero_offset, device=device, dtype=dtype,
                             precision=precision)
    x = torch.randn(*rows, weight.in_features, dtype=dtype, device=device, requires_grad=True)
    y = quant_matmul(x, weight, torch.randn(weight.out_features, device=device))
    grad = torch.randn(y.shape).to(device, dtype)
    y.backward(grad)
    return weight, x.grad.cpu(), grad.cpu().double() @ formula(**words, bits=bits, v1=zero_offset == 1)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize(("inputs", "group_size"), SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("dtype", "layout", "tolerance"), [(torch.float32, CpuWeight, 2e-6),
                                                            (torch.float64, CanonicalWeight, 1e-12)])
def test_gradient_of_every_kind_of_weight(dtype, layout, tolerance, bits, inputs, group_size, zero_offset, act_order,
                                          monkeypatch):
    monkeypatch.setattr(gradient, "SCRATCH", 1)  # the smallest parts, so that there are several of them
    words = random_words(bits, inputs, 64, group_size, act_order=act_order)
    weight, found, exact = weight_and_gradients(words, bits, zero_offset, dtype)
    assert type(weight) is layout
    assert found.dtype == dtype
    assert relative_error(found, exact) < tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradient_is_rounded_once(dtype):
    _, found, exact = weight_and_gradients(random_words(4, 256, 64, 128), 4, 1, dtype)
    rounded = relative_error(exact.to(dtype), exact)
    assert found.dtype == dtype
    assert relative_error(found, exact) < 1.1 * rounded


@pytest.mark.parametrize(("rows", "act_order"), [(1, False), (200, False), (1, True)])  # groupwise, then reference
def test_gradcheck(rows, act_order):
    words = random_words(4, 64, 16, 32, act_order=act_order)
    weight = prepare_tensors(**words, bits=4, zero_offset=1, device=CPU, dtype=torch.float64)
    x = torch.randn(rows, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: quant_matmul(x, weight), x, fast_mode=True)


def test_expanded_parts_fit_into_the_scratch(monkeypatch):
    monkeypatch.setattr(gradient, "SCRATCH", 256 * 64 * 4)
    seen = []
    places, expand = gradient._EXPANSIONS[CpuWeight]

    def watched(*args):
        part = expand(*args)
        seen.append(part.numel() * part.itemsize)
        return part

    monkeypatch.setitem(gradient._EXPANSIONS, CpuWeight, (places, watched))
    _, found, exact = weight_and_gradients(random_words(4, 1024, 64, 128), 4, 1, torch.float32)
    assert seen == [256 * 64 * 4] * 4
    assert relative_error(found, exact) < 2e-6


def test_no_graph_is_recorded_without_a_required_gradient():
    weight = prepare_tensors(**random_words(4, 64, 32, 32), bits=4, zero_offset=1, device=CPU, dtype=torch.float32)
    x = torch.randn(3, 64)
    assert quant_matmul(x, weight).grad_fn is None
    with torch.no_grad():
        assert quant_matmul(x.requires_grad_(), weight).grad_fn is None


def test_result_is_the_same_with_and_without_a_graph():
    weight = prepare_tensors(**random_words(4, 64, 32, 32), bits=4, zero_offset=1, device=CPU, dtype=torch.float32)
    x = torch.randn(3, 64)
    assert torch.equal(quant_matmul(x, weight), quant_matmul(x.clone().requires_grad_(), weight))


@pytest.mark.gpu
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float32, 2e-6)])
def test_gradient_on_a_gpu(dtype, tolerance, bits, act_order):
    words = random_words(bits, 1024, 512, 128, act_order=act_order)
    _, found, exact = weight_and_gradients(words, bits, 1, dtype, "fast", CUDA, (3, 40))
    assert relative_error(found, exact) < tolerance
