"""End-to-end tuning: gradients against dense algebra, tensors that may change, and resuming."""

import io
import json
from dataclasses import replace

import pytest
import torch
from conftest import job_output, random_quantized
from rich.console import Console
from safetensors.torch import load_file
from torch.nn import functional as F

from gptq_belle import Calibration, QuantConfig, load, quantize_checkpoint
from gptq_belle.cli.progress import ConsoleProgress
from gptq_belle.errors import HardwareError, UsageError
from gptq_belle.quantization.config import PRESETS
from gptq_belle.quantization.cost_estimate import estimate
from gptq_belle.quantization.end_to_end import tuning
from gptq_belle.quantization.end_to_end.student import RelativeChanges, Student, TrainableLinear
from gptq_belle.quantization.end_to_end.tuning import Tuner, TuningResult, accumulate_gradients, summed_kl
from gptq_belle.quantization.end_to_end.tuning_checkpoint import TuningCheckpoint
from gptq_belle.quantization.end_to_end.tuning_rows import TuningRows, split_rows
from gptq_belle.quantization.job import prepare_job

CALIBRATION = Calibration(rows=16, seq_len=64, allow_short=True)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setitem(PRESETS, "max", replace(PRESETS["max"], tuning_steps=20))
    monkeypatch.setattr(tuning, "PATIENCE", 2)


def config(preset="max", **settings):
    return QuantConfig(group_size=32, preset=preset, **settings)


def run_job(source, out, preset="max", **settings):
    return quantize_checkpoint(source, out, config(preset, **settings), calibration=CALIBRATION)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("sym", "act_order"), [(True, False), (False, False), (True, True), (False, True)])
def test_gradients_are_those_of_the_dense_weight(bits, sym, act_order):
    weight = random_quantized(torch.randn(64, 96), bits, 32, sym=sym, act_order=act_order)
    weight.scales[::3] *= -1
    linear = TrainableLinear(weight, torch.nn.Parameter(torch.randn(64)))
    x = torch.randn(2, 5, 96, requires_grad=True)
    upstream = torch.randn(2, 5, 64)
    (linear(x) * upstream).sum().backward()

    scales = weight.scales.double().requires_grad_()
    own = x.detach().double().requires_grad_()
    groups = weight.g_idx.long()
    dense = scales[:, groups] * (weight.codes.double() - weight.zeros.double()[:, groups])
    (torch.einsum("btk,nk->btn", own, dense) * upstream).sum().backward()
    torch.testing.assert_close(x.grad.double(), own.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear.scales.grad.double(), scales.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(linear.bias.grad, upstream.sum((0, 1)))


def test_kl_and_its_gradient_in_chunks_equal_those_of_all_tokens():
    head, targets = torch.randn(50, 16), torch.randn(3, 100, 16)
    layer = torch.nn.Linear(16, 16)

    class Whole(Student):
        def run(self, states):
            return layer(states)

    states = torch.randn(3, 100, 16)
    accumulate_gradients(Whole(None, [], [], {}), head, states, targets)
    found = layer.weight.grad.clone()
    layer.zero_grad()
    own = (layer(states) @ head.t()).double().log_softmax(-1).flatten(0, 1)
    loss = F.kl_div(own, (targets @ head.t()).double().log_softmax(-1).flatten(0, 1), reduction="batchmean",
                    log_target=True)
    loss.backward()
    torch.testing.assert_close(found, layer.weight.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        total = summed_kl(head, layer(states).flatten(0, 1), targets.flatten(0, 1)) / 300
    assert total.item() == pytest.approx(loss.item(), rel=1e-5)


def test_changes_are_relative_to_scales_and_to_the_root_mean_square_of_vectors():
    scales, vector = torch.nn.Parameter(torch.tensor([[0.5, -4.0]])), torch.nn.Parameter(torch.tensor([0.0, 2.0]))
    changes = RelativeChanges([scales, vector])
    scales.grad, vector.grad = torch.tensor([[1.0, 1.0]]), torch.tensor([1.0, 1.0])
    changes.collect()
    torch.testing.assert_close(changes.vector.grad, torch.tensor([0.5, 4.0, 2**0.5, 2**0.5]))
    changes.apply(torch.tensor([0.1, 0.1, 0.1, -0.1]))
    expected = torch.tensor([0.55, -3.6, 0.1 * 2**0.5, 2 - 0.1 * 2**0.5]).half().float()
    torch.testing.assert_close(torch.cat([scales[0], vector]).detach(), expected, rtol=0, atol=0)


def test_every_epoch_uses_every_row_once():
    inputs = torch.arange(12.0).view(12, 1, 1).expand(12, 8, 4)
    rows = TuningRows(inputs, -inputs, seed=3)
    seen = [int(state) for step in range(6) for state in rows.batch(step, 32)[0][:, 0, 0]]
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert seen[:12] != seen[12:]
    assert torch.equal(rows.batch(2, 32)[1], -rows.batch(2, 32)[0])


def test_held_out_rows_come_from_the_end():
    training, held_out = split_rows(torch.arange(64 * 256).view(64, 256))
    assert len(training) == 60
    assert len(held_out) == 4
    assert int(held_out[-1, -1]) == 64 * 256 - 1
    assert not set(training.flatten().tolist()) & set(held_out.flatten().tolist())
    with pytest.raises(UsageError):
        split_rows(torch.zeros(1, 300, dtype=torch.int64))


def test_tuning_keeps_codes_and_lowers_the_held_out_kl(tiny_model, tmp_path):
    best, tuned = tmp_path / "best", tmp_path / "max"
    run_job(tiny_model, best, "best")
    report = run_job(tiny_model, tuned)
    before, after = load_file(best / "model.safetensors"), load_file(tuned / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name.rpartition(".")[2] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert "scales" in changed
    assert changed <= {"scales", "bias", "weight"}
    assert all(tensor.ndim == 1 for name, tensor in after.items()
               if name.endswith("weight") and not torch.equal(tensor, before[name]))
    result = report.tuning
    assert result["kl"][result["best"]] == min(result["kl"].values()) < result["kl"][0]
    assert json.loads((tuned / "quantization_report.json").read_text())["tuning"]["best"] == result["best"]
    job = prepare_job(tiny_model, config(), CALIBRATION, "cpu")
    held_out = split_rows(job.tokens)[1]
    full, own = (load(path, head_bits=16).logits(held_out).double().log_softmax(-1) for path in (tiny_model, tuned))
    measured = float(((full - own) * full.exp()).sum(-1).mean())
    assert measured == pytest.approx(result["kl"][result["best"]], rel=0.02)  # the source is in float16 there, too


class Interrupted(Exception):
    pass


def test_interrupted_tuning_resumes_with_an_identical_result(tiny_model, tmp_path, monkeypatch):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_job(tiny_model, whole)
    step = Tuner._step
    taken = []

    def interrupted(self, number):
        taken.append(number)
        if number == 13:
            raise Interrupted
        step(self, number)

    monkeypatch.setattr(Tuner, "_step", interrupted)
    with pytest.raises(Interrupted):
        run_job(tiny_model, resumed)
    monkeypatch.setattr(Tuner, "_step", lambda self, number: (taken.append(number), step(self, number)))
    report = run_job(tiny_model, resumed)
    assert taken[:15] == [*range(14), 10]  # resumed after the last validation step
    assert report.resumed == [len(report.phases)]
    assert job_output(resumed)[0] == job_output(whole)[0]


def test_tuning_without_improvement_stops_early_and_changes_nothing(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "LEARNING_RATE", 1.0)
    best, tuned = tmp_path / "best", tmp_path / "max"
    run_job(tiny_llama, best, "best")
    result = run_job(tiny_llama, tuned).tuning
    assert result["best"] == 0
    assert result["steps"] == tuning.VALIDATE_EVERY * tuning.PATIENCE
    before, after = load_file(best / "model.safetensors"), load_file(tuned / "model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_early_stopping_after_worse_validation():
    result = TuningResult()
    assert result.record(0, 1.0)
    assert result.record(10, 0.5)
    assert not result.record(20, 0.5)
    assert not result.should_stop
    assert not result.record(30, 0.6)
    assert result.should_stop
    assert result.best == 10


def test_model_too_large_for_tuning_is_refused(tiny_model, tmp_path):
    job = prepare_job(tiny_model, config(), CALIBRATION, "cpu")
    needed = estimate(job).memory
    with pytest.raises(HardwareError, match="tuning"):
        quantize_checkpoint(tiny_model, tmp_path / "out", config(), calibration=CALIBRATION, memory=needed // 4)
    assert not (tmp_path / "out.partial").exists()


def test_max_without_tuning_equals_best(tiny_llama, tmp_path):
    run_job(tiny_llama, tmp_path / "best", "best")
    report = run_job(tiny_llama, tmp_path / "max", without=("tuning",))
    assert report.tuning is None
    assert (tmp_path / "max/model.safetensors").read_bytes() == (tmp_path / "best/model.safetensors").read_bytes()


def test_damaged_or_foreign_checkpoint_is_ignored(tmp_path):
    saved = TuningCheckpoint(tmp_path, [1, "a"])
    saved.save(3, {"x": 1}, {"t": torch.ones(2)})
    saved.save(7, {"x": 2}, {"t": torch.zeros(2)})
    found = TuningCheckpoint(tmp_path, [1, "a"]).load()
    assert (found.step, found.state, found.tensors["t"].tolist()) == (7, {"x": 2}, [0.0, 0.0])
    assert len(list(tmp_path.iterdir())) == 2
    assert TuningCheckpoint(tmp_path, [2, "a"]).load() is None
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert saved.load() is None


def test_progress_bar_of_tuning_starts_at_zero():
    progress = ConsoleProgress(Console(file=io.StringIO()))
    progress.start(2, 3, 0)
    for _ in range(6):
        progress.step()
    progress.start(1, 10, 0)
    assert (progress.done, progress.todo) == (0, 10)


def test_too_little_text_is_refused_before_any_block(tiny_llama, tmp_path):
    with pytest.raises(UsageError, match="two rows"):
        quantize_checkpoint(tiny_llama, tmp_path / "out", config(),
                            calibration=Calibration(rows=1, seq_len=64, allow_short=True))
    assert not (tmp_path / "out.partial").exists()
