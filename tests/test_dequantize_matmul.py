"""The fallback that expands the weight: its products, and the memory that it allocates."""

import pytest
import torch
from oracle_format import formula, random_words
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptq_belle.kernels import dequantize_matmul, reference
from gptq_belle.kernels.layout import CanonicalWeight, checked_weight


class LargestAllocation(TorchDispatchMode):
    """The bytes of the largest tensor that an operation returns without aliasing one of its arguments."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if all(argument.alias_info is None for argument in function._schema.returns):
            sizes = [tensor.numel() * tensor.itemsize for tensor in tree_leaves(result)]
            self.nbytes = max(self.nbytes, *sizes)
        return result


def belle_head(bits):
    """A packed weight of BELLE-7B's head, 4096 inputs and 250880 outputs, without values."""

    def words(rows, columns):
        return torch.empty(rows, columns, dtype=torch.int32, device="meta")

    scales = torch.empty(32, 250880, dtype=torch.float16, device="meta")
    g_idx = torch.empty(4096, dtype=torch.int32, device="meta")
    qweight, qzeros = words(4096 * bits // 32, 250880), words(32, 250880 * bits // 32)
    return CanonicalWeight(qweight, qzeros, scales, g_idx, bits, 1, 128)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_largest_allocation_of_the_head_is_64_mib(bits, dtype):
    x, weight = torch.empty(16, 4096, dtype=dtype, device="meta"), belle_head(bits)
    with LargestAllocation() as largest:
        y = dequantize_matmul.quant_matmul(x, weight)
    assert (y.shape, y.dtype) == ((16, 250880), dtype)
    assert 32 << 20 < largest.nbytes <= 64 << 20


def test_counting_sees_the_whole_weight():
    weight = belle_head(4)
    with LargestAllocation() as largest:
        reference.dequantize(weight)
    assert largest.nbytes == 4096 * 250880 * 4


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("scales", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_products_by_parts(bits, dtype, scales, with_bias, monkeypatch):
    words = random_words(bits, 96, 160, 32, act_order=bits == 4)
    words["scales"] = words["scales"].to(scales)
    weight = checked_weight(**words, bits=bits, zero_offset=1)
    x, bias = torch.randn(2, 3, 96).to(dtype), torch.randn(160) if with_bias else None
    monkeypatch.setattr(dequantize_matmul, "SCRATCH", 1)
    y = dequantize_matmul.quant_matmul(x, weight, bias)
    rounded = formula(**words, bits=bits, v1=True).float().to(dtype)
    exact = torch.nn.functional.linear(x.double(), rounded.double(), None if bias is None else bias.to(dtype).double())
    # Half an ulp of the result in half precision; float32 sums of 96 products.
    allowed = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 1e-6}[dtype]
    assert (y.dtype, y.shape) == (dtype, (2, 3, 160))
    assert (y.double() - exact).norm() <= allowed * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weight_is_rounded_once(dtype):
    """As float32 arithmetic does, in which the weight is exact, followed by one rounding."""
    weight = checked_weight(**random_words(8, 64, 32, 32), bits=8, zero_offset=1)
    assert torch.equal(reference.dequantize(weight, dtype), reference.dequantize(weight).to(dtype))
