"""The Triton kernels of quantization, interpreted: equal to NumPy to the bit, and to the codes of torch.

`test_triton_gptq.py` runs this file in a separate process: TRITON_INTERPRET has to be set before Triton is imported.
"""

from types import SimpleNamespace

import pytest
import torch
from test_solver import problem
from test_triton_gptq import (
    BITS,
    GROUPS,
    block,
    block_oracle,
    check_block,
    check_descent,
    check_mixed_grids,
    descend_oracle,
    edges,
    solved,
)

from gptq_belle.kernels import triton_gptq
from gptq_belle.kernels.triton_gptq import descend, solve_block
from gptq_belle.quantization import grid, solver
from gptq_belle.quantization.config import QuantConfig


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_block(bits, group):
    sym = (BITS.index(bits) + GROUPS.index(group)) % 2 == 0
    inputs, outputs = {32: (96, 5), 64: (64, 33), 128: (128, 20), 0: (77, 32)}[group]
    check_block(solve_block, *block(inputs, outputs, seed=10 * bits + group), group, bits, sym)


@pytest.mark.parametrize("bits", BITS)
def test_descent(bits):
    check_descent(descend, bits, [(128, 20), (77, 33), (1, 1)])


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_edges(group, sym):
    check_block(solve_block, *edges(128, 8), group, 8, sym)


def test_grids_of_each_input():
    check_mixed_grids(solve_block)


def oracle_solver(W, Hinv, codes, Err, scales, zeros, *, group, bits, sym):
    """`block_oracle` with the interface of `solve_block`."""
    found = block_oracle(W, Hinv, group, bits, sym, scales[0] if group else scales, zeros[0] if group else zeros)
    for tensor, values in zip((codes, Err, scales, zeros), found, strict=True):
        tensor.copy_(values)


def oracle_descend(code, *rest):
    """`descend` in NumPy."""
    code.copy_(descend_oracle(code, *rest))


@pytest.mark.parametrize(("sym", "act_order", "preset"), [(True, False, "fast"), (False, True, "fast"),
                                                         (True, False, "best")])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_layer(group_size, sym, act_order, preset, monkeypatch):
    """Over several blocks, the last of which is short where the group allows."""
    bits = {32: 3, 64: 4, 128: 2, -1: 8}[group_size]
    columns = {32: 160, 64: 192, 128: 256, -1: 150}[group_size]
    config = QuantConfig(preset=preset, bits=bits, group_size=group_size, sym=sym, act_order=act_order)
    weight, hessian = (t.float() for t in problem(20, columns, seed=columns, dead=(3, 40)))
    torchs = solver.gptq(weight, hessian, config)
    oracles = SimpleNamespace(solve_block=oracle_solver, descend=oracle_descend, BLOCK=128)
    monkeypatch.setattr(grid, "fused_kernels", lambda tensor: oracles)
    expected = solver.gptq(weight, hessian, config)
    monkeypatch.setattr(grid, "fused_kernels", lambda tensor: triton_gptq)
    found = solver.gptq(weight, hessian, config)
    for name in found.weight._fields:
        assert torch.equal(getattr(found.weight, name), getattr(expected.weight, name)), name
    assert found.error == expected.error == pytest.approx(torchs.error, rel=1e-3)
    assert (found.weight.codes == torchs.weight.codes).all(1).sum() >= 19  # of 20 outputs: for one tie


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, at what the solver refuses afterwards
def test_scales_too_large_for_float16(monkeypatch):
    monkeypatch.setattr(grid, "fused_kernels", lambda tensor: triton_gptq)
    weight, hessian = (t.float() for t in problem(4, 64, seed=1))
    with pytest.raises(solver.InputError, match="too large for float16"):
        solver.gptq(weight * 1e7, hessian, QuantConfig(preset="fast", group_size=32))


def test_rounding():
    """Ties are rounded to even, and values far beyond every code to the last code."""
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, 126.49999, 4194303.5, 3e9, -3e9, 3e38, -3e38]])
    zero = torch.full((12,), 128.0)
    codes, *_ = solved(solve_block, weight, torch.ones(1, 1), 0, 8, True, torch.ones(12), zero)
    assert codes.tolist() == [[128, 130, 130, 128, 126, 128, 254, 255, 255, 0, 255, 0]]
