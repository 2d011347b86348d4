"""Native products on a CPU: every instruction set against the formula in float64, and the same bits for every M."""

import ctypes
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import naming
from oracle_format import formula, random_words

from gptq_belle.kernels import cpu_layout, cpu_matmul, dispatch, native_structs
from gptq_belle.kernels.cpu_matmul import CpuMatmul, quant_matmul
from gptq_belle.kernels.layout import checked_weight, sort_by_group
from gptq_belle.kernels.native_library import FASTEST_FIRST, LIBRARY_VARIABLE, NativeLibrary, load_library
from gptq_belle.kernels.reference import unpack

CPU = torch.device("cpu")
FOUND = load_library()
ISAS = FOUND.usable_isas if isinstance(FOUND, NativeLibrary) else ()
BITS = (2, 3, 4, 8)
ROWS = 33
FEWER = (*range(2, 10), 13, 17, *range(24, 33))  # streams of every height, in up to three passes; tiles of every height
# K, N and group size: whole tiles, K and N that are no multiple of a tile, groups of two lengths, one group for all.
SHAPES = [(128, 64, 128), (96, 40, 32), (192, 72, 64), (160, 104, 128), (320, 8, -1), (1024, 136, 128), (64, 32, 32)]
ERROR = {"exact": 2e-4, "fast": 3e-2}  # relative to the result's norm; measured with these shapes: 8e-5 and 1.1e-2

# A library that the environment names must be loadable: `make sanitize` names one.
pytestmark = pytest.mark.skipif(not ISAS and LIBRARY_VARIABLE not in os.environ, reason=str(FOUND))


def case(bits, inputs, outputs, group_size, *, act_order=False, symmetric=False, precision="exact"):
    """A prepared weight and W (K, N) in float64."""
    outputs = -(-outputs * bits // 32) * 32 // bits if bits != 3 else -(-outputs // 32) * 32
    words = random_words(bits, inputs, outputs, group_size, act_order=act_order)
    if symmetric:
        word = {2: 0x55555555, 3: None, 4: 0x77777777, 8: 0x7F7F7F7F}[bits]
        words["qzeros"] = torch.full_like(words["qzeros"], word)
    weight = cpu_layout.prepare(checked_weight(**words, bits=bits, zero_offset=1), precision)
    return weight, formula(**words, bits=bits, v1=True).t()


def error(y, exact):
    return float((y.double() - exact).norm() / exact.norm())


@pytest.fixture
def threads():
    """torch.set_num_threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_product_of_every_shape_and_number_of_rows(bits, act_order, precision, isa):
    for inputs, outputs, group_size in SHAPES:
        weight, w = case(bits, inputs, outputs, group_size, act_order=act_order, precision=precision)
        x, bias = torch.randn(ROWS, inputs), torch.randn(weight.out_features)
        exact = x.double() @ w + bias
        alone = torch.cat([quant_matmul(row[None], weight, bias, isa=isa) for row in x])
        assert error(alone, exact) < ERROR[precision]
        for rows in FEWER:
            assert torch.equal(quant_matmul(x[:rows], weight, bias, isa=isa), alone[:rows])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_equal_zero_points_are_stored_as_one_number(bits, isa):
    weight, w = case(bits, 256, 64, 128, symmetric=True)
    assert weight.zeros is None
    assert weight.zero == {2: 2, 4: 8, 8: 128}[bits]
    x = torch.randn(ROWS, 256)
    assert error(quant_matmul(x, weight, isa=isa), x.double() @ w) < ERROR["exact"]


@pytest.mark.parametrize("bits", BITS)
def test_instruction_sets_agree_to_the_bit(bits):
    weight, _ = case(bits, 320, 96, 64, act_order=True)
    x = torch.randn(40, 320)
    results = [quant_matmul(x, weight, isa=isa) for isa in ISAS if isa != "portable"]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("isa", ISAS)
def test_result_does_not_depend_on_threads(isa, threads):
    # More rows than one unit of work, and enough work that threads are used for every number of rows.
    weight, w = case(4, 2048, 224, 128)
    x = torch.randn(300, 2048)
    first = quant_matmul(x, weight, isa=isa)
    assert error(first, x.double() @ w) < ERROR["exact"]
    for count, rows in itertools.product((1, 2, 3, 5, 8), (1, 3, 16, 129, 300)):
        threads(count)
        assert torch.equal(quant_matmul(x[:rows], weight, isa=isa), first[:rows])


def test_concurrent_calls_give_the_same_result(threads):
    from concurrent.futures import ThreadPoolExecutor

    threads(2)
    weight, _ = case(4, 1024, 256, 128)
    x = torch.randn(5, 1024)
    expected = quant_matmul(x, weight)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(y, expected) for y in pool.map(lambda _: quant_matmul(x, weight), range(64)))


def test_threads_are_started_if_torch_has_no_openmp():
    code = ("import torch\nfrom gptq_belle.kernels import cpu_matmul, native_library\n"
            "native_library._openmp_entry = lambda: None\n"
            "import sys; sys.path.insert(0, 'tests')\nimport test_cpu_matmul\ntorch.manual_seed(0)\n"
            "weight, _ = test_cpu_matmul.case(4, 1024, 256, 128)\nx = torch.randn(5, 1024)\n"
            "torch.set_num_threads(1); one = cpu_matmul.quant_matmul(x, weight)\n"
            "torch.set_num_threads(3); assert torch.equal(cpu_matmul.quant_matmul(x, weight), one)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_product_runs_on_the_calling_thread_if_no_thread_can_be_started():
    code = ("import resource, sys, threading, torch\nfrom pathlib import Path\n"
            "from gptq_belle.kernels import cpu_matmul, native_library\nnative_library._openmp_entry = lambda: None\n"
            "sys.path.insert(0, 'tests')\nimport test_cpu_matmul\ntorch.manual_seed(0)\n"
            "weight, _ = test_cpu_matmul.case(4, 1024, 256, 128)\nx = torch.randn(5, 1024)\n"
            "torch.set_num_threads(1); one = cpu_matmul.quant_matmul(x, weight)\n"
            "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
            "resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20),) * 2)\n"  # a thread's stack takes 8 MiB
            "try: threading.Thread(target=print).start()\n"
            "except RuntimeError: pass\n"
            "else: sys.exit('a thread was started')\n"
            "torch.set_num_threads(3); assert torch.equal(cpu_matmul.quant_matmul(x, weight), one)")
    subprocess.run([sys.executable, "-c", code], check=True)


class _LongerCall(ctypes.Structure):
    _fields_ = [*native_structs.CallStruct._fields_, ("more", ctypes.c_int64)]


@pytest.mark.parametrize("mirrors", [
    (*native_structs.STRUCTS[:8], _LongerCall, *native_structs.STRUCTS[9:]), native_structs.STRUCTS[:-1]])
def test_library_whose_structs_differ_from_the_mirrors_is_rejected(mirrors, monkeypatch):
    path = Path(FOUND._c._name)
    NativeLibrary(path)
    monkeypatch.setattr("gptq_belle.kernels.native_library.STRUCTS", mirrors)
    with pytest.raises(OSError):  # noqa: PT011
        NativeLibrary(path)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_affect_their_row_only(value, isa):
    weight, w = case(4, 256, 64, 128)
    x = torch.randn(6, 256)
    x[2, 200] = value
    y = quant_matmul(x, weight, isa=isa)
    assert y[2].isnan().all()
    keep = [0, 1, 3, 4, 5]
    assert error(y[keep], x[keep].double() @ w) < ERROR["exact"]


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_activations_of_every_magnitude(scale):
    weight, w = case(4, 256, 64, 64)
    x = torch.randn(5, 256) * scale
    assert error(quant_matmul(x, weight), x.double() @ w) < ERROR["exact"]


def test_outlier_does_not_reduce_the_precision_of_other_groups():
    weight, w = case(4, 256, 64, 64)
    x = torch.randn(5, 256)
    x[:, 70] = 3000.0
    w[70] = 0  # so that only the rounding of its group remains
    y = quant_matmul(x, weight) - 3000.0 * quant_matmul(torch.eye(256)[70:71], weight)
    assert float((y.double() - (x.double() @ w)).abs().max()) < 0.1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("outputs", [32, 80, 544])  # the last two do not fill a panel
def test_addend_gives_the_same_result_as_an_addition_afterwards(outputs, precision, isa):
    weight, _ = case(4, 256, outputs, 64, precision=precision)
    bias = torch.randn(weight.out_features)
    product = CpuMatmul(weight, bias)
    for rows in (1, 3, 5, 33):
        x, plus = torch.randn(rows, 256), torch.randn(rows, weight.out_features)
        wanted = product(x, isa=isa) + plus
        assert torch.equal(product(x, plus, isa=isa), wanted)
        assert torch.equal(product(x, plus.t().contiguous().t(), isa=isa), wanted)  # strided
        half = product(x.bfloat16(), plus.bfloat16(), isa=isa)
        assert torch.equal(half, product(x.bfloat16(), isa=isa) + plus.bfloat16())
    with pytest.raises(RuntimeError):
        product(x, torch.randn(5, 7), isa=isa)


def test_zero_activations_give_the_bias():
    weight, _ = case(8, 128, 32, 32)
    bias = torch.randn(weight.out_features)
    assert torch.equal(quant_matmul(torch.zeros(3, 128), weight, bias), bias.expand(3, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_result_has_shape_and_dtype_of_the_activations(dtype):
    weight, w = case(4, 128, 64, 32)
    x, bias = torch.randn(2, 3, 128).to(dtype), torch.randn(64).half()
    y = quant_matmul(x, weight, bias)
    assert (y.dtype, y.shape) == (dtype, (2, 3, 64))
    assert error(y, x.double() @ w + bias) < max(ERROR["exact"], torch.finfo(dtype).eps)


def test_strided_activations_and_no_rows():
    weight, w = case(4, 128, 64, 32)
    x = torch.randn(128, 5).t()
    assert error(quant_matmul(x, weight), x.double() @ w) < ERROR["exact"]
    assert quant_matmul(torch.empty(0, 128), weight).shape == (0, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_that_are_not_float16(dtype):
    words = random_words(4, 128, 64, 32)
    words["scales"] = (words["scales"].float() * 1e6).to(dtype)  # beyond float16
    weight = cpu_layout.prepare(checked_weight(**words, bits=4, zero_offset=0))
    assert weight.scales.dtype == torch.float32
    x = torch.randn(5, 128)
    assert error(quant_matmul(x, weight), x.double() @ formula(**words, bits=4, v1=False).t()) < ERROR["exact"]


def test_groups_of_unequal_lengths_are_padded_to_runs():
    words = random_words(4, 256, 32, 64)
    words["g_idx"] = torch.tensor([0] * 33 + [1] * 100 + [2] * 90 + [3] * 33, dtype=torch.int32)[torch.randperm(256)]
    weight = cpu_layout.prepare(checked_weight(**words, bits=4, zero_offset=1))
    assert (weight.run, weight.codes.shape[1]) == (32, 2 + 4 + 3 + 2)
    assert int((weight.order >= 0).sum()) == 256
    x = torch.randn(5, 256)
    assert error(quant_matmul(x, weight), x.double() @ formula(**words, bits=4, v1=True).t()) < ERROR["exact"]


@pytest.mark.parametrize(("inputs", "group_size", "run", "groups"), [
    (256, 128, 128, 2), (256, 64, 64, 4), (96, 32, 32, 3), (11008, -1, 128, 86), (320, -1, 64, 5), (160, 128, 32, 5)])
def test_run_length_and_number_of_runs(inputs, group_size, run, groups):
    found = sort_by_group(random_words(4, inputs, 8, group_size)["g_idx"])
    assert (found.run, len(found.groups), found.order) == (run, groups, None)


def test_layout_of_codes_in_memory():
    """One golden vector: lane r is output r; its byte i holds input i in the low bits and input 4 + i in the high."""
    words = random_words(4, 32, 16, 32)
    words["qweight"][0, 3] = 0x76543210
    weight = cpu_layout.prepare(checked_weight(**words, bits=4, zero_offset=1))
    assert weight.codes.shape == (2, 1, 4, 64)
    assert weight.codes[0, 0, 0, 12:16].tolist() == [0x40, 0x51, 0x62, 0x73]
    assert not weight.codes[1].any()  # padding of N


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_unpack_weight_inverts_prepare(bits, act_order):
    words = random_words(bits, 160, 96, 64, act_order=act_order)
    weight = checked_weight(**words, bits=bits, zero_offset=1)
    codes, zeros, scales = cpu_layout.unpack_weight(cpu_layout.prepare(weight))
    assert torch.equal(codes.int(), unpack(weight.qweight, bits))
    assert torch.equal(zeros, unpack(weight.qzeros.t(), bits).t() + 1)
    assert torch.equal(scales, weight.scales)


def test_read_memory_sums_all_words(threads):
    threads(2)
    numbers = torch.randint(-2**30, 2**30, (5 * 2**16 + 100,)).int()
    assert cpu_matmul.read_memory(numbers) == int(numbers[: 5 * 2**16].sum()) % 2**32
    with pytest.raises(ValueError, match=naming("tensor")):
        cpu_matmul.read_memory(numbers[::2])


def broken(**changes):
    weight, _ = case(4, 128, 64, 32, act_order=True)
    return weight._replace(**changes)


def changed_order(place, value):
    weight = broken()
    order = weight.order.clone()
    order[place] = value
    return weight._replace(order=order)


@pytest.mark.parametrize(("weight", "named"), [
    (lambda: broken(codes=broken().codes[:, :, :, :32]), "codes"),
    (lambda: broken(codes=broken().codes[:2]), "codes"),
    (lambda: broken(codes=broken().codes[:, :3]), "codes"),
    (lambda: broken(codes=broken().codes.int()), "codes"),
    (lambda: broken(codes=broken().codes.flatten()), "codes"),
    (lambda: broken(codes=broken().codes.transpose(0, 1).contiguous().transpose(0, 1)), "codes"),
    (lambda: broken(codes=broken().codes.to("meta")), "codes"),
    (lambda: broken(scales=broken().scales[:1]), "scales"),
    (lambda: broken(scales=broken().scales.double()), "scales"),
    (lambda: broken(zeros=broken().zeros[..., :8]), "zeros"),
    (lambda: broken(zeros=broken().zeros.int()), "zeros"),
    (lambda: broken(order=broken().order[:-1]), "order"),
    (lambda: broken(order=broken().order.long()), "order"),
    (lambda: broken(order=None, in_features=96), "96 inputs"),
    (lambda: broken(order=None, in_features=300), "300 inputs"),
    (lambda: changed_order(5, 128), "order"),
    (lambda: changed_order(0, -2), "order"),
    (lambda: changed_order(127, 2**31 - 1), "order"),
    (lambda: broken(run=16), "run 16"),
    (lambda: broken(run=64), "codes"),
    (lambda: broken(bits=3), "bits 3"),
    (lambda: broken(bits=8), "codes"),
    (lambda: broken(parts=3), "parts 3"),
    (lambda: broken(out_features=0), "0 outputs"),
    (lambda: broken(out_features=65), "codes"),
])
def test_malformed_layouts_are_rejected(weight, named):
    with pytest.raises(ValueError, match=naming(named)):
        quant_matmul(torch.randn(2, 128), weight())


@pytest.mark.parametrize(("x", "bias"), [
    (torch.randn(2, 127), None), (torch.randn(2, 128), torch.randn(63)), (torch.randn(2, 128), torch.randn(1, 64)),
    (torch.randn(2, 128, device="meta"), None), (torch.randn(2, 128), torch.randn(64, device="meta")),
])
def test_activations_and_bias_of_another_shape_or_device_are_rejected(x, bias):
    with pytest.raises((ValueError, RuntimeError)):
        quant_matmul(x, broken(), bias)


def test_unknown_instruction_set_and_precision_are_rejected():
    with pytest.raises(ValueError, match=naming("sse9")):
        quant_matmul(torch.randn(2, 128), broken(), isa="sse9")
    with pytest.raises(ValueError, match=naming("half", "exact", "fast")):
        cpu_layout.prepare(checked_weight(**random_words(4, 64, 32, 32), bits=4, zero_offset=1), "half")


def test_dispatch_uses_the_native_kernel():
    words = random_words(4, 256, 64, 128, act_order=True)
    weight = dispatch.prepare_tensors(**words, bits=4, zero_offset=1, device=CPU, dtype=torch.float32, precision="fast")
    assert isinstance(weight, cpu_layout.CpuWeight)
    assert weight.parts == 1
    x = torch.randn(3, 256)
    assert torch.equal(dispatch.quant_matmul(x, weight), quant_matmul(x, weight))


def test_custom_operation_in_a_compiled_graph():
    weight, _ = case(4, 128, 64, 32, act_order=True)
    x, bias = torch.randn(3, 128), torch.randn(64)
    expected = quant_matmul(x, weight, bias)
    assert torch.equal(cpu_matmul.op(x, weight, bias), expected)
    arguments = (x, *weight[:4], bias, *weight[5:11])
    torch.library.opcheck(torch.ops.gptq_belle.cpu_matmul.default, arguments)
    compiled = torch.compile(lambda v: dispatch.quant_matmul(v, weight, bias) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected + 1)
    assert torch.equal(compiled(torch.cat((x, x, x))), torch.cat((expected,) * 3) + 1)


@pytest.mark.parametrize("isa", ISAS)
def test_environment_selects_the_instruction_set(isa):
    code = "from gptq_belle.kernels.native_library import load_library; print(load_library().isa)"
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"GPTQ_BELLE_CPU_ISA": isa}, check=True,
                         capture_output=True, text=True)
    assert run.stdout.strip() == isa


def test_unknown_instruction_set_in_the_environment_is_named():
    code = "from gptq_belle.kernels.native_library import load_library; print(load_library())"
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"GPTQ_BELLE_CPU_ISA": "sse9"}, check=True,
                         capture_output=True, text=True)
    assert re.match(naming("GPTQ_BELLE_CPU_ISA=sse9", FASTEST_FIRST[-1]), run.stdout)
