"""QuantLinear: moves and casts keep the packed weight; the state dict has the tensors of the file."""

import copy

import pytest
import torch
from conftest import naming
from oracle_format import formula, random_words

from gptq_belle.engine.linear import QuantLinear
from gptq_belle.errors import UsageError
from gptq_belle.kernels.dispatch import prepare_tensors

CPU = torch.device("cpu")


def linear_and_weight(bits=4, dtype=torch.float32, bias=None):
    words = random_words(bits, 64, 32, 32)
    prepared = prepare_tensors(**words, bits=bits, zero_offset=1, device=CPU, dtype=dtype)
    return QuantLinear(prepared, bias), words


def buffers(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def test_forward_adds_the_bias():
    bias = torch.randn(32).half()
    layer, words = linear_and_weight(bias=bias)
    x = torch.randn(2, 3, 64)
    expected = x.double() @ formula(**words, bits=4, v1=True).t() + bias
    assert float((layer(x).double() - expected).norm() / expected.norm()) < 2e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the native layout, and the checkpoint's words
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_state_dict_equals_the_file(bits, dtype):
    layer, words = linear_and_weight(bits, dtype, bias=torch.zeros(32).half())
    state = layer.state_dict()
    assert set(state) == {"qweight", "qzeros", "scales", "g_idx", "bias"}
    assert all(torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype for name, tensor in words.items())


def test_state_dict_without_bias():
    layer, _ = linear_and_weight()
    assert set(layer.state_dict()) == {"qweight", "qzeros", "scales", "g_idx"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [
    lambda m: m.half(), lambda m: m.float(), lambda m: m.double(), lambda m: m.bfloat16(),
    lambda m: m.to(torch.bfloat16), lambda m: m.to(dtype=torch.float16), lambda m: m.to("cpu", torch.float16),
    lambda m: m.half().to(torch.bfloat16).float(),
])
def test_casts_do_not_change_the_weight(cast, dtype):
    layer, _ = linear_and_weight(dtype=dtype, bias=torch.randn(32).half())
    model = torch.nn.Sequential(layer, torch.nn.Linear(32, 32))
    before = buffers(layer)
    cast(model)
    after = buffers(layer)
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_output_has_the_dtype_of_the_activations(dtype):
    layer, _ = linear_and_weight(bias=torch.randn(32).half())
    assert layer(torch.randn(2, 64).to(dtype)).dtype == dtype


def test_to_moves_all_buffers():
    layer, _ = linear_and_weight(dtype=torch.float64, bias=torch.zeros(32).half())
    assert all(buffer.is_meta for buffer in layer.to("meta").buffers())


def test_weight_packed_for_the_cpu_cannot_move():
    layer, _ = linear_and_weight(dtype=torch.bfloat16)
    with pytest.raises(UsageError, match=naming("cpu")):
        layer.to("meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deepcopy_is_independent(dtype):
    layer, _ = linear_and_weight(dtype=dtype)
    twin = copy.deepcopy(layer)
    x = torch.randn(1, 64).to(dtype)
    assert torch.equal(layer(x), twin(x))
    for buffer in twin.buffers():
        buffer.zero_()
    assert not torch.equal(layer(x), twin(x))


def test_repr_shows_sizes_and_layout():
    layer, _ = linear_and_weight(dtype=torch.float64)
    assert repr(layer) == "QuantLinear(64, 32, CanonicalWeight)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_is_a_proxy_for_peft(dtype):
    layer, _ = linear_and_weight(dtype=dtype)
    assert isinstance(layer, torch.nn.Linear)
    assert (layer.weight.shape, layer.weight.device, layer.qweight.device) == ((32, 64), CPU, CPU)
    assert repr(layer.weight) == "WeightProxy(32, 64, device='cpu')"
    assert not list(layer.parameters())
    for use in (lambda w: w + 1, lambda w: w.data, lambda w: w.add_(1), lambda w: w.norm(), lambda w: w.clone()):
        with pytest.raises(UsageError, match="--lora"):
            use(layer.weight)
