"""The Triton kernels of quantization: when they are used, and their equality with NumPy and the solver in torch."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_solver import problem

from gptq_belle.kernels.native_library import load_library
from gptq_belle.quantization import grid, solver
from gptq_belle.quantization.config import QuantConfig

BITS, GROUPS = (2, 3, 4, 8), (32, 64, 128, 0)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernels_in_the_interpreter():
    run = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "gptq_interpreted.py"],
                         cwd=Path(__file__).parent, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def block(inputs, outputs, seed):
    """Weights (inputs, outputs) and factor (inputs, inputs) of a block, float32."""
    weight, hessian = problem(outputs, inputs, seed)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian + 0.01 * torch.eye(inputs)), upper=True)
    return weight.t().float().contiguous(), factor.float()


def block_oracle(weight, factor, group, bits, sym, scale, zero):
    """The inner loop in float32, each operation rounded once: codes, errors, scales, zeros."""
    w, factor, levels = weight.numpy().copy(), factor.numpy(), np.float32(2**bits - 1)
    codes, errors, scales, zeros = np.empty_like(w, np.uint8), np.empty_like(w), [], []
    given = np.atleast_2d(scale.numpy()), np.atleast_2d(zero.numpy())
    for i in range(len(w)):
        scale, zero = (values[i % len(values)] for values in given) if not group else (scale, zero)
        if group and i % group == 0:
            own = np.concatenate([w[i : i + group], np.zeros_like(w[:1])])
            low, high = own.min(0), own.max(0)
            span = 2 * np.maximum(-low, high) if sym else high - low
            scale = (span / levels).astype(np.float16).astype(np.float32)
            scale[scale < 1e-7] = 1
            zero = np.full_like(scale, 2 ** (bits - 1)) if sym else np.clip(np.rint(-low / scale), 0, levels)
        if i % (group or len(w) // len(given[0])) == 0:
            scales.append(scale)
            zeros.append(zero)
        codes[i] = code = np.clip(np.rint(w[i] / scale) + zero, 0, levels)
        errors[i] = (w[i] - (code - zero) * scale) / factor[i, i]
        w[i + 1 :] -= factor[i, i + 1 :, None] * errors[i]
    return tuple(torch.from_numpy(np.stack(part)) for part in (codes, errors, scales, zeros))


def solved(solve_block, weight, factor, group, bits, sym, scale, zero):
    """The same from a solver in torch or Triton; scale and zero are (N,), or (inputs, N) with one row per input."""
    inputs, outputs = weight.shape
    scales = weight.new_full((inputs // group if group else len(torch.atleast_2d(scale)), outputs), torch.nan)
    zeros = torch.full_like(scales, torch.nan)
    if not group:
        scales[:], zeros[:] = scale, zero
    codes, errors = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    solve_block(weight.clone(), factor, codes, errors, scales, zeros, group=group, bits=bits, sym=sym)
    return tuple(tensor.cpu() for tensor in (codes, errors, scales, zeros))


def check_block(solve_block, weight, factor, group, bits, sym, device="cpu"):
    """Equal to NumPy to the bit; except for ties, codes also equal those of the solver in torch."""
    scale, zero = solver.min_max_grid(1.2 * weight, bits, sym)  # of a larger group, where `group` is 0
    found = solved(solve_block, weight.to(device), factor.to(device), group, bits, sym, scale, zero)
    oracle = block_oracle(weight, factor, group, bits, sym, scale, zero)
    for name, ours, exact in zip(("codes", "errors", "scales", "zeros"), found, oracle, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    others = solved(solver._solve_block, weight, factor, group, bits, sym, scale, zero)
    for output in (found[0] != others[0]).any(0).nonzero().flatten():
        assert_tie(found, others, factor, group, int(output))


def mixed_grids(weight, bits):
    """Scales and zeros (inputs, N) of static groups whose inputs are solved in another order; half are negative."""
    inputs, outputs = weight.shape
    scale, zero = solver.min_max_grid(weight, bits, True)
    shares = torch.linspace(0.5, 1.2, 4)[torch.arange(inputs) * 7 % 4, None]
    signs = torch.where(torch.arange(outputs) % 2 == 0, 1.0, -1.0)
    return (scale * shares * signs).half().float(), zero.expand(inputs, -1).contiguous()


def check_mixed_grids(solve_block, device="cpu"):
    """With one grid per input: equal to NumPy to the bit."""
    for bits, (inputs, outputs) in zip(BITS, ((128, 33), (96, 7), (77, 32), (128, 20)), strict=True):
        weight, factor = block(inputs, outputs, seed=bits)
        grids = mixed_grids(weight, bits)
        found = solved(solve_block, weight.to(device), factor.to(device), 0, bits, True, *grids)
        oracle = block_oracle(weight, factor, 0, bits, True, *grids)
        for ours, exact in zip(found, oracle, strict=True):
            torch.testing.assert_close(ours, exact, rtol=0, atol=0)
        others = solved(solver._solve_block, weight, factor, 0, bits, True, *grids)
        assert (found[0] == others[0]).all(0).sum() >= outputs - 1  # for one tie


def assert_tie(found, others, factor, group, output):
    """Codes of an output part where a weight is midway between two of them, to the last bits of float32."""
    i = int((found[0][:, output] != others[0][:, output]).nonzero()[0])
    own = i // group if group else 0
    for codes, errors, scales, zeros in (found, others):
        assert scales[own, output] == found[2][own, output]
        assert zeros[own, output] == found[3][own, output]
        assert abs(int(codes[i, output]) - int(found[0][i, output])) <= 1
        assert float(abs(errors[i, output] * factor[i, i] / scales[own, output])) == pytest.approx(0.5, abs=1e-4)


def descent(inputs, outputs, bits, seed):
    """Arguments of `descend`, in order: a group that GPTQ could have left."""
    weight, factor = block(inputs, outputs, seed)
    H = torch.linalg.inv((factor.t() @ factor).double()).float().contiguous()
    scale, zero = solver.min_max_grid(weight, bits, seed % 2 == 0)
    scale[::3] *= -1
    code = solver.to_codes(weight, scale, zero, bits).sub_(zero)
    return code, scale, zero, H @ (code * scale - weight), H, H.diagonal().contiguous()


def descend_oracle(code, scale, zero, residual, block, diagonal, bits):
    """In float32, each operation rounded once."""
    code, residual = code.numpy().copy(), residual.numpy().copy()
    scale, zero, block, diagonal = (part.numpy() for part in (scale, zero, block, diagonal))
    for j in range(len(code)):
        wanted = np.rint(code[j] - residual[j] / (scale * diagonal[j]))
        wanted = np.clip(wanted, -zero, np.float32(2**bits - 1) - zero)
        residual[j + 1 :] += block[j, j + 1 :, None] * ((wanted - code[j]) * scale)
        code[j] = wanted
    return torch.from_numpy(code)


def check_descent(descend, bits, shapes, device="cpu"):
    """Equal to NumPy to the bit."""
    for inputs, outputs in shapes:
        for seed in range(2):
            given = descent(inputs, outputs, bits, seed)
            expected, found = descend_oracle(*given, bits), [part.clone().to(device) for part in given]
            descend(*found, bits)
            assert torch.equal(found[0].cpu(), expected)
            assert inputs == 1 or not torch.equal(given[0], expected)


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


@pytest.mark.parametrize(("device", "dtype", "lacking", "kernel"), [
    ("cuda", torch.float32, None, "triton_gptq"), ("cuda", torch.float64, None, None),
    ("cuda", torch.float32, "no compiler", None), ("cpu", torch.float32, None, "cpu_solver"),
    ("cpu", torch.float64, None, None)])
def test_when_the_kernels_are_used(device, dtype, lacking, kernel, monkeypatch):
    pytest.importorskip("triton")
    if kernel == "cpu_solver" and isinstance(load_library(), str):
        pytest.skip(load_library())
    monkeypatch.setattr("gptq_belle.kernels.triton_matmul.unavailable_reason", lambda device: lacking)
    W = SimpleNamespace(is_cuda=device == "cuda", is_cpu=device == "cpu", device=torch.device(device), dtype=dtype)
    found = grid.fused_kernels(W)
    assert (found and found.__name__.rpartition(".")[2]) == kernel


@pytest.mark.gpu
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_on_a_device(bits, group, sym):
    from gptq_belle.kernels.triton_gptq import solve_block

    check_block(solve_block, *block(128, 1000, seed=bits), group, bits, sym, "cuda")
    check_block(solve_block, *edges(128, 8), group, 8, sym, "cuda")


@pytest.mark.gpu
def test_grids_of_each_input_on_a_device():
    from gptq_belle.kernels.triton_gptq import solve_block

    check_mixed_grids(solve_block, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
def test_descent_on_a_device(bits):
    from gptq_belle.kernels.triton_gptq import descend

    check_descent(descend, bits, [(128, 1000), (77, 33)], "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("act_order", [False, True])
def test_layer_on_a_device(act_order):
    """Factor and products after a block are rounded differently there, so some codes differ; the error hardly."""
    weight, hessian = (t.float() for t in problem(256, 512, seed=3))
    config = QuantConfig(preset="fast", group_size=64, act_order=act_order)
    ours, torchs = solver.gptq(weight.cuda(), hessian.cuda(), config), solver.gptq(weight, hessian, config)
    assert ours.error == pytest.approx(torchs.error, rel=0.01)
    assert (ours.weight.codes.cpu() != torchs.weight.codes).float().mean() < 0.02
