"""The native inner loops of quantization: every instruction set gives the bits that NumPy computes in float32."""

import os
from functools import partial

import numpy as np
import pytest
import torch
from conftest import naming
from test_triton_gptq import BITS, GROUPS, block, check_block, check_descent, check_mixed_grids, descent, edges

from gptq_belle.kernels import cpu_solver
from gptq_belle.kernels.native_library import LIBRARY_VARIABLE, NativeLibrary, load_library
from gptq_belle.quantization import grid, refine

FOUND = load_library()
ISAS = FOUND.usable_isas if isinstance(FOUND, NativeLibrary) else ()

pytestmark = pytest.mark.skipif(not ISAS and LIBRARY_VARIABLE not in os.environ, reason=str(FOUND))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_gptq_block(bits, group, isa):
    solve = partial(cpu_solver.solve_block, isa=isa)
    for inputs, outputs in ((128, 130), (max(group, 1), 1)) if group else ((77, 65), (1, 3)):
        check_block(solve, *block(inputs, outputs, seed=10 * bits + group), group, bits, bits % 2 == 0)
        check_block(solve, *block(inputs, outputs, seed=11 * bits + group), group, bits, bits % 2 == 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_gptq_block_of_extreme_values(group, sym, isa):
    check_block(partial(cpu_solver.solve_block, isa=isa), *edges(128, 8), group, 8, sym)


@pytest.mark.parametrize("isa", ISAS)
def test_gptq_block_with_a_grid_per_input(isa):
    check_mixed_grids(partial(cpu_solver.solve_block, isa=isa))


def test_gptq_block_with_a_transposed_factor():
    weight, factor = block(128, 20, seed=1)
    check_block(cpu_solver.solve_block, weight, factor.t().contiguous().t(), 64, 4, True)


def test_scales_are_rounded_to_float16():
    """float16's positive numbers and both neighbours of each midpoint, as the scale of a group at 8 bits."""
    exact = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (exact[:-1] + exact[1:]) / 2
    wanted = np.concatenate([exact, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, exact[-1])])
    weight = torch.zeros(32, int((wanted < 50_000).sum()))
    weight[0] = torch.from_numpy(wanted[wanted < 50_000]) * 127.5  # leaves room for the check itself
    check_block(cpu_solver.solve_block, weight, torch.eye(32), 32, 8, True)


def test_scales_beyond_float16_become_infinite():
    weight = torch.tensor([1e9, 65519.0 * 7.5, 65520.0 * 7.5, 3e38]).repeat(32, 1)
    scales, zeros, codes, errors = torch.ones(1, 4), torch.ones(1, 4), torch.ones(32, 4, dtype=torch.uint8), weight + 0
    cpu_solver.solve_block(weight, torch.eye(32), codes, errors, scales, zeros, group=32, bits=4, sym=True)
    assert scales.tolist() == [[torch.inf, 65504.0, torch.inf, torch.inf]]


# Coordinate descent.


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", BITS)
def test_descent(bits, isa):
    check_descent(partial(cpu_solver.descend, isa=isa), bits, [(128, 130), (64, 64), (77, 33), (1, 1)])


@pytest.mark.parametrize("inputs", [128, 300])
def test_descent_of_a_whole_group_agrees_with_torch(inputs, monkeypatch):
    """With more than 128 inputs, too. Torch may decide differently if a code is a tie to the last bits."""
    given = descent(inputs, 40, 4, seed=1)
    others = tuple(part.clone() for part in given)
    refine.descend(*given, 4)
    monkeypatch.setattr("gptq_belle.kernels.cpu_solver.is_supported", lambda tensor: False)
    refine.descend(*others, 4)
    assert (given[0] == others[0]).all(0).sum() >= 38


# Grid search.


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_grid_search(bits, sym, isa):
    """The error of every output is no larger than that of torch's choice in float64."""
    for inputs, outputs in ((128, 130), (32, 16), (77, 5), (1, 1)):
        generator = torch.Generator().manual_seed(inputs + bits)
        weight = torch.randn(inputs, outputs, generator=generator) ** 3
        weight[:, 0] = 0
        importance = torch.rand(inputs, generator=generator) ** 2 + 0.01
        low, high = weight.amin(0).clamp_(max=0), weight.amax(0).clamp_(min=0)
        scales, zeros = grid._candidate_grids(low, high, bits, sym, False)
        found = cpu_solver.search_grid(weight, importance, scales, zeros, bits, grid.SMALLEST_SEARCHED, isa=isa)
        exact = grid._search(weight.double(), scales.double(), zeros.double(), importance.double(), bits)
        assert found[0] == exact[0] == -1
        for output in range(1, outputs):
            ours, best = (loss(weight[:, output], importance, scales[at, output], zeros[at, output], bits)
                          for at in (int(found[output]), int(exact[output])))
            assert ours == pytest.approx(best, rel=1e-5)
        assert (found == exact).sum() >= 0.9 * outputs  # the others have equal losses


def loss(weight, importance, scale, zero, bits):
    decoded = grid.to_codes(weight.double(), scale.double(), zero.double(), bits).sub_(zero).mul_(scale)
    return float(importance.double() @ (decoded - weight).square())


def test_first_of_equal_grids_is_chosen():
    weight, ones = torch.tensor([[1.0], [-1.0]]).repeat(1, 20), torch.ones(5, 20)
    scales = ones * torch.tensor([[3.0], [1e-9], [1.0], [-1.0], [0.5]])
    found = cpu_solver.search_grid(weight, torch.ones(2), scales, 8 * ones, 4, grid.SMALLEST_SEARCHED)
    assert (found == 2).all()


# Threads and malformed arguments.


def test_result_does_not_depend_on_threads():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            weight, factor = block(128, 200, seed=2)
            codes, errors, scales = torch.empty_like(weight, dtype=torch.uint8), weight + 0, torch.ones(2, 200)
            cpu_solver.solve_block(weight, factor, codes, errors, scales, scales + 0, group=64, bits=3, sym=False)
            found.append((codes, errors, scales))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_malformed_tensors_are_rejected():
    weight, factor = block(64, 8, seed=3)
    given = {"W": weight, "Hinv": factor, "codes": torch.empty(64, 8, dtype=torch.uint8), "Err": weight + 0,
             "scales": torch.ones(1, 8), "zeros": torch.ones(1, 8), "group": 64, "bits": 4, "sym": True}
    for name, wrong in (("codes", given["codes"].int()), ("Err", weight[:32]), ("scales", torch.ones(2, 8)),
                        ("zeros", torch.ones(8)), ("Hinv", factor[:32]), ("Hinv", factor.double()),
                        ("scales", torch.ones(8, 1).expand(8, 8)[:1].t())):
        with pytest.raises(ValueError, match=naming(name)):
            cpu_solver.solve_block(**given | {name: wrong})
    for name, wrong, named in (("group", 48, 48), ("W", torch.ones(129, 8), 129), ("W", weight.t(), 8)):
        with pytest.raises(ValueError, match=naming(named)):
            cpu_solver.solve_block(**given | {name: wrong})
    given = descent(32, 8, 4, seed=0)
    wrong = ((given[0].t(), "8 inputs"), (torch.ones(9), "scale"), (torch.ones(7), "zero"), (given[3][:31], "residual"),
             (given[4].t()[:, :31], "Hessian"))
    for place, (tensor, named) in enumerate(wrong):
        with pytest.raises(ValueError, match=naming(named)):
            cpu_solver.descend(*given[:place], tensor, *given[place + 1 :], 4)
    with pytest.raises(ValueError, match=naming("scales")):
        cpu_solver.search_grid(weight, torch.ones(64), torch.ones(3, 9), torch.ones(3, 8), 4, 1e-5)
