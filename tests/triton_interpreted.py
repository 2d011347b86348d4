"""The Triton kernels in the interpreter, compared with the formula in NumPy over all properties of the format.

`test_triton.py` runs this file in a separate process: TRITON_INTERPRET has to be set before Triton is imported.
"""

import pytest
import torch
from bfloat16_interpreter import teach
from conftest import naming
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_format import formula, random_words
from torch.nn.functional import linear

from gptq_belle.kernels import gradient, reference, triton_layout, triton_matmul
from gptq_belle.kernels.layout import checked_weight
from gptq_belle.kernels.triton_config import LaunchPlan, TileConfig

teach()

# Relative error of y as a whole. Rounding the result, the weight and (bfloat16) the scales costs 2e-4 each in float16
# and 1.7e-3 in bfloat16, independently of one another.
ERRORS = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-6}
DTYPES = [torch.float16, torch.bfloat16]
# Over a few values these errors do not average out: rounding the result alone then costs up to 4.9e-4 and 3.9e-3.
FEW, ERRORS_OF_FEW = 32, {torch.float16: 7e-4, torch.bfloat16: 5.6e-3}
SKINNY = [TileConfig(bm, bn, bk, split, 4, 4, warps) for bm in (8, 16, 32, 64) for bn in (32, 64, 128)
          for bk in (64, 128) for split in (1, 2, 3, 5) for warps in (1, 4)]
GEMM = [TileConfig(bm, bn, bk, split, 8, 3) for bm in (64, 128) for bn in (64, 128) for bk in (64, 128)
        for split in (1, 2)]
PLANS = [*(LaunchPlan("skinny", config) for config in SKINNY), *(LaunchPlan("gemm", config) for config in 2 * GEMM),
         LaunchPlan("expand", None)]


def relative_error(y, exact):
    return float((y.double() - exact).norm() / exact.norm())


def laid_out(words, bits, zero_offset=1):
    return triton_layout.prepare(checked_weight(**words, bits=bits, zero_offset=zero_offset))


@st.composite
def weights(draw):
    """Words of any format, with the arguments of `checked_weight` that belong to them."""
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    group_size = draw(st.sampled_from([32, 64, 128, -1]))
    inputs = 32 * draw(st.integers(1, 12))
    outputs = draw(st.sampled_from({2: [16, 48, 144], 3: [32, 160], 4: [8, 72, 136], 8: [4, 100, 128]}[bits]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    words = random_words(bits, inputs, outputs, group_size, act_order=draw(st.booleans()))
    if draw(st.booleans()):  # symmetric; else every stored zero occurs, so that 0..16 do with 4 bits
        words["qzeros"].fill_(draw(st.sampled_from([-1, 0, 0x77777777])))
    if draw(st.booleans()):
        words["scales"] = words["scales"].to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    return words, bits, draw(st.integers(0, 1))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(weight=weights(), plan=st.sampled_from(PLANS), rows=st.integers(1, 130), dtype=st.sampled_from(DTYPES),
       with_bias=st.booleans())
def test_every_kernel_equals_the_formula(weight, plan, rows, dtype, with_bias):
    words, bits, zero_offset = weight
    prepared = laid_out(words, bits, zero_offset)
    x = torch.randn(rows, prepared.in_features).to(dtype)
    bias = torch.randn(prepared.out_features).half() if with_bias else None
    exact = linear(x.double(), formula(**words, bits=bits, v1=zero_offset == 1)) + (0 if bias is None else bias)
    y = triton_matmul.quant_matmul(x, prepared, bias, plan)
    assert (y.dtype, y.shape) == (dtype, exact.shape)
    assert relative_error(y, exact) < (ERRORS_OF_FEW if y.numel() <= FEW else ERRORS)[dtype]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(weight=weights())
def test_unpacked_layout_equals_the_checkpoint(weight):
    words, bits, zero_offset = weight
    codes, zeros, scales = triton_layout.unpack_weight(laid_out(words, bits, zero_offset))
    assert torch.equal(codes.int(), reference.unpack(words["qweight"], bits))
    assert torch.equal(zeros, reference.unpack(words["qzeros"].t(), bits).t() + zero_offset)
    assert torch.equal(scales, words["scales"])


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_expanded_weight_equals_the_reference_exactly(bits, dtype):
    words = random_words(bits, 256, 160, 64)
    out = torch.empty(128, 256, dtype=dtype)
    triton_matmul.dequantize(laid_out(words, bits), 128, out)
    expected = reference.dequantize(checked_weight(**words, bits=bits, zero_offset=1)).to(dtype)
    assert torch.equal(out[:32], expected[:, 128:].t())


def test_expanding_in_parts_of_the_outputs(monkeypatch):
    words = random_words(4, 128, 320, 32)
    x, bias = torch.randn(3, 128).half(), torch.randn(320)
    whole = triton_matmul.quant_matmul(x, laid_out(words, 4), bias, LaunchPlan("expand", None))
    monkeypatch.setattr(triton_matmul, "scratch_bytes", lambda device: 128 * 128 * 2)
    assert torch.equal(whole, triton_matmul.quant_matmul(x, laid_out(words, 4), bias, LaunchPlan("expand", None)))


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 33, 64, 65, 130])
def test_planned_products_equal_the_formula(rows):
    words = random_words(4, 256, 72, 128)
    x = torch.randn(2, rows, 256).half()
    y = triton_matmul.quant_matmul(x, laid_out(words, 4))
    assert relative_error(y, linear(x.double(), formula(**words, bits=4, v1=True))) < ERRORS[torch.float16]


def test_float32_activations():
    words = random_words(4, 96, 72, 32, act_order=True)
    x = torch.randn(3, 96)
    y = triton_matmul.quant_matmul(x, laid_out(words, 4))
    assert relative_error(y, linear(x.double(), formula(**words, bits=4, v1=True))) < ERRORS[torch.float32]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(weight=weights(), dtype=st.sampled_from([*DTYPES, torch.float32]))
def test_gradient_of_the_activations(weight, dtype):
    words, bits, zero_offset = weight
    exact = formula(**words, bits=bits, v1=zero_offset == 1)
    grad = torch.randn(2, 3, exact.shape[0]).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient, "SCRATCH", 1)  # several parts
        found = gradient.input_gradient(grad, laid_out(words, bits, zero_offset))
    assert found.dtype == dtype
    assert relative_error(found, grad.double() @ exact) < ERRORS[dtype]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_beyond_the_range_of_float16(bits, dtype):
    """Products of one run up to 128 * 255 * 200: sums in float16 would be infinite."""
    words = random_words(bits, 128, 32, 128)
    words["qweight"].fill_(-1)
    words["qzeros"].fill_(0)
    words["scales"].fill_(2**-12)
    x = torch.full((1, 128), 200.0, dtype=dtype)
    exact = linear(x.double(), formula(**words, bits=bits, v1=True))
    for plan in (LaunchPlan("skinny", SKINNY[0]), LaunchPlan("gemm", GEMM[0])):
        assert relative_error(triton_matmul.quant_matmul(x, laid_out(words, bits), None, plan), exact) < ERRORS[dtype]


@pytest.mark.parametrize("plan", [LaunchPlan("skinny", SKINNY[0]), LaunchPlan("skinny", SKINNY[3]),
                                  LaunchPlan("gemm", GEMM[0])])
def test_nan_in_one_row_does_not_affect_others(plan):
    words = random_words(4, 160, 32, 32)
    x = torch.randn(3, 160).half()
    clean = triton_matmul.quant_matmul(x, laid_out(words, 4), None, plan)
    x[1, 5] = float("nan")
    y = triton_matmul.quant_matmul(x, laid_out(words, 4), None, plan)
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert y[1].isnan().all()


def test_strided_rows_and_no_rows():
    words = random_words(4, 128, 32, 32)
    wide = torch.randn(4, 256).half()
    prepared = laid_out(words, 4)
    assert torch.equal(triton_matmul.quant_matmul(wide[:, ::2], prepared),
                       triton_matmul.quant_matmul(wide[:, ::2].contiguous(), prepared))
    assert triton_matmul.quant_matmul(wide[:0, :128], prepared).shape == (0, 32)


def test_torch_operation_equals_the_function():
    words = random_words(4, 128, 32, 32, act_order=True)
    prepared, x, bias = laid_out(words, 4), torch.randn(3, 128).half(), torch.randn(32)
    assert torch.equal(triton_matmul.op(x, prepared, bias), triton_matmul.quant_matmul(x, prepared, bias))
    w = prepared
    torch.library.opcheck(triton_matmul._op, (x, w.words, w.scales, w.zeros, w.order, bias, w.in_features,
                                              w.out_features, w.run, w.bits, w.zero))


def test_compiled_graph_captures_the_operation():
    prepared, x = laid_out(random_words(4, 128, 32, 32), 4), torch.randn(3, 128).half()
    compiled = torch.compile(lambda x: triton_matmul.op(x, prepared) + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), triton_matmul.quant_matmul(x, prepared) + 1)


@pytest.mark.parametrize(("change", "named"), [
    ({"x": torch.zeros(2, 96).half()}, "x"),
    ({"x": torch.zeros(2, 128).double()}, "torch.float64"),
    ({"x": torch.zeros(2, 128, device="meta").half()}, "meta"),
    ({"bias": torch.zeros(31)}, "bias"),
])
def test_mismatched_tensors_are_refused(change, named):
    arguments = {"x": torch.zeros(2, 128).half(), "weight": laid_out(random_words(4, 128, 32, 32), 4)} | change
    with pytest.raises(ValueError, match=naming(named)):
        triton_matmul.quant_matmul(**arguments)
