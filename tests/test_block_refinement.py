"""Block refinement: its quadratic model against dense algebra and finite differences, the held-out check, resuming."""

from dataclasses import replace

import pytest
import torch
from conftest import job_output, random_quantized
from safetensors.torch import load_file

from gptq_belle import Calibration, QuantConfig, quantize_checkpoint
from gptq_belle.checkpoint.empty_model import assign
from gptq_belle.formats.gptq_weight import dequantize
from gptq_belle.quantization.block_refinement import refinement
from gptq_belle.quantization.block_refinement.block_error import BlockError
from gptq_belle.quantization.block_refinement.quadratic_step import quadratic_step
from gptq_belle.quantization.block_refinement.refinement import BlockRefinement
from gptq_belle.quantization.config import PRESETS
from gptq_belle.quantization.job import prepare_job

CALIBRATION = Calibration(rows=16, seq_len=64, allow_short=True)


def config(**settings):
    return QuantConfig(**{"bits": 2, "group_size": 32, "preset": "max"} | settings)


def run_job(source, out, calibration=CALIBRATION, **settings):
    return quantize_checkpoint(source, out, config(**settings), calibration=calibration)


@pytest.fixture(autouse=True)
def _one_round(monkeypatch):
    monkeypatch.setitem(PRESETS, "max", replace(PRESETS["max"], rounds=1))


@pytest.mark.parametrize(("sym", "act_order"), [(True, False), (False, True)])
def test_step_lowers_the_quadratic_model_as_it_says(sym, act_order):
    weight = random_quantized(torch.randn(24, 96), 3, 32, sym=sym, act_order=act_order)
    root, gradient, curvature = torch.randn(200, 96), torch.randn(24, 96), torch.rand(24) + 0.5
    hessian = root.t() @ root / 200
    step = quadratic_step(weight, gradient, hessian, curvature, 3, positive=False)
    D = (dequantize(step.weight) - dequantize(weight)).double()
    slope = float((gradient * D).sum())
    bend = float((curvature[:, None] * D * (D @ hessian.double())).sum())
    assert (step.slope, step.bend) == pytest.approx((slope, bend), rel=1e-4)
    assert slope + bend < 0 < bend
    assert int(step.weight.codes.max()) <= 7
    assert torch.equal(step.weight.scales, step.weight.scales.half().float())
    assert torch.equal(step.weight.zeros, weight.zeros)
    again = quadratic_step(step.weight, torch.zeros_like(gradient), hessian, curvature, 3, positive=False)
    assert (again.slope, again.bend) == (0, 0)  # without a gradient nothing moves


def block_and_error(source):
    job = prepare_job(source, config(), CALIBRATION, "cpu")
    stream = job.stream
    states = [batch.clone() for batch in stream.embed(job.tokens[:8])]
    block = stream.load_block(0)
    targets = [stream.run(block, batch) for batch in states]
    for name in stream.arch.linears:
        weight = block.get_parameter(f"{name}.weight").detach()
        assign(block, f"{name}.weight", weight + 0.3 * weight.std() * torch.randn_like(weight))
    return stream, block, BlockError(stream, block, states, targets)


def test_gradient_and_curvature_are_those_of_the_block(tiny_model):
    """Finite differences; curvature is exact for the last linear, whose outputs the block adds to its own."""
    stream, block, error = block_and_error(tiny_model)
    for name in stream.arch.linears:
        weight = block.get_parameter(f"{name}.weight").detach().clone()
        before, gradient = error.gradient(name)
        assert before == pytest.approx(error.value(), rel=1e-5)
        assert not block.get_parameter(f"{name}.weight").requires_grad
        size = 0.02 * float(weight.norm() / gradient.norm())
        values = []
        for sign in (1, -1):
            assign(block, f"{name}.weight", weight + sign * size * gradient)
            values.append(error.value())
        assign(block, f"{name}.weight", weight)
        assert (values[0] - values[1]) / (2 * size) == pytest.approx(float(gradient.square().sum()), rel=0.05)
    variance = float(torch.cat(error.targets).var(correction=0))
    expected = (1 + 0.1) / (variance * weight.shape[0])
    torch.testing.assert_close(error.curvature(name), torch.full((weight.shape[0],), expected), rtol=1e-3, atol=0)


def test_refinement_lowers_the_held_out_error_and_keeps_the_format(tiny_bloom, tmp_path):
    rows = Calibration(rows=64, seq_len=64, allow_short=True)
    report = run_job(tiny_bloom, tmp_path / "max", rows, without=("fold",))
    run_job(tiny_bloom, tmp_path / "plain", rows, without=("fold", "block"))
    after, before = (load_file(tmp_path / name / "model.safetensors") for name in ("max", "plain"))
    assert {name: (value.shape, value.dtype) for name, value in after.items()} == {
        name: (value.shape, value.dtype) for name, value in before.items()}
    changed = {name.rpartition(".")[2] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"qweight", "scales"}
    assert [row["block"] for row in report.refinement] == [0, 1]
    assert all(row["kept"] and row["after"] < row["before"] for row in report.refinement)


def test_rows_that_are_held_out_can_reject_every_round(tiny_llama, tmp_path, monkeypatch):
    rising = iter(range(1, 1000))
    value = BlockError.value

    def seen(self):
        rows = sum(len(part) for part in self.inputs)
        return float(next(rising)) if rows == 1 else value(self)  # one of 16 rows is held out

    monkeypatch.setattr(BlockError, "value", seen)
    report = run_job(tiny_llama, tmp_path / "max")
    assert [row["kept"] for row in report.refinement] == [0, 0]
    run_job(tiny_llama, tmp_path / "plain", without=("block",))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("max", "plain")]
    assert files[0] == files[1]


def test_interrupted_refinement_resumes_with_an_identical_result(tiny_model, tmp_path, monkeypatch):
    run_job(tiny_model, tmp_path / "whole")
    plain = BlockRefinement._round

    def interrupted(self, *args):
        if self.activations.quantized.index == 1:
            raise KeyboardInterrupt
        plain(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(BlockRefinement, "_round", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_job(tiny_model, tmp_path / "resumed")
    assert run_job(tiny_model, tmp_path / "resumed").resumed == [1]
    assert job_output(tmp_path / "resumed") == job_output(tmp_path / "whole")


def test_rounds_read_the_rows_in_turn(monkeypatch):
    monkeypatch.setattr(refinement, "TOKENS_PER_ROUND", 3 * 64)
    some = BlockRefinement.__new__(BlockRefinement)
    states = type("States", (), {"shapes": [(8, 64, 4)]})
    some.activations = type("Pair", (), {"hessian_rows": 7, "quantized": states})
    assert [some._rows(number) for number in range(3)] == [{0, 1, 2}, {3, 4, 5}, {6, 0, 1}]


def test_damping_follows_the_measured_curvature():
    linear = refinement.RefinedLinear(None, None, config(), 2.0)
    step = refinement.Step(None, slope=-3.0, bend=1.0)
    assert linear.with_damping_of(step, -0.5).damping == 5.0  # the model with twice the curvature had said -1
    assert linear.with_damping_of(step, 1e9).damping == 20.0
    assert linear.with_damping_of(step._replace(bend=0.0), 0.0).damping == 2.0


