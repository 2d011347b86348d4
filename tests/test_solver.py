"""The solver against an independent implementation of the paper (tests/oracle_gptq.py), and its properties.

Problems are random and continuous, so no value is a rounding tie, and float64 determines the codes uniquely.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_gptq import Oracle, gptq_oracle, least_squares_oracle, nearest_oracle, relative_error, static_oracle
from torch import Tensor

from gptq_belle.errors import InputError
from gptq_belle.formats.gptq_weight import QuantizedWeight, dequantize
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.grid import min_max_grid, searched_grid
from gptq_belle.quantization.solver import Solution, gptq, round_to_nearest

BITS, GROUP_SIZES = (2, 3, 4, 8), (32, 64, 128, -1)
EXACT = {"rtol": 0, "atol": 0}


def problem(rows: int, columns: int, seed: int, *, samples: int | None = None,
            dead: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Weight (rows, columns) and the mean x x^T of correlated inputs of unequal size, both float64."""
    rng = np.random.default_rng(seed)
    samples, rank = samples or 2 * columns, max(2, columns // 4)
    inputs = rng.standard_normal((samples, rank)) @ rng.standard_normal((rank, columns))
    inputs += 0.5 * rng.standard_normal((samples, columns))  # independent noise per input
    inputs *= np.exp(0.7 * rng.standard_normal(columns))
    inputs[:, list(dead)] = 0.0
    weight = rng.standard_normal((rows, columns)) * np.exp(0.5 * rng.standard_normal((rows, 1)))
    return torch.from_numpy(weight), torch.from_numpy(inputs.T @ inputs / samples)


def oracle_for(weight: Tensor, hessian: Tensor, config: QuantConfig, damp: float | None = None) -> Oracle:
    return gptq_oracle(weight.numpy(), hessian.numpy(), bits=config.bits, group_size=config.group_size,
                       sym=config.sym, act_order=config.act_order, damp=damp or config.damp)


def assert_same(found: QuantizedWeight, expected: Oracle) -> None:
    np.testing.assert_array_equal(found.g_idx.numpy(), expected.g_idx)
    np.testing.assert_array_equal(found.scales.numpy(), expected.scales)
    np.testing.assert_array_equal(found.zeros.numpy(), expected.zeros)
    np.testing.assert_array_equal(found.codes.numpy(), expected.codes)


def error_of(solution: Solution, weight: Tensor, hessian: Tensor) -> float:
    return relative_error(weight.double().numpy(), dequantize(solution.weight).double().numpy(),
                          hessian.double().numpy())


# The oracle itself: equation (2), column by column, gives the constrained least-squares solution.


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_oracle_solves_the_least_squares_problem(bits, sym):
    weight, hessian = (t.numpy() for t in problem(5, 40, seed=bits))
    expected = least_squares_oracle(weight, hessian, bits=bits, sym=sym, damp=0.01)
    found = gptq_oracle(weight, hessian, bits=bits, group_size=-1, sym=sym, damp=0.01)
    np.testing.assert_array_equal(found.codes, expected)


# Codes against the oracle.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_are_those_of_quantized_weight(dtype):
    """The docstring of QuantizedWeight gives one dtype per field, for any dtype of the arithmetic."""
    weight, hessian = (t.to(dtype) for t in problem(3, 64, seed=10))
    config = QuantConfig(preset="fast", group_size=32)
    for solution in (gptq(weight, hessian, config), round_to_nearest(weight, config)):
        assert [t.dtype for t in solution.weight] == [torch.uint8, torch.float32, torch.int32, torch.int32]
        assert isinstance(solution.error, float)
        assert isinstance(solution.damp, float)


@pytest.mark.parametrize(("columns", "groups"), [(256, 2), (192, 3), (96, 3), (100, 1)])
def test_group_size_auto_is_the_largest_that_divides_the_inputs(columns, groups):
    weight = torch.arange(8 * columns).view(8, columns).sin()
    found = gptq(weight, torch.eye(columns), QuantConfig(preset="fast", group_size="auto"))
    assert found.weight.scales.shape == (8, groups)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_same_codes_as_the_paper(bits, group_size, sym, act_order):
    columns = {32: 96, 64: 192, 128: 256, -1: 160}[group_size]
    rows = 1 + (7 * bits + group_size) % 17
    config = QuantConfig(preset="fast", bits=bits, group_size=group_size, sym=sym, act_order=act_order)
    weight, hessian = problem(rows, columns, seed=1000 * bits + group_size)
    solution = gptq(weight, hessian, config)
    assert_same(solution.weight, oracle_for(weight, hessian, config))
    assert solution.damp == config.damp


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("rows", "columns", "group_size", "seed"),
                         [(1, 32, 32, 1), (17, 32, -1, 2), (2, 224, 32, 3), (16, 256, -1, 4), (3, 256, 64, 5),
                          (9, 8, -1, 6), (4, 129, -1, 7), (4, 1, -1, 8), (5, 128, 128, 9)])
def test_same_codes_at_other_sizes(rows, columns, group_size, seed, act_order):
    config = QuantConfig(preset="fast", bits=3, group_size=group_size, sym=False, act_order=act_order)
    weight, hessian = problem(rows, columns, seed)
    assert_same(gptq(weight, hessian, config).weight, oracle_for(weight, hessian, config))


@pytest.mark.parametrize("damp", [1e-4, 0.05, 0.5])
@pytest.mark.parametrize("act_order", [False, True])
def test_damping_is_a_share_of_the_mean_diagonal(damp, act_order):
    config = QuantConfig(preset="fast", group_size=32, damp=damp, act_order=act_order)
    weight, hessian = problem(6, 160, seed=11)
    assert_same(gptq(weight, hessian, config).weight, oracle_for(weight, hessian, config))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])  # a repaired diagonal of 1 sorts and damps differently in each
def test_never_active_inputs(scale, sym, act_order):
    dead = (0, 5, 6, 63, 127, 128, 159)
    weight, hessian = problem(7, 160, seed=12, dead=dead)
    hessian = hessian * scale
    config = QuantConfig(preset="fast", group_size=32, sym=sym, act_order=act_order)
    solution = gptq(weight, hessian, config)
    assert_same(solution.weight, oracle_for(weight, hessian, config))
    assert not dequantize(solution.weight)[:, list(dead)].any()
    assert solution.error == pytest.approx(error_of(solution, weight, hessian), rel=1e-9)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("samples", [1, 40])
def test_rank_deficient_hessian(samples, act_order):
    weight, hessian = problem(5, 192, seed=13, samples=samples)
    assert torch.linalg.matrix_rank(hessian) == samples
    config = QuantConfig(preset="fast", group_size=64, sym=False, act_order=act_order)
    solution = gptq(weight, hessian, config)
    assert solution.damp == config.damp
    assert_same(solution.weight, oracle_for(weight, hessian, config))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_rows_at_the_edges_of_the_grid(bits, sym):
    weight, hessian = problem(8, 96, seed=14)
    weight[0] = weight[0].abs() + 1.0  # nothing below zero
    weight[1] = -weight[1].abs() - 1.0  # nothing above zero
    weight[2] = 0.0
    weight[3, 32:64] = 0.0
    weight[4] *= 1e-9  # float16 has no such scale
    weight[5] *= 1e-5  # a subnormal scale at 8 bits
    weight[6, 1:] = 0.0
    config = QuantConfig(preset="fast", bits=bits, group_size=32, sym=sym)
    expected = oracle_for(weight, hessian, config)
    assert (expected.scales[2] == 1).all()
    assert (expected.scales[4] == 1).all()
    assert_same(gptq(weight, hessian, config).weight, expected)
    nearest = nearest_oracle(weight.numpy(), bits=bits, group_size=32, sym=sym)
    assert_same(round_to_nearest(weight, config).weight, nearest)


def test_scales_below_1e_7_are_dropped():
    """float16 has 5.96e-8 and 1.19e-7 and no value between them: the first is dropped, the second kept."""
    weight = torch.zeros(2, 32, dtype=torch.float64)
    weight[0, 3], weight[1, 3] = 6.1e-8 * 255 / 2, 1.15e-7 * 255 / 2
    scales = round_to_nearest(weight, QuantConfig(preset="fast", bits=8, group_size=32)).weight.scales
    assert scales.flatten().tolist() == [1.0, 2.0**-23]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_round_to_even_before_the_zero_point_is_added(dtype):
    """Golden codes on grids whose scale is exactly 1, so that ties are exact."""
    def codes_of(values: list[float], sym: bool) -> tuple[list[int], int]:
        weight = torch.tensor([values + [0.0] * (32 - len(values))], dtype=dtype)
        found = round_to_nearest(weight, QuantConfig(preset="fast", bits=8, group_size=32, sym=sym)).weight
        assert found.scales.item() == 1.0
        return found.codes[0, : len(values)].tolist(), int(found.zeros)

    assert codes_of([127.5, -127.5, 0.5, 1.5, 2.5, -0.5, -1.5], sym=True) == ([255, 0, 128, 130, 130, 128, 126], 128)
    assert codes_of([-3.0, 252.0, 0.5, 1.5, 2.5, -0.5, -1.5], sym=False) == ([0, 255, 3, 5, 5, 3, 1], 3)
    assert codes_of([-0.5, 254.5, 1.5], sym=False) == ([0, 254, 2], 0)
    assert codes_of([-1.5, 253.5, 0.5], sym=False) == ([0, 255, 2], 2)


# Static groups.


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize(("bits", "group_size", "sym"), [(2, 32, True), (3, 64, False), (4, 128, True), (8, -1, True)])
def test_static_groups_are_solved_in_activation_order(bits, group_size, sym, search):
    weight, hessian = problem(6, 256, seed=30 + bits)
    without = ("refine", "targets") if search else ("search", "refine", "targets")
    config = QuantConfig(bits=bits, group_size=group_size, sym=sym, without=without)
    found = gptq(weight, hessian, config).weight
    size = 256 if group_size == -1 else group_size
    assert torch.equal(found.g_idx, torch.arange(256, dtype=torch.int32) // size)
    damped = hessian + config.damp * hessian.diagonal().mean() * torch.eye(256)
    matters = 1 / torch.linalg.inv(damped).diagonal()
    grids = [searched_grid(part, importance, bits, sym) if search else min_max_grid(part, bits, sym)
             for part, importance in zip(weight.t().split(size), matters.split(size), strict=True)]
    scales, zeros = (torch.stack(parts, 1).numpy() for parts in zip(*grids, strict=True))
    np.testing.assert_array_equal(found.scales.numpy(), scales)
    np.testing.assert_array_equal(found.zeros.numpy(), zeros)
    expected = static_oracle(weight.numpy(), hessian.numpy(), scales, zeros, bits=bits, damp=config.damp)
    np.testing.assert_array_equal(found.codes.numpy(), expected)
    assert bool((found.scales < 0).any()) == (search and sym)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 128), (3, 64), (4, 128), (8, 128)])
def test_every_technique_lowers_the_error_on_unequal_inputs(bits, group_size):
    """Except at 2 bits in groups of 32, where search alone does not reduce the error."""
    errors = {}
    for name, without in {"plain": ("search", "order", "refine"), "order": ("search", "refine"), "search": ("refine",),
                          "all": ()}.items():
        problems = [problem(32, 256, seed=40 + seed) for seed in range(4)]
        config = QuantConfig(bits=bits, group_size=group_size, without=without)
        errors[name] = sum(error_of(gptq(weight, hessian, config), weight, hessian) for weight, hessian in problems)
    assert errors["all"] < errors["search"] < errors["order"] < errors["plain"]


# Rounding to nearest.


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_identity_hessian_equals_rounding_to_nearest(bits, group_size, sym, act_order):
    weight, _ = problem(6, 256, seed=bits)
    config = QuantConfig(preset="fast", bits=bits, group_size=group_size, sym=sym, act_order=act_order)
    nearest = round_to_nearest(weight, config)
    assert_same(nearest.weight, nearest_oracle(weight.numpy(), bits=bits, group_size=group_size, sym=sym))
    solution = gptq(weight, torch.eye(256, dtype=torch.float64), config)
    for found, expected in zip(solution.weight, nearest.weight, strict=True):
        torch.testing.assert_close(found, expected, **EXACT)
    assert nearest.error == pytest.approx(error_of(nearest, weight, torch.eye(256)), rel=1e-9)
    assert solution.error == pytest.approx(nearest.error, rel=1e-9)


# Error.


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "group_size", "sym"),
                         [(2, 32, False), (2, -1, True), (3, 64, True), (4, 64, False), (4, -1, True), (8, 32, True)])
def test_error_is_below_that_of_rounding(bits, group_size, sym, act_order):
    weight, hessian = problem(12, 192, seed=15)
    config = QuantConfig(preset="fast", bits=bits, group_size=group_size, sym=sym, act_order=act_order)
    solution = gptq(weight, hessian, config)
    assert solution.error == pytest.approx(error_of(solution, weight, hessian), rel=1e-9)
    assert solution.error < 0.7 * error_of(round_to_nearest(weight, config), weight, hessian)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("samples", [384, 50])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_float32_is_as_good_as_float64(bits, samples, act_order):
    weight, hessian = problem(16, 192, seed=16, samples=samples)
    config = QuantConfig(preset="fast", bits=bits, group_size=32, sym=False, act_order=act_order)
    exact, single = gptq(weight, hessian, config), gptq(weight.float(), hessian.float(), config)
    assert error_of(single, weight, hessian) == pytest.approx(error_of(exact, weight, hessian), rel=0.05)
    assert single.error == pytest.approx(error_of(single, weight.float(), hessian.float()), rel=1e-3)
    assert (single.weight.codes == exact.weight.codes).float().mean() > 0.98


def test_float32_weight_with_float64_hessian():
    weight, hessian = problem(4, 64, seed=17)
    config = QuantConfig(preset="fast", group_size=32)
    mixed, single = gptq(weight.float(), hessian, config), gptq(weight.float(), hessian.float(), config)
    assert mixed.error == pytest.approx(single.error, rel=0.02)


def test_error_of_a_zero_weight_is_finite():
    weight, hessian = torch.zeros(3, 32, dtype=torch.float64), problem(3, 32, seed=18)[1]
    config = QuantConfig(preset="fast", group_size=32)
    assert gptq(weight, hessian, config).error == 0
    assert round_to_nearest(weight, config).error == 0


# Damping.


def indefinite(columns: int, smallest: float, seed: int) -> tuple[Tensor, Tensor]:
    """A problem whose Hessian has one eigenvalue of `smallest` times its mean diagonal."""
    weight, hessian = problem(5, columns, seed)
    values, vectors = torch.linalg.eigh(hessian)
    values[0] = smallest * float(hessian.diagonal().mean())
    return weight, (vectors * values) @ vectors.t()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("damp", "smallest", "used"), [(0.01, -0.05, 0.1), (1e-4, -5e-3, 1e-2), (0.02, -0.01, 0.02)])
def test_damping_is_raised_until_the_factorization_succeeds(damp, smallest, used, act_order):
    weight, hessian = indefinite(160, smallest, seed=19)
    config = QuantConfig(preset="fast", group_size=32, damp=damp, act_order=act_order)
    solution = gptq(weight, hessian, config)
    assert solution.damp == pytest.approx(used, rel=1e-9)
    assert_same(solution.weight, oracle_for(weight, hessian, config, damp=solution.damp))
    assert solution.error == pytest.approx(error_of(solution, weight, hessian), rel=1e-6)


@pytest.mark.parametrize("act_order", [False, True])
def test_hessian_that_cannot_be_damped_is_refused(act_order):
    weight, _ = problem(3, 32, seed=20)
    hessian = torch.eye(32, dtype=torch.float64)
    hessian[4, 9] = hessian[9, 4] = 1e9
    with pytest.raises(InputError, match="(?i)hessian.*(positive definite|factor|cholesky)") as caught:
        gptq(weight, hessian, QuantConfig(preset="fast", group_size=32, act_order=act_order))
    assert caught.value.remedy


def test_negative_hessian_is_refused():
    weight, hessian = problem(3, 32, seed=21)
    with pytest.raises(InputError, match="(?i)hessian"):
        gptq(weight, -hessian, QuantConfig(preset="fast", group_size=32))


# Inputs.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_are_refused(value):
    config = QuantConfig(preset="fast", group_size=32)
    weight, hessian = problem(3, 64, seed=22)
    bad_weight, bad_hessian = weight.clone(), hessian.clone()
    bad_weight[1, 40], bad_hessian[7, 50] = value, value
    with pytest.raises(InputError, match="(?i)weight"):
        gptq(bad_weight, hessian, config)
    with pytest.raises(InputError, match="(?i)weight"):
        round_to_nearest(bad_weight, config)
    with pytest.raises(InputError, match="(?i)hessian"):
        gptq(weight, bad_hessian, config)


@pytest.mark.parametrize("sym", [True, False])
def test_weights_too_large_for_a_float16_scale_are_refused(sym):
    weight, hessian = problem(3, 64, seed=26)
    config = QuantConfig(preset="fast", bits=2, group_size=32, sym=sym)
    with pytest.raises(InputError, match="(?i)scale"):
        gptq(weight * 1e6, hessian, config)
    with pytest.raises(InputError, match="(?i)scale"):
        round_to_nearest(weight * 1e6, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
def test_arguments_are_not_modified(group_size, act_order, dtype):
    weight, hessian = (t.to(dtype) for t in problem(4, 160, seed=23, dead=(3, 130)))
    before = weight.clone(), hessian.clone()
    config = QuantConfig(preset="fast", group_size=group_size, act_order=act_order)
    gptq(weight, hessian, config)
    round_to_nearest(weight, config)
    torch.testing.assert_close((weight, hessian), before, **EXACT)


def test_result_does_not_depend_on_strides():
    weight, hessian = problem(6, 96, seed=24)
    config = QuantConfig(preset="fast", group_size=32, sym=False)
    strided = torch.stack([weight.t(), weight.t()], dim=2)[..., 0].t()
    assert not strided.is_contiguous()
    assert_same(gptq(strided, hessian, config).weight, oracle_for(weight, hessian, config))


# Properties.

CONFIGS = st.builds(QuantConfig, bits=st.sampled_from(BITS), group_size=st.sampled_from((32, 64, -1)),
                    sym=st.booleans(), act_order=st.booleans(), damp=st.floats(1e-3, 0.3),
                    preset=st.sampled_from(("fast", "best")), positive_scales=st.booleans())
SEEDS = st.integers(0, 2**32 - 1)
quick = settings(max_examples=30, deadline=None, derandomize=True)


@quick
@given(config=CONFIGS, seed=SEEDS, rows=st.integers(1, 6), blocks=st.integers(1, 3), size=st.floats(1e-6, 1e3),
       dead=st.sets(st.integers(0, 63), max_size=64))
def test_result_is_always_storable(config, seed, rows, blocks, size, dead):
    columns = 64 * blocks
    weight, hessian = problem(rows, columns, seed, dead=tuple(dead))
    weight *= size
    groups = 1 if config.group_size == -1 else columns // config.group_size
    maxq = 2**config.bits - 1
    for codes, scales, zeros, g_idx in (gptq(weight, hessian, config).weight, round_to_nearest(weight, config).weight):
        assert codes.shape == (rows, columns)
        assert scales.shape == zeros.shape == (rows, groups)
        assert int(codes.max()) <= maxq
        assert bool((scales.isfinite() & (scales != 0)).all())
        signed = config.preset == "best" and config.sym and not config.positive_scales
        assert signed or bool((scales > 0).all())
        assert torch.equal(scales.half().to(scales.dtype), scales)
        assert 0 <= int(zeros.min()) <= int(zeros.max()) <= maxq
        if config.sym:
            assert bool((zeros == 2 ** (config.bits - 1)).all())
        assert torch.bincount(g_idx, minlength=groups).tolist() == [columns // groups] * groups


@quick
@given(config=CONFIGS, seed=SEEDS, factor=st.floats(1e-6, 1e6))
def test_scale_of_the_hessian_does_not_matter(config, seed, factor):
    weight, hessian = problem(3, 128, seed)
    plain, scaled = gptq(weight, hessian, config), gptq(weight, hessian * factor, config)
    for found, expected in zip(scaled.weight, plain.weight, strict=True):
        torch.testing.assert_close(found, expected, **EXACT)
    assert scaled.error == pytest.approx(plain.error, rel=1e-6)


@quick
@given(config=CONFIGS, seed=SEEDS)
def test_rows_are_independent(config, seed):
    weight, hessian = problem(4, 128, seed)
    together = gptq(weight, hessian, config).weight
    alone = [gptq(weight[row : row + 1], hessian, config).weight for row in range(4)]
    for field in ("codes", "scales", "zeros"):
        torch.testing.assert_close(torch.cat([getattr(one, field) for one in alone]), getattr(together, field), **EXACT)


@quick
@given(bits=st.sampled_from(BITS), seed=SEEDS)
def test_permuting_the_inputs_permutes_the_result_of_act_order(bits, seed):
    """act_order sorts the inputs, so their original order has no influence."""
    weight, hessian = problem(3, 128, seed)
    config = QuantConfig(preset="fast", bits=bits, group_size=32, sym=False, act_order=True)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(128))
    plain = gptq(weight, hessian, config).weight
    moved = gptq(weight[:, order], hessian[order][:, order], config).weight
    torch.testing.assert_close(moved.codes, plain.codes[:, order], **EXACT)
    torch.testing.assert_close(moved.g_idx, plain.g_idx[order], **EXACT)
    torch.testing.assert_close(moved.scales, plain.scales, **EXACT)


def test_no_single_code_is_better_for_the_last_column():
    """The last column is rounded to its optimum for the other codes; this check needs no oracle."""
    weight, hessian = problem(4, 48, seed=25)
    config = QuantConfig(preset="fast", bits=3, group_size=-1, sym=False, damp=1e-6)
    found = gptq(weight, hessian, config).weight
    best = relative_error(weight.numpy(), dequantize(found).numpy(), hessian.numpy())
    for row, step in itertools.product(range(4), (-1, 1)):
        codes = found.codes.clone().to(torch.int16)
        codes[row, -1] += step
        if 0 <= codes[row, -1] <= 7:
            other = dequantize(found._replace(codes=codes.to(torch.uint8)))
            assert relative_error(weight.numpy(), other.numpy(), hessian.numpy()) > best
