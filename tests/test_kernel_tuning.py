"""Tuning without a GPU: the search on synthetic times, the table that it writes, and rejected input."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import naming, packed_checkpoint

from gptq_belle.bench import kernel_tuning
from gptq_belle.bench import model_tuning as tuner
from gptq_belle.cli import tune as command
from gptq_belle.common.timers import spread
from gptq_belle.errors import GptqBelleError, HardwareError, InputError, UsageError
from gptq_belle.kernels import triton_config, triton_matmul
from gptq_belle.kernels.triton_config import LaunchPlan, MatmulProblem, TileConfig, default_plan

PROBLEM = MatmulProblem(16, 4096, 4096, 4, 128, "float16")
MANY = PROBLEM._replace(rows=512)
BEST = {"SPLIT_K": 4, "num_stages": 5, "BN": 128, "num_warps": 8, "BK": 64, "BM": 64, "K_WARPS": 1}


def distance(plan):
    """Synthetic times whose minimum is BEST; the kernel for many rows is 3 times slower, dequantizing 10 times."""
    if plan.config is None:
        return 10.0
    wrong = sum(getattr(plan.config, name) != value for name, value in BEST.items())
    return (1.0 if plan.kernel == "skinny" else 3.0) + wrong


@pytest.fixture
def own_tables(tmp_path, monkeypatch):
    """A folder of tables for this test alone."""
    monkeypatch.setenv("GPTQ_BELLE_TUNING", str(tmp_path))
    triton_config.tuned_plans.cache_clear()
    triton_config.launch_plan.cache_clear()
    yield tmp_path
    triton_config.tuned_plans.cache_clear()
    triton_config.launch_plan.cache_clear()


def test_search_finds_the_minimum_and_times_each_plan_once():
    asked = []

    def timer(plan):
        asked.append(plan)
        return distance(plan)

    found = kernel_tuning.tune(PROBLEM, 86, 82, timer)
    best = {name: BEST[name] for name in TileConfig._fields if name != "BM"}
    assert found.plan == LaunchPlan("skinny", TileConfig(16, **best))
    assert found.seconds == distance(found.plan)
    assert found.rule_seconds == distance(default_plan(PROBLEM, 86, 82)) > found.seconds
    assert found.tried == len(asked) == len(set(asked)) < 60


def test_many_rows_may_use_another_kernel():
    found = kernel_tuning.tune(MANY, 86, 82, distance)
    assert found.plan == LaunchPlan("gemm", TileConfig(**BEST))
    cheap = kernel_tuning.tune(MANY, 86, 82, lambda plan: 0.1 if plan.kernel == "expand" else distance(plan))
    assert cheap.plan == LaunchPlan("expand", None)


def test_timing_noise_does_not_change_the_plan():
    """A plan that is one percent faster than the rule's does not replace it."""
    first = default_plan(PROBLEM, 86, 82)
    assert kernel_tuning.tune(PROBLEM, 86, 82, lambda plan: 1.0 if plan == first else 0.99).plan == first


def test_failing_kernel_config_is_skipped():
    first = default_plan(PROBLEM, 86, 82)
    found = kernel_tuning.tune(PROBLEM, 86, 82, lambda plan: float("inf") if plan == first else distance(plan))
    assert found.plan.config.SPLIT_K == 4
    assert kernel_tuning.table_entry(found)["rule_seconds"] is None


def test_kernels_read_the_written_table(own_tables):
    assert triton_config.launch_plan(PROBLEM, 86, 82) == default_plan(PROBLEM, 86, 82)
    best = kernel_tuning.tune(PROBLEM, 86, 82, distance)
    path = kernel_tuning.write_table([best], 86, "a card", own_tables / "made" / "here")
    assert path == own_tables / "made" / "here" / "sm_86.json"
    path = kernel_tuning.write_table([best], 86, "a card", own_tables)
    assert triton_config.launch_plan(PROBLEM, 86, 82) == best.plan != default_plan(PROBLEM, 86, 82)
    assert triton_config.launch_plan(PROBLEM, 90, 82) == default_plan(PROBLEM, 90, 82)
    more = kernel_tuning.tune(MANY, 86, 82, lambda plan: 0.1 if plan.kernel == "expand" else 1.0)
    again = best._replace(plan=best.plan._replace(config=best.plan.config._replace(SPLIT_K=8)))
    kernel_tuning.write_table([more, again], 86, "a card", own_tables)
    assert triton_config.launch_plan(PROBLEM, 86, 82).config.SPLIT_K == 8
    assert triton_config.launch_plan(MANY, 86, 82) == LaunchPlan("expand", None)
    content = json.loads(path.read_text())
    assert content["device"] == "a card"
    assert content["versions"]["torch"] == torch.__version__
    assert len(content["entries"]) == 2


@pytest.mark.parametrize("text", ["no JSON", "{}", '{"entries": [{"kernel": "magic"}]}',
                                  '{"entries": [{"kernel": "gemm"}]}'])
def test_damaged_table_is_kept_and_named(own_tables, text):
    path = own_tables / "sm_86.json"
    path.write_text(text)
    with pytest.raises(InputError, match=naming(path)):
        kernel_tuning.write_table([kernel_tuning.tune(PROBLEM, 86, 82, distance)], 86, "a card", own_tables)
    assert path.read_text() == text


def test_unwritable_folder_is_rejected(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HardwareError, match=naming(tmp_path / "file")) as error:
        kernel_tuning.write_table([kernel_tuning.tune(PROBLEM, 86, 82, distance)], 86, "a card", tmp_path / "file")
    assert "--out" in error.value.remedy


def test_row_counts_are_rounded_to_buckets():
    assert tuner.buckets_of([]) == list(triton_config.ROW_BUCKETS)
    assert tuner.buckets_of([1, 5, 9, 4000]) == [8, 16, 2048]
    with pytest.raises(UsageError):
        tuner.buckets_of([4, 0])


def test_tuning_without_gpu_or_triton_is_rejected(monkeypatch):
    with pytest.raises(HardwareError, match=naming("CPU")):
        tuner.require_gpu(torch.device("cpu"))
    monkeypatch.setattr(triton_matmul, "unavailable_reason", lambda device: "triton is not installed")
    with pytest.raises(HardwareError, match="triton is not installed"):
        tuner.require_gpu(torch.device("cuda", 0))
    monkeypatch.setattr(triton_matmul, "unavailable_reason", lambda device: None)
    tuner.require_gpu(torch.device("cuda", 0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_command_refuses_a_cpu(belle, tmp_path):
    code, out, err = belle("tune", tmp_path)
    assert code == 3
    assert out == ""
    assert err.strip()
    assert "Traceback" not in err


@pytest.fixture
def pretended_gpu(monkeypatch):
    """tune_model as on a GPU, with CPU tensors and synthetic times."""
    monkeypatch.setattr(tuner, "require_gpu", lambda device: None)
    monkeypatch.setattr(tuner, "device_timer", lambda problem, weights: distance)
    monkeypatch.setattr(triton_matmul, "device_properties", lambda device: (86, 82))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    from gptq_belle.kernels import dispatch

    monkeypatch.setattr(dispatch, "choose_kernel", lambda *args, **kwargs: dispatch.KernelChoice("triton", ""))


@pytest.mark.usefixtures("pretended_gpu")
def test_every_problem_of_a_model_is_tuned(tiny_llama, tmp_path, own_tables, capsys):
    path = packed_checkpoint(tiny_llama, tmp_path / "packed", bits=4, group_size=32)
    steps = []
    found = tuner.tune_model(path, device="cpu", rows=[3, 700], out=own_tables, progress=steps.append)
    shapes = {(line["inputs"], line["outputs"]) for line in found["entries"]}
    assert shapes == {(128, 128), (128, 64), (128, 256), (256, 128)}  # q and o; k and v; gate and up; down
    assert len(found["entries"]) == 2 * len(shapes) == len(steps) - 1
    assert triton_config.tuned_plans(86)
    command.show(found)
    assert "skinny" in capsys.readouterr().out


@pytest.mark.usefixtures("pretended_gpu")
def test_model_without_packed_linears_is_rejected(tiny_llama, own_tables):
    with pytest.raises(InputError, match=naming(tiny_llama)):
        tuner.tune_model(tiny_llama, device="cpu", out=own_tables, progress=lambda text: None)


def test_tile_that_is_not_compiled_takes_infinite_time(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(kernel_tuning, "rotated_weights", list)
    monkeypatch.setattr(triton_matmul, "quant_matmul", lambda x, weight, plan: options(plan) and torch.ones(2, 4))

    def options(plan):
        return plan.config is None or triton_config.launch_options(plan.kernel, plan.config, 4, 128, 100)

    monkeypatch.setattr(kernel_tuning.cuda_timing, "device_seconds", lambda actions: spread([len(actions)]))
    timer = kernel_tuning.device_timer(MANY, [SimpleNamespace(in_features=4, words=torch.ones(1))])
    first = TileConfig(64, 128, 64, 1, 8, 3)
    assert [timer(LaunchPlan("gemm", first._replace(BM=rows))) for rows in (64, 128)] == [1, math.inf]


@pytest.mark.gpu
def test_wrong_products_raise(monkeypatch):
    from oracle_format import random_words
    from test_triton import laid_out

    weight = laid_out(random_words(4, 256, 128, 128), 4)
    weight = weight._replace(words=weight.words.cuda(), scales=weight.scales.cuda(),
                             zeros=None if weight.zeros is None else weight.zeros.cuda())
    problem = triton_matmul.problem_of(weight, 8, torch.float16)
    timer = kernel_tuning.device_timer(problem, [weight])
    plan = default_plan(problem, *triton_matmul.device_properties(weight.words.device))
    assert 0 < timer(plan) < 1e-2
    monkeypatch.setattr(triton_matmul, "quant_matmul", lambda x, w, plan: torch.zeros(8, 128, device="cuda"))
    with pytest.raises(GptqBelleError):
        timer(plan)
