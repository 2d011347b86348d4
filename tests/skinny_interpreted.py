"""The kernel for few rows with all that is folded into it, in the interpreter, compared with float64.

`test_triton.py` runs this file in a separate process, because TRITON_INTERPRET must be set before Triton is imported.
"""

from typing import NamedTuple

import pytest
import torch
from bfloat16_interpreter import teach
from covering import covering_cases, random_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_format import formula, random_words
from shuffled_programs import Shuffled
from torch.nn import functional as F
from triton_interpreted import DTYPES, ERRORS, laid_out, relative_error

from gptq_belle.kernels.triton_config import TileConfig
from gptq_belle.kernels.triton_launch import Workspace
from gptq_belle.kernels.triton_layout import SlicedWeight, gate_order, input_places, interleave_gates
from gptq_belle.kernels.triton_norm import FoldedNorm, NextNorm
from gptq_belle.kernels.triton_skinny_launch import skinny_launch, skinny_workspace

teach()

EPS = 1e-5


def launch(x, weight, out, config, **options):
    """Launch with programs in three orders: the same bits, and all tickets are 0 afterwards."""
    sums, tickets = skinny_workspace(len(x), weight.out_features, config)
    workspace = Workspace(torch.empty(max(sums, 1)), torch.zeros(max(tickets, 1), dtype=torch.int32))
    following = options.get("next_norm")
    results = []
    for seed in range(3 if config.SPLIT_K > 1 else 1):
        workspace.sums.fill_(torch.nan)
        with Shuffled(seed):
            skinny_launch(x, weight, out, config, workspace, **options)()
        assert not workspace.tickets.any()
        results.append([out.clone(), *([] if following is None else [following.x.clone(), following.moments.clone()])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("parts", "warps"), [(2, 1), (3, 4), (5, 1)])
def test_order_of_programs_does_not_change_a_bit(parts, warps, dtype):
    words = random_words(4, 640, 136, 64)
    weight, x, bias = laid_out(words, 4), torch.randn(11, 640).to(dtype), torch.randn(136)
    out = torch.empty(11, 136, dtype=dtype)
    launch(x, weight, out, TileConfig(8, 64, 128, parts, 4, 4, warps), bias=bias)
    exact = F.linear(x.double(), formula(**words, bits=4, v1=True)) + bias
    assert relative_error(out, exact) < ERRORS[dtype]


class Layer(NamedTuple):
    """A weight in slices, and its exact values (N, K)."""

    weight: SlicedWeight
    exact: torch.Tensor


def layer(inputs, outputs, bits, group_size, act_order=False, sym=False):
    words = random_words(bits, inputs, outputs, group_size, act_order=act_order)
    words["scales"].div_(2 ** max(bits - 4, 0))  # otherwise products of 8 bits overflow in float16
    if sym:
        words["qzeros"].fill_({4: 0x77777777, 8: 0x7F7F7F7F}[bits])  # version 1: the zero points are 8 and 128
    return Layer(laid_out(words, bits), formula(**words, bits=bits, v1=True))


@settings(max_examples=16, deadline=None, derandomize=True)
@given(gated=st.booleans(), dtype=st.sampled_from(DTYPES), rows=st.sampled_from([1, 5, 9]), mean=st.integers(0, 2),
       width=st.sampled_from([96, 320]), format_=st.sampled_from([(4, 128), (8, 32), (3, 64)]),
       config=st.sampled_from([TileConfig(8, 64, 128, 1, 2, 4), TileConfig(8, 32, 128, 2, 4, 4, 4),
                               TileConfig(16, 64, 64, 3, 2, 4), TileConfig(8, 32, 128, 1, 16, 2, 16)]),
       act_order=st.booleans())
def test_feed_forward_with_its_norm(gated, dtype, rows, mean, width, format_, config, act_order):
    check_feed_forward(gated, dtype, rows, mean, width, format_, config, act_order)


GRID = {"gated": (False, True), "dtype": DTYPES, "rows": (1, 2, 7, 8, 9, 16, 17, 32, 33, 63, 64), "mean": (0, 1, 2),
        "width": (64, 96, 320, 1056), "tile": ((8, 64, 1), (8, 32, 4), (8, 32, 16), (16, 64, 1), (32, 64, 1),
                                               (64, 64, 1)),
        "step": (64, 128), "split": (1, 2, 5), "bits": (2, 3, 4, 8), "group_size": (32, 64, 128, -1),
        "act_order": (False, True), "sym": (False, True)}


def check_grid(gated, dtype, rows, mean, width, tile, step, split, bits, group_size, act_order, sym):
    """Norms are over up to 33 tiles, more than are merged at a time."""
    row_tile, columns, k_warps = tile
    config = TileConfig(row_tile, columns, 128 if k_warps > 1 else step, split, max(4, k_warps), 3, k_warps)
    check_feed_forward(gated, dtype, rows, mean, width, (bits, group_size), config, act_order, sym and bits in (4, 8))


@pytest.mark.slow
@pytest.mark.parametrize("case", covering_cases(GRID, 2, 0), ids=lambda case: "-".join(map(str, case.values())))
def test_two_properties_at_a_time(case):
    check_grid(**case)


@pytest.mark.slow
def test_random_cases():
    seed, cases = random_cases(GRID, 20)
    for case in cases:
        print(f"GRID_SEED={seed}", case)
        check_grid(**case)


@pytest.mark.slow
@pytest.mark.parametrize("rows", range(1, 65))
def test_every_number_of_rows(rows):
    row_tile = next(tile for tile in (8, 16, 32, 64) if rows <= tile)
    for tile in {8, row_tile}:
        check_feed_forward(rows % 2 == 0, DTYPES[0], rows, 1, 96, (4, 32), TileConfig(tile, 64, 64, 2, 4, 3), True)


def check_feed_forward(gated, dtype, rows, mean, width, format_, config, act_order, sym=False):
    """A block from its attention to the activation function: residual stream, folded norm, product, activation.

    LLaMA has an RMS norm and SiLU(gate) * up, BLOOM a layer norm and GELU.
    """
    torch.manual_seed(rows * width + mean)
    inner, bits, group_size = 160, *format_
    first, second = layer(128, width, 4, 32), layer(
        width, 2 * inner if gated else inner, bits, group_size, act_order, sym)
    gamma, beta, bias = torch.rand(width) + 0.5, torch.randn(width), torch.randn(len(second.exact))
    x, stream = torch.randn(rows, 128).to(dtype), (torch.randn(rows, width) + mean).to(dtype)
    places, down_places = input_places(second.weight), torch.randperm(inner + 32)[:inner].int()
    tiles = -(-width // config.BN)
    following = NextNorm(gamma, places, torch.zeros(rows, second.weight.places, dtype=dtype),
                         torch.full((2, tiles, rows), torch.nan))
    new_stream = torch.empty(rows, width, dtype=dtype)
    own = config._replace(SPLIT_K=min(config.SPLIT_K, first.weight.words.shape[0]))
    launch(x, first.weight, new_stream, own, residual=stream, next_norm=following)
    assert relative_error(new_stream, F.linear(x.double(), first.exact) + stream.double()) < ERRORS[dtype]

    y = new_stream.double()
    if gated:
        normed = F.rms_norm(y, (width,), gamma.double(), EPS)
        gate, up = F.linear(normed, second.exact, bias.double()).chunk(2, -1)
        expected, product = F.silu(gate) * up, None
        weight, bias = interleave_gates(second.weight), bias[gate_order(2 * inner, bias.device)]
    else:
        normed = F.layer_norm(y, (width,), gamma.double(), beta.double(), EPS)
        expected = F.gelu(F.linear(normed, second.exact, bias.double()), approximate="tanh")
        weight, product = second.weight, (second.exact @ gamma.double()).float()
        bias = (bias.double() + second.exact @ beta.double()).float()
    hidden = torch.zeros(rows, inner + 32, dtype=dtype)
    own = config._replace(SPLIT_K=min(config.SPLIT_K, weight.words.shape[0]))
    launch(following.x, weight, hidden, own, bias=bias, activation="silu_mul" if gated else "gelu", places=down_places,
           norm=FoldedNorm(following.moments, product, EPS, width, config.BN))
    found = hidden[:, down_places.long()]
    # The folded layer norm subtracts a mean of up to 2 standard deviations after the product.
    assert relative_error(found, expected) < 4 * ERRORS[dtype]
    assert hidden.count_nonzero() <= found.numel()


def test_gates_of_an_odd_number_are_refused():
    with pytest.raises(ValueError, match="24"):
        interleave_gates(layer(32, 24, 4, 32).weight)
