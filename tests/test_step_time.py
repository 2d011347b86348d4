"""The time model of a decode step: counts and bytes against hand computation, and how times respond to their causes."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import packed_checkpoint

from gptq_belle.bench import launch_time
from gptq_belle.bench.gpus import GPUS, gpu_named, this_gpu
from gptq_belle.bench.plan import plan
from gptq_belle.bench.step_time import assumptions as step_time_assumptions
from gptq_belle.bench.step_time import fused_linears, step_time
from gptq_belle.bench.throughput import modelled_step
from gptq_belle.cli import app, console
from gptq_belle.engine.model import Model, load
from gptq_belle.errors import UsageError
from gptq_belle.kernels.triton_config import MAX_SKINNY_ROWS
from gptq_belle.models.belle_catalogue import CONFIGS
from gptq_belle.models.dimensions import LinearShape, dimensions
from gptq_belle.models.sizes import UNPACKED, MemorySettings

BELLE, LLAMA = dimensions(CONFIGS["belle-7b"]), dimensions(CONFIGS["llama-7b"])
PACKED = MemorySettings(bits=4, head_bits=8)
GIB = 1 << 30


def step(d=BELLE, settings=PACKED, gpu="H200", rows=1, length=512):
    return step_time(d, settings, gpu_named(gpu), rows, length)


def test_launches_are_five_per_block_and_two():
    assert step().launches == 5 * 30 + 2
    assert [part.name for part in step().parts] == ["embedding", "qkv", "attention", "out", "up", "down", "lm_head"]
    assert step(LLAMA).launches == 5 * 32 + 2
    assert fused_linears(LLAMA) == {"qkv": (4096, 12288), "out": (4096, 4096), "gate_up": (4096, 22016),
                                    "down": (11008, 4096)}


def test_bytes_equal_hand_computation():
    weights = 30 * (4096 * 12288 + 4096 * 4096 + 2 * 4096 * 16384) * (0.5 + 2 / 128)
    head, cache = 250880 * 4096 * (1 + 2 / 128), 30 * 2 * 4096 * 2 * 512
    assert step().bytes == pytest.approx(weights + head + cache, rel=0.001)
    assert step(rows=3).bytes - step().bytes == 2 * cache
    assert step(settings=MemorySettings(bits=4, head_bits=8, cache="int8")).bytes == step().bytes - cache / 2 + (
        30 * 2 * 32 * 2 * 512)


def test_times_add_up():
    found = step(gpu="RTX 4090", rows=4)
    assert found.seconds == pytest.approx(sum(part.launches * part.seconds for part in found.parts))
    assert found.tokens_per_second == pytest.approx(4 / found.seconds)
    assert found.memory_seconds == pytest.approx(found.bytes / (1.008e12 * 0.91))
    assert found.share == pytest.approx(found.tokens_per_second / found.limit_tokens_per_second)


def test_belle_7b_reaches_the_stated_share_of_the_memory_limit():
    """On an H200 with programmatic dependent launch, as README.md says."""
    assert 0.85 <= step(gpu="RTX 4090").share < 1
    assert 0.75 <= step(gpu="H200").with_dependent_launch().share < 1


def test_dependent_launch_shortens_every_launch_of_a_gpu_that_has_it():
    before, after = step(), step().with_dependent_launch()
    assert before.seconds - after.seconds == pytest.approx(before.launches * (before.gpu.launch - 1.2e-6))
    assert after.launches == before.launches
    assert step(gpu="RTX 4090").with_dependent_launch() is None


@pytest.mark.parametrize("gpu", GPUS)
def test_int8_cache_is_faster_at_long_contexts(gpu):
    """Unpacking takes twice as many instructions per number: there must be enough programs to hide them."""
    def attention(cache, rows, length):
        return launch_time.attention_seconds(gpu_named(gpu), BELLE, cache, rows, length)

    for rows, length in ((1, 2048), (8, 1024)):
        assert attention("float16", rows, length) > 1.4 * attention("int8", rows, length)


def test_attention_is_modelled_as_it_is_launched():
    attention = pytest.importorskip("gptq_belle.kernels.triton_attention", exc_type=ImportError)
    assert (launch_time.PIECE, launch_time.STEP) == (attention.PIECE, attention.STEP)
    options = attention.COMPILED
    assert (options["num_warps"], options["num_stages"]) == (launch_time.WARPS, launch_time.AHEAD + 1)


def test_x_of_many_rows_is_read_from_the_l2_cache():
    gpu = gpu_named("H200")
    shape = LinearShape(16384, 4096)
    slow = gpu._replace(l2_bandwidth=gpu.l2_bandwidth / 4)
    seconds = launch_time.product_seconds(slow, shape, 4, 128, 8)
    assert seconds > 3 * launch_time.product_seconds(gpu, shape, 4, 128, 8)
    assert seconds > 1.5 * launch_time.product_seconds(slow, shape, 4, 128, 1)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("d", [BELLE, LLAMA], ids=lambda d: d.model_type)
def test_no_step_is_faster_than_the_memory_limit(gpu, d):
    for rows in (1, 2, 8, 9, 32, MAX_SKINNY_ROWS):
        for settings in (PACKED, MemorySettings(bits=8, head_bits=UNPACKED), MemorySettings(bits=3, group_size=32)):
            found = step(d, settings, gpu, rows)
            assert 0.3 < found.share < 1
            assert all(part.seconds > part.bytes / found.gpu.copy_bandwidth for part in found.parts)


def test_times_respond_to_their_causes():
    base = step()
    gpu = gpu_named("H200")
    assert step(length=2000).seconds > base.seconds
    assert step(rows=2).seconds > base.seconds
    assert step(settings=MemorySettings(bits=4, head_bits=UNPACKED)).seconds > base.seconds
    slow = step_time(BELLE, PACKED, gpu._replace(launch=2 * gpu.launch), 1, 512)
    assert slow.seconds - base.seconds == pytest.approx(base.launches * gpu.launch)
    assert step_time(BELLE, PACKED, gpu._replace(clock=gpu.clock / 8), 1, 512).seconds > 1.5 * base.seconds
    assert step_time(BELLE, PACKED, gpu._replace(latency=10 * gpu.latency), 1, 512).seconds > 1.5 * base.seconds


@pytest.mark.parametrize(("settings", "rows"), [(MemorySettings(bits=UNPACKED), 1), (PACKED, MAX_SKINNY_ROWS + 1)])
def test_cases_without_a_model_are_refused(settings, rows):
    with pytest.raises(UsageError):
        step(settings=settings, rows=rows)
    assert plan(CONFIGS["belle-7b"], GIB, batch=rows, bits=(settings.bits,), gpu=gpu_named("H200"))[0].step is None


def test_gpus_are_found_by_short_names():
    assert gpu_named("4090") == gpu_named("rtx4090") == GPUS["RTX 4090"]
    with pytest.raises(UsageError, match="H200"):
        gpu_named("9090")


def test_plan_command_shows_speeds(capsys):
    def call(*args):
        with pytest.raises(SystemExit) as left:
            console.run(app.app, ["plan", "belle-7b", "--memory", "24GB", "--context", "512", *args])
        return left.value.code or 0, capsys.readouterr().out

    code, out = call("--gpu", "H200", "--json")
    assert code == 0
    rows = {(row["bits"], row["head_bits"]): row for row in json.loads(out)["rows"]}
    assert rows[4, 8]["device"] == "cuda"
    assert rows[4, 8]["step"]["tokens_per_second"] == pytest.approx(step().tokens_per_second)
    assert rows[4, 8]["step"]["dependent_launch_tokens_per_second"] > 1.05 * step().tokens_per_second
    assert rows[UNPACKED, 8]["step"] is None
    assert json.loads(out)["assumptions"] == step_time_assumptions(gpu_named("H200"))
    code, out = call("--gpu", "H200")
    assert code == 0
    assert f"{step().tokens_per_second:,.0f}" in out
    assert call("--gpu", "9090")[0] == 2
    assert json.loads(call("--device", "cpu", "--json")[1])["rows"][0]["step"] is None


def test_loaded_model_is_modelled_with_its_settings(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(Model, "unfused_reason", lambda model, rows: None)  # as on a GPU
    model = load(packed_checkpoint(tiny_llama, tmp_path / "packed", group_size=64), device="cpu", cache="int8")
    settings = MemorySettings(bits=4, head_bits=UNPACKED, group_size=64, cache="int8")
    gpu = gpu_named("3060")
    assert modelled_step(model, gpu, 2, 100) == step(model.decoder_config.dimensions, settings, "3060", 2, 100)
    assert modelled_step(model, gpu, MAX_SKINNY_ROWS + 1, 100) is None
    assert modelled_step(load(tiny_llama, device="cpu"), gpu, 1, 100) is None


def test_gpu_of_this_machine_has_measured_bandwidth(monkeypatch):
    found = SimpleNamespace(name="NVIDIA GeForce RTX 4090", major=8, minor=9, multi_processor_count=114)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    gpu = this_gpu(torch.device("cuda", 0), 9e11)
    assert (gpu.capability, gpu.processors, gpu.copy_bandwidth) == (89, 114, 9e11)
    assert gpu.clock == GPUS["RTX 4090"].clock
    found.name, found.major, found.minor = "NVIDIA GeForce RTX 5090", 12, 0
    assert this_gpu(torch.device("cuda", 0), 1.5e12).capability == 120


def test_model_needs_no_device():
    """Calculating a plan does not initialize CUDA."""
    code = ("from gptq_belle.bench import gpus, step_time; import torch; "
            "assert not torch.cuda.is_initialized(); print(step_time.assumptions(gpus.GPUS['H200']))")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
