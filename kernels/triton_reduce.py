"""Kernels around the products: the sum over the parts of a split K, and activations in the order of the layout."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M"])
def reduce_kernel(
    parts,  # (SPLIT_K, M, N) float32
    bias,  # (N,); read only if HAS_BIAS
    out,  # (M, N)
    M,
    N,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WIDTH: tl.constexpr,  # elements of a program
):
    """out = the sum of the parts in their order, plus bias, rounded once."""
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    size = M * N
    live = at < size
    total = tl.load(parts + at, mask=live, other=0.0)
    for part in tl.static_range(1, SPLIT_K):
        total += tl.load(parts + part * size + at, mask=live, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % N, mask=live, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["M"])
def arrange_kernel(
    x,  # (M, inputs) contiguous
    order,  # (places,) int32: the input at each place, -1 for padding
    out,  # (M, places)
    M,
    inputs,
    places,
    WIDTH: tl.constexpr,  # places of a program
):
    """out[m, p] = x[m, order[p]], 0 in padding."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    source = tl.load(order + at, mask=at < places, other=-1)
    values = tl.load(x + row * inputs + source, mask=source >= 0, other=0.0)
    tl.store(out + row * places + at, values, mask=at < places)
