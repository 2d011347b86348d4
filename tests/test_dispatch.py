"""The choice of a kernel, the checks of a weight, and every kernel against the formula in float64."""

import subprocess
import sys

import pytest
import torch
from conftest import TOLERANCES, naming
from oracle_format import formula, random_words

from gptq_belle.kernels import reference
from gptq_belle.kernels.dispatch import choose_kernel, prepare_tensors, quant_matmul
from gptq_belle.kernels.layout import CanonicalWeight, checked_weight, longest_run
from gptq_belle.kernels.native_library import load_library

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
IN_ORDER = torch.arange(256) // 128


@pytest.fixture
def without_native(monkeypatch):
    """As on a machine without a compiler."""
    monkeypatch.setattr("gptq_belle.kernels.cpu_matmul.load_library", lambda: "no compiler")


def relative_error(y, exact):
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.usefixtures("without_native")
def test_product_of_all_bits_and_dtypes(bits, dtype):
    words = random_words(bits, 128, 32, 32, act_order=True)
    weight = prepare_tensors(**words, bits=bits, zero_offset=1, device=CPU, dtype=dtype)
    x = torch.randn(4, 128).to(dtype)
    rtol, atol = TOLERANCES[dtype]
    y, exact = quant_matmul(x, weight).double(), x.double() @ formula(**words, bits=bits, v1=True).t()
    torch.testing.assert_close(y, exact, rtol=rtol, atol=atol * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("inputs", "group_size"), [(128, 32), (192, 64), (256, 128), (320, -1), (512, -1), (160, 64)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_groupwise_equals_the_formula(bits, inputs, group_size, dtype):
    words = random_words(bits, inputs, 64, group_size)
    weight = checked_weight(**words, bits=bits, zero_offset=1)
    assert weight.run
    x, bias = torch.randn(2, 3, inputs).to(dtype), torch.randn(64).half()
    y = reference.groupwise_matmul(x, weight, bias)
    exact = x.double() @ formula(**words, bits=bits, v1=True).t() + bias
    assert (y.dtype, y.shape) == (dtype, exact.shape)
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(y.double(), exact, rtol=rtol, atol=atol * float(exact.abs().max()))


@pytest.mark.usefixtures("without_native")
def test_groupwise_serves_few_rows_and_reference_many():
    words = random_words(4, 64, 32, 32)
    weight = prepare_tensors(**words, bits=4, zero_offset=1, device=CPU, dtype=torch.float32)
    limit = reference.MAX_GROUPWISE_ROWS
    for rows, multiply in ((limit, reference.groupwise_matmul), (limit + 1, reference.quant_matmul)):
        x = torch.randn(rows, 64)
        assert torch.equal(quant_matmul(x, weight), multiply(x, weight))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_product_on_cuda(bits, dtype):
    words = random_words(bits, 256, 64, 64, act_order=True)
    weight = prepare_tensors(**words, bits=bits, zero_offset=1, device=CUDA, dtype=dtype)
    x, bias = torch.randn(2, 3, 256).to(CUDA, dtype), torch.randn(64, device=CUDA)
    exact = x.double().cpu() @ formula(**words, bits=bits, v1=True).t() + bias.cpu()
    peer = (x @ formula(**words, bits=bits, v1=True).t().to(CUDA, dtype) + bias.to(dtype)).cpu()
    y = quant_matmul(x, weight, bias).cpu()
    assert relative_error(y, exact) <= 2 * relative_error(peer, exact) + 1e-6


@pytest.mark.parametrize(("case", "kernel", "reason"), [
    ((IN_ORDER, CPU, torch.bfloat16), "groupwise", "no compiler"),
    ((IN_ORDER.flip(0), CPU, torch.float32), "groupwise", "no compiler"),
    ((torch.arange(256) // 8, CPU, torch.bfloat16), "reference", "groups"),
    ((torch.arange(256) % 2, CPU, torch.float32), "reference", "act-order"),
    ((IN_ORDER, CUDA, torch.float16), "dequantize+matmul", "CUDA"),
])
@pytest.mark.usefixtures("without_native")
def test_choice_without_the_native_kernels(case, kernel, reason):
    g_idx, device, dtype = case
    choice = choose_kernel(g_idx, device=device, dtype=dtype)
    assert choice.kernel == kernel
    assert reason in choice.reason


@pytest.mark.skipif(isinstance(load_library(), str), reason=str(load_library()))
@pytest.mark.parametrize(("case", "kernel", "reason"), [
    ((IN_ORDER, CPU, torch.bfloat16), "native", ""),
    ((IN_ORDER.flip(0), CPU, torch.float32), "native", ""),
    ((torch.arange(256) % 2, CPU, torch.float16), "native", ""),
    ((torch.arange(256) // 8, CPU, torch.float32), "reference", "32 inputs"),
    ((IN_ORDER, CPU, torch.float64), "groupwise", "torch.float64"),
    ((IN_ORDER, CUDA, torch.float16), "dequantize+matmul", "CUDA"),
])
def test_choice_with_the_native_kernels(case, kernel, reason):
    g_idx, device, dtype = case
    choice = choose_kernel(g_idx, device=device, dtype=dtype)
    assert choice.kernel == kernel
    assert reason in choice.reason
    assert bool(reason) == bool(choice.reason)


def test_longest_run():
    assert longest_run(torch.zeros(512)) == 256
    assert longest_run(torch.arange(192) // 64) == 64
    assert longest_run(torch.arange(160) // 128) == 32
    assert longest_run((torch.arange(128) >= 33).int()) == 0
    assert longest_run(torch.arange(48)) == 0
    assert longest_run((torch.arange(128) // 64).flip(0)) == 64


@pytest.mark.usefixtures("without_native")
def test_missing_g_idx_means_equal_groups():
    words = random_words(4, 128, 32, 32)
    with_it = prepare_tensors(**words, bits=4, zero_offset=1, device=CPU, dtype=torch.float32)
    without = prepare_tensors(**words | {"g_idx": None}, bits=4, zero_offset=1, device=CPU, dtype=torch.float32)
    assert isinstance(without, CanonicalWeight)
    assert all(torch.equal(a, b) for a, b in zip(with_it[:4], without[:4], strict=True))


@pytest.mark.usefixtures("without_native")
def test_prepared_words_are_copies():
    words = random_words(4, 64, 32, 32)
    weight = prepare_tensors(**words, bits=4, zero_offset=1, device=CPU, dtype=torch.float32)
    own = {tensor.data_ptr() for tensor in words.values()}
    assert not any(tensor.data_ptr() in own for tensor in weight[:4])


def broken(**changes):
    return {**random_words(4, 64, 32, 32), "bits": 4, "zero_offset": 1, **changes}


@pytest.mark.parametrize(("arguments", "named"), [
    (broken(bits=5), ("bits", 5)),
    (broken(bits=3), ("qweight", 3)),
    (broken(zero_offset=2), ("zero_offset", 2)),
    (broken(qweight=torch.zeros(8, 32)), ("qweight", "torch.int32")),
    (broken(qzeros=torch.zeros(2, 4).long()), ("qzeros", "torch.int64")),
    (broken(qweight=torch.zeros(256).int()), ("qweight",)),
    (broken(qweight=torch.zeros(0, 32).int()), ("qweight",)),
    (broken(qweight=torch.zeros(8, 33).int()), ("qweight", 33)),
    (broken(qzeros=torch.zeros(2, 3).int()), ("qzeros", "(2, 4)")),
    (broken(qzeros=torch.zeros(1, 4).int()), ("qzeros", "(2, 4)")),
    (broken(scales=torch.ones(2, 32).double()), ("scales", "torch.float64")),
    (broken(scales=torch.ones(2, 16).half()), ("scales", "(2, 16)")),
    (broken(scales=torch.ones(0, 32).half(), qzeros=torch.zeros(0, 4).int()), ("scales",)),
    (broken(scales=torch.full((2, 32), float("nan")).half()), ("scales", "NaN")),
    (broken(g_idx=torch.zeros(64)), ("g_idx", "torch.float32")),
    (broken(g_idx=torch.zeros(63).int()), ("g_idx", "(63,)")),
    (broken(g_idx=torch.full((64,), 2).int()), ("g_idx", "2..2")),
    (broken(g_idx=torch.full((64,), -1).int()), ("g_idx", "-1..-1")),
    (broken(g_idx=None, scales=torch.ones(3, 32).half(), qzeros=torch.zeros(3, 4).int()), ("g_idx",)),
])
def test_malformed_tensors_are_rejected(arguments, named):
    with pytest.raises(ValueError, match=naming(*named)):
        prepare_tensors(**arguments, device=CPU, dtype=torch.float32)


def test_importing_the_kernels_queries_no_device_and_imports_no_triton():
    code = ("import sys, gptq_belle.kernels.dispatch, torch;"
            "assert not torch.cuda.is_initialized(); assert 'triton' not in sys.modules;"
            "assert not [m for m in sys.modules if m == 'kernels' or m.startswith('kernels.')]")
    subprocess.run([sys.executable, "-c", code], check=True)
