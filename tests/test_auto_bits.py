"""Bits chosen within a budget: an exact knapsack, the budgets, the measured losses, and resuming."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import job_output, naming

from gptq_belle import Calibration, QuantConfig, quantize_checkpoint
from gptq_belle.errors import UsageError
from gptq_belle.quantization import auto_bits
from gptq_belle.quantization.auto_bits import (
    average_bits,
    config_with_bits,
    describe_estimate,
    knapsack,
    stages_and_budget,
)
from gptq_belle.quantization.block_quantizer import BlockQuantizer
from gptq_belle.quantization.job import prepare_job
from gptq_belle.quantization.overrides import parse_override

CALIBRATION = Calibration(rows=16, seq_len=64, allow_short=True)
ROOT = Path(__file__).resolve().parent.parent


def config(budget, **settings):
    return QuantConfig(group_size=32, auto_bits=budget, **settings)


def run_job(source, out, budget="5", **settings):
    return quantize_checkpoint(source, out, config(budget, **settings), calibration=CALIBRATION)


@pytest.mark.parametrize("seed", range(20))
def test_knapsack_finds_the_optimum_of_exhaustive_search(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(9, generator=generator, dtype=torch.float64).tolist()
    costs = (torch.randint(1, 12, (9,), generator=generator) * (7 if seed % 2 else 1)).tolist()
    room = sum(costs) * (seed + 1) // 25
    best = max(sum(values[i] for i in some) for count in range(10) for some in itertools.combinations(range(9), count)
               if sum(costs[i] for i in some) <= room)
    found = knapsack(values, costs, room)
    assert sum(costs[i] for i in found) <= room
    assert sum(values[i] for i in found) == pytest.approx(best, rel=1e-12)


def test_knapsack_respects_a_budget_larger_than_its_table():
    costs = [3_000_001, 5_000_003, 7_000_001]
    assert knapsack([1.0, 1.0, 1.5], costs, 8_001_000) == {0, 1}
    assert knapsack([1.0, 1.0, 1.5], costs, 3_000_000) == set()
    assert knapsack([], [], 10) == set()


@pytest.mark.parametrize("budget", ["4", "4.5", "6.1", "8"])
def test_budget_in_bits_is_met(tiny_model, tmp_path, budget):
    report = run_job(tiny_model, tmp_path / "out", budget)
    assert report.average_bits <= float(budget)
    assert report.average_bits == report.choice["average_bits"]
    left = (float(budget) - report.average_bits) * sum(row["weights"] for row in report.choice["stages"])
    assert all(row["bits"] == 8 or 4 * row["weights"] > left for row in report.choice["stages"])  # nothing more fits
    assert {row.bits for row in report.linears} == {row["bits"] for row in report.choice["stages"]}
    assert all(row["loss"] > 0 for row in report.choice["stages"])


def test_budget_in_bytes_is_met(tiny_model, tmp_path):
    least, most = (quantize_checkpoint(tiny_model, tmp_path / f"{bits}", QuantConfig(bits=bits, group_size=32),
                                       calibration=CALIBRATION).bytes_on_disk for bits in (4, 8))
    budget = (least + most) // 2
    report = run_job(tiny_model, tmp_path / "out", f"{budget}B")
    assert least < report.bytes_on_disk <= budget
    assert {row["bits"] for row in report.choice["stages"]} == {4, 8}


def measured(job, tmp_path):
    stages, _ = stages_and_budget(job)
    measured = [(stage.block, stage.linears) for stage in stages]
    return stages, auto_bits.measure_losses(job, measured, tmp_path / "scratch", lambda index: None)


def test_measured_losses_equal_kl_of_whole_models(tiny_model, tmp_path):
    """Against transformers' own model with one stage's weights replaced, logits in float64."""
    from transformers import AutoModelForCausalLM

    from gptq_belle.formats.gptq_weight import dequantize
    from gptq_belle.quantization.sensitivity import _split_rows
    from gptq_belle.quantization.solver import gptq

    job = prepare_job(tiny_model, config("5"), CALIBRATION, "cpu")
    stages, losses = measured(job, tmp_path)
    assert not (tmp_path / "scratch").exists()
    rows, seen = _split_rows(job)
    assert not any(torch.equal(row, other) for row in rows for other in seen)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        full = model(rows).logits.double().log_softmax(-1)
    for stage, loss in list(zip(stages, losses, strict=True))[::3]:
        linears = [model.get_submodule(f"{job.stream.arch.blocks}.{stage.block}.{name}") for name in stage.linears]
        inputs = []
        hook = linears[0].register_forward_pre_hook(lambda _, args, kept=inputs: kept.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            model(seen)
            hook.remove()
            hessian = inputs[0].t() @ inputs[0] / len(inputs[0])
            before = [linear.weight.clone() for linear in linears]
            plain = replace(job.config, bits=4, preset="fast")
            for linear in linears:
                linear.weight.copy_(dequantize(gptq(linear.weight, hessian, plain).weight))
            few = model(rows).logits.double().log_softmax(-1)
            for linear, weight in zip(linears, before, strict=True):
                linear.weight.copy_(weight)
        assert loss == pytest.approx(float((full.exp() * (full - few)).sum(-1).mean()), rel=0.05)


def test_overrides_are_kept_and_count_against_the_budget(tiny_bloom, tmp_path):
    settings = config("7", overrides=tuple(map(parse_override, (
        r"h\.0\.mlp.dense_h_to_4h=skip", r"h\.0\.mlp.dense_4h_to_h=bits:4"))))
    report = quantize_checkpoint(tiny_bloom, tmp_path / "out", settings, calibration=CALIBRATION)
    names = {name for row in report.choice["stages"] for name in row["linears"] if row["block"] == 0}
    assert names == {"self_attention.query_key_value", "self_attention.dense"}
    assert 6 < report.average_bits <= 7  # (4 * 16 + 20 * 4) / 24 without the choice


def test_resumed_job_keeps_the_chosen_bits(tiny_model, tmp_path, monkeypatch):
    run_job(tiny_model, tmp_path / "whole")
    plain = BlockQuantizer.run
    monkeypatch.setattr(BlockQuantizer, "run",
                        lambda self, index, *rest: plain(self, index, *rest) if index == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_job(tiny_model, tmp_path / "cut")
    monkeypatch.setattr(BlockQuantizer, "run", plain)
    monkeypatch.setattr(auto_bits, "measure_losses", lambda *_: pytest.fail("measured again"))
    with pytest.raises(UsageError, match="auto_bits"):
        run_job(tiny_model, tmp_path / "cut", "6")
    assert run_job(tiny_model, tmp_path / "cut").resumed == [1]
    assert job_output(tmp_path / "cut") == job_output(tmp_path / "whole")


def test_measured_sensitivities_survive_an_interrupt_before_the_first_block(tiny_bloom, tmp_path, monkeypatch):
    plain = BlockQuantizer.run
    monkeypatch.setattr(BlockQuantizer, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_job(tiny_bloom, tmp_path / "out")
    monkeypatch.setattr(BlockQuantizer, "run", plain)
    monkeypatch.setattr(auto_bits, "measure_losses", lambda *_: pytest.fail("measured again"))
    assert run_job(tiny_bloom, tmp_path / "out").choice is not None


@pytest.mark.parametrize(("settings", "named"), [
    ({"auto_bits": "3.5"}, "3.5"), ({"auto_bits": "9"}, "9"), ({"auto_bits": "some"}, "some"),
    ({"auto_bits": "10kB"}, "10kB"), ({"auto_bits": "5", "bits": 8}, "8 bits"),
    ({"auto_bits": "5", "method": "rtn"}, "method rtn"),
    ({"auto_bits": "5", "overrides": (parse_override("mlp=bits:8"),)}, "overrides")], ids=str)
def test_unsuitable_auto_bits_is_refused_before_any_work(tiny_bloom, tmp_path, settings, named):
    with pytest.raises(UsageError, match=naming(named)) as caught:
        quantize_checkpoint(tiny_bloom, tmp_path / "out", QuantConfig(group_size=32, **settings),
                            calibration=CALIBRATION)
    assert caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_dry_run_describes_the_sensitivity_measurement(tiny_llama):
    job = prepare_job(tiny_llama, config("5"), CALIBRATION, "cpu")
    assert "8 stages" in describe_estimate(job)
    assert describe_estimate(prepare_job(tiny_llama, QuantConfig(group_size=32), CALIBRATION, "cpu")) == ""
    all_of_it = {(stage.block, stage.linears[0]) for stage in stages_and_budget(job)[0]}
    assert average_bits(replace(job, config=config_with_bits(job, all_of_it))) == 8


def test_benchmark_compares_the_choice_with_equal_size_and_random_choices(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_auto_bits

    figures = {"4 bit": (4, 0.08), "8 bit": (8, 0.0), "auto 5": (5, 0.03), "random 0": (5, 0.07), "random 1": (5, 0.05)}
    found = {name: {"bits": bits, "kl": kl} for name, (bits, kl) in figures.items()}
    assert bench_auto_bits.verdict(found, "5") == pytest.approx({
        "uniform": 0.08, "auto": 0.03, "explained": 0.06, "random_mean": 0.06, "random_best": 0.05,
        "random_worst": 0.07})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bloom", "llama"])
def test_choice_is_better_than_random_ones_of_equal_size(kind, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["bench_auto_bits.py"])
    import bench_auto_bits

    found = bench_auto_bits.measure(kind, "4.5", 3)
    figures = bench_auto_bits.verdict(found, "4.5")
    assert found["auto 4.5"]["bits"] <= 4.5
    assert figures["auto"] < figures["explained"]
    assert figures["auto"] < figures["random_mean"]
