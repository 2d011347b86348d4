"""The Triton kernel of GPTQ's inner loop: code for code what the solver in torch does.

Triton decides at import whether its kernels are interpreted. So the tests marked `interpreted` run in a process of
their own, which `test_in_the_interpreter` starts on this file; the others run in this one.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_solver import problem

from gptq_belle.config import QuantConfig
from gptq_belle.kernels import triton_ready
from gptq_belle.quantization import solver

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts")
BITS, GROUPS = (2, 3, 4, 8), (32, 64, 128, 0)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_the_interpreter():
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "interpreted", __file__],
                          env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def block(inputs, outputs, seed):
    """Weights (inputs, outputs) and factor (inputs, inputs) of a block, float32."""
    weight, hessian = problem(outputs, inputs, seed)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian + 0.01 * torch.eye(inputs)), upper=True)
    return weight.t().float().contiguous(), factor.float()


def block_oracle(weight, factor, group, bits, sym, scale, zero):
    """The inner loop in float32, each operation rounded once: codes, errors, scales, zeros."""
    w, factor, levels = weight.numpy().copy(), factor.numpy(), np.float32(2**bits - 1)
    codes, errors, scales, zeros = np.empty_like(w, np.uint8), np.empty_like(w), [], []
    scale, zero = scale.numpy(), zero.numpy()
    for i in range(len(w)):
        if group and i % group == 0:
            own = np.concatenate([w[i : i + group], np.zeros_like(w[:1])])
            low, high = own.min(0), own.max(0)
            span = 2 * np.maximum(-low, high) if sym else high - low
            scale = (span / levels).astype(np.float16).astype(np.float32)
            scale[scale < 1e-7] = 1
            zero = np.full_like(scale, 2 ** (bits - 1)) if sym else np.clip(np.rint(-low / scale), 0, levels)
        if i % (group or len(w)) == 0:
            scales.append(scale)
            zeros.append(zero)
        codes[i] = code = np.clip(np.rint(w[i] / scale) + zero, 0, levels)
        errors[i] = (w[i] - (code - zero) * scale) / factor[i, i]
        w[i + 1 :] -= factor[i, i + 1 :, None] * errors[i]
    return tuple(torch.from_numpy(np.stack(part)) for part in (codes, errors, scales, zeros))


def solved(solve_block, weight, factor, group, bits, sym, scale, zero):
    """The same from a solver in torch or Triton."""
    inputs, outputs = weight.shape
    scales = weight.new_full((inputs // group if group else 1, outputs), torch.nan)
    zeros = torch.full_like(scales, torch.nan)
    if not group:
        scales[0], zeros[0] = scale, zero
    codes, errors = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    solve_block(weight.clone(), factor, codes, errors, scales, zeros, group=group, bits=bits, sym=sym)
    return tuple(tensor.cpu() for tensor in (codes, errors, scales, zeros))


def check_block(solve_block, weight, factor, group, bits, sym, device="cpu"):
    """To the bit what NumPy finds; the codes and the grid also what the solver in torch finds."""
    scale, zero = solver.min_max_grid(1.2 * weight, bits, sym)  # of a larger group, where `group` is 0
    found = solved(solve_block, weight.to(device), factor.to(device), group, bits, sym, scale, zero)
    oracle = block_oracle(weight, factor, group, bits, sym, scale, zero)
    for name, ours, exact in zip(("codes", "errors", "scales", "zeros"), found, oracle, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    codes, _, scales, zeros = solved(solver._solve_block, weight, factor, group, bits, sym, scale, zero)
    assert torch.equal(found[0], codes)
    assert torch.equal(found[2], scales)
    assert torch.equal(found[3], zeros)


def edges(inputs, outputs):
    """A block whose outputs are at the edges of the grid."""
    weight, factor = block(inputs, outputs, seed=5)
    weight[:, 0] = weight[:, 0].abs() + 1.0  # nothing below zero
    weight[:, 1] = -weight[:, 1].abs() - 1.0  # nothing above zero
    weight[:, 2] = 0.0
    weight[32:64, 3] = 0.0
    weight[:, 4] *= 1e-9  # float16 has no such scale
    weight[:, 5] *= 1e-5  # a subnormal scale at 8 bits
    weight[1:, 6] = 0.0
    weight[:, 7] *= 1e4
    return weight, factor


@interpreted
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_interpreted_block(bits, group, sym):
    from gptq_belle.kernels.triton_gptq import solve_block

    inputs, outputs = {32: (96, 5), 64: (64, 33), 128: (128, 20), 0: (77, 32)}[group]
    check_block(solve_block, *block(inputs, outputs, seed=10 * bits + group), group, bits, sym)


@interpreted
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_interpreted_edges(group, sym):
    from gptq_belle.kernels.triton_gptq import solve_block

    check_block(solve_block, *edges(128, 8), group, 8, sym)


@interpreted
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_interpreted_layer(group_size, sym, act_order, monkeypatch):
    """Over several blocks, the last of which is short where the group allows."""
    from gptq_belle.kernels.triton_gptq import solve_block

    bits = {32: 3, 64: 4, 128: 2, -1: 8}[group_size]
    columns = {32: 160, 64: 192, 128: 256, -1: 150}[group_size]
    config = QuantConfig(bits=bits, group_size=group_size, sym=sym, act_order=act_order)
    weight, hessian = (t.float() for t in problem(20, columns, seed=columns, dead=(3, 40)))
    expected = solver.gptq(weight, hessian, config)
    monkeypatch.setattr(solver, "_block_solver", lambda W: solve_block)
    found = solver.gptq(weight, hessian, config)
    for ours, torchs in zip(found.weight, expected.weight, strict=True):
        assert torch.equal(ours, torchs)
    assert found.error == expected.error


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, at what the solver refuses afterwards
def test_interpreted_scales_too_large_for_float16(monkeypatch):
    from gptq_belle.kernels.triton_gptq import solve_block

    monkeypatch.setattr(solver, "_block_solver", lambda W: solve_block)
    weight, hessian = (t.float() for t in problem(4, 64, seed=1))
    with pytest.raises(solver.InputError, match="too large for float16"):
        solver.gptq(weight * 1e7, hessian, QuantConfig(group_size=32))


@interpreted
def test_interpreted_rounding():
    """Ties go to even, and what is far beyond every code ends at the last one."""
    from gptq_belle.kernels.triton_gptq import solve_block

    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, 126.49999, 4194303.5, 3e9, -3e9, 3e38, -3e38]])
    zero = torch.full((12,), 128.0)
    codes, *_ = solved(solve_block, weight, torch.ones(1, 1), 0, 8, True, torch.ones(12), zero)
    assert codes.tolist() == [[128, 130, 130, 128, 126, 128, 254, 255, 255, 0, 255, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_serves_on_a_cpu(dtype):
    assert solver._block_solver(torch.empty(1, 1, dtype=dtype)) is solver._solve_block


def test_the_kernel_serves_where_triton_does(monkeypatch):
    monkeypatch.setattr(triton_ready, "refusal", lambda device, capability: None)
    assert solver._block_solver(torch.empty(1, 1)).__module__ == "gptq_belle.kernels.triton_gptq"
    assert solver._block_solver(torch.empty(1, 1, dtype=torch.float64)) is solver._solve_block


@pytest.mark.gpu
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_on_a_device(bits, group, sym):
    from gptq_belle.kernels.triton_gptq import solve_block

    check_block(solve_block, *block(128, 1000, seed=bits), group, bits, sym, "cuda")
    check_block(solve_block, *edges(128, 8), group, 8, sym, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("act_order", [False, True])
def test_a_layer_on_a_device(act_order):
    """Factor and products behind a block are rounded differently there, so some codes differ; the error hardly."""
    weight, hessian = (t.float() for t in problem(256, 512, seed=3))
    config = QuantConfig(group_size=64, act_order=act_order)
    ours, torchs = solver.gptq(weight.cuda(), hessian.cuda(), config), solver.gptq(weight, hessian, config)
    assert ours.error == pytest.approx(torchs.error, rel=0.01)
    assert (ours.weight.codes.cpu() != torchs.weight.codes).float().mean() < 0.02
