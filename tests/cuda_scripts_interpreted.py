"""The GPU benchmarks on a CPU with tiny shapes and interpreted kernels, without CUDA's clocks and graphs.

`test_cuda_scripts.py` runs this file in a separate process, because TRITON_INTERPRET must be set before Triton is
imported.
"""

import json
import sys
import time
from types import SimpleNamespace

import bench_matmul_cuda
import bench_solver_cuda
import bfloat16_interpreter
import check_cuda
import cuda_common
import pytest
import torch
import tune_cuda

from gptq_belle.bench import cuda_timing, kernel_tuning
from gptq_belle.common.timers import spread
from gptq_belle.kernels import triton_config, triton_matmul
from gptq_belle.kernels.triton_config import LaunchPlan, TileConfig

bfloat16_interpreter.teach()
CPU = torch.device("cpu")


def wall_seconds(actions, repeats=1):
    start = time.perf_counter()
    for action in actions:
        action()
    return spread([(time.perf_counter() - start) / len(actions)])


@pytest.fixture(autouse=True)
def _pretended_gpu(monkeypatch):
    properties = SimpleNamespace(name="pretended", major=8, minor=6, multi_processor_count=2, total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
    monkeypatch.setattr(cuda_timing, "device_seconds", wall_seconds)
    monkeypatch.setattr(cuda_timing, "operand_copies", lambda size, device, most=64: 2)
    monkeypatch.setattr(bench_matmul_cuda, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(bench_matmul_cuda, "matrix_peak", lambda device: 1e12)
    for module in (bench_matmul_cuda, bench_solver_cuda, check_cuda, tune_cuda):
        monkeypatch.setattr(module, "require_device", lambda: CPU)


def run(module, monkeypatch, out, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, "--out", str(out), *arguments])
    module.main()


def test_matmul(monkeypatch, tmp_path):
    monkeypatch.setitem(cuda_common.SHAPES, "belle-7b", [(256, 128)])
    run(bench_matmul_cuda, monkeypatch, tmp_path, "--set", "belle-7b", "--rows", "1", "70")
    found = json.loads((tmp_path / "cuda_matmul.json").read_text())
    *lines, others = found["results"]
    assert {(line["variant"], line["rows"]) for line in lines} == {
        (name, rows) for name in ("ours, 4 bits", "ours, 8 bits", "cuBLAS float16") for rows in (1, 70)}
    for line in lines:
        base = next(one for one in lines if one["variant"] == "cuBLAS float16" and one["rows"] == line["rows"])
        assert line["times_cublas"] == pytest.approx(base["seconds"] / line["seconds"])
        assert line["share_of_copy"] == pytest.approx(line["bytes"] / line["seconds"] / 1e9)
        assert line["share_of_peak"] == pytest.approx(2 * line["rows"] * 256 * 128 / line["seconds"] / 1e12)
    assert [line["bytes"] for line in lines[:3]] == [256 * 128 // 2 + 512, 256 * 128 + 512, 256 * 128 * 2]
    assert "No module named" in others["left_out"]["gemlite"]
    few, middle, many, _ = found["goals"]
    assert few["worst"] == next(line["share_of_copy"] for line in lines if line["rows"] == 1 and "4" in line["variant"])
    assert not few["reached"]
    assert middle["reached"] is many["reached"] is None
    assert "ours, 4 bits" in (tmp_path / "cuda_matmul.txt").read_text()


def test_wrong_product_is_not_timed():
    wrong = bench_matmul_cuda.CudaVariant(lambda: lambda x: x + 1, torch.float16, 10, CPU)
    x = torch.ones(2, 2)
    assert wrong.seconds(x, x) is None
    assert "wrong result" in wrong.reason
    right = bench_matmul_cuda.CudaVariant(lambda: lambda x: x, torch.float16, 10, CPU)
    assert right.seconds(x, x)["seconds"] > 0


def test_bits_in_a_byte_of_torch_int4():
    """The order of two codes in a byte, read back by plain arithmetic."""
    codes = torch.randint(0, 16, (64, 8), dtype=torch.uint8)
    across = codes.t()
    packed = across[:, ::2] << 4 | across[:, 1::2]
    assert torch.equal(torch.stack([packed >> 4, packed & 15], -1).flatten(1), across)


SOME = [check_cuda.ProductCheck(bits, group, sym, act_order, dtype, rows, bias, plan) for
        bits, group, sym, act_order, dtype, rows, bias, plan in (
            (4, 128, True, False, torch.float16, 1, False, None), (3, 64, True, True, torch.float16, 11, True, None),
            (8, 32, False, True, torch.bfloat16, 65, True, None), (4, 128, False, True, torch.float32, 5, True, None),
            (2, 128, True, False, torch.float16, 9, False, LaunchPlan("skinny", TileConfig(16, 128, 64, 2, 4, 4))))]


def test_correctness(monkeypatch, tmp_path):
    monkeypatch.setattr(check_cuda, "formats", lambda: iter(SOME))
    monkeypatch.setattr(check_cuda, "configs", lambda arch, processors: iter(()))
    with pytest.raises(SystemExit) as left:
        run(check_cuda, monkeypatch, tmp_path)
    found = json.loads((tmp_path / "cuda_check.json").read_text())
    assert (left.value.code, found["wrong"], found["checked"]) == (0, [], len(SOME))
    assert 0 < found["largest_errors"]["float16"] < 1e-3


def test_wrong_kernel_is_detected(monkeypatch, tmp_path):
    product = triton_matmul.quant_matmul
    monkeypatch.setattr(triton_matmul, "quant_matmul", lambda *args, **kwargs: product(*args, **kwargs) * 1.01)
    monkeypatch.setattr(check_cuda, "formats", lambda: iter(SOME[:1]))
    monkeypatch.setattr(check_cuda, "configs", lambda arch, processors: iter(()))
    with pytest.raises(SystemExit) as left:
        run(check_cuda, monkeypatch, tmp_path)
    assert left.value.code == 1
    assert "relative error" in json.loads((tmp_path / "cuda_check.json").read_text())["wrong"][0]


def test_checks_cover_every_kernel_and_format():
    every, plans = list(check_cuda.formats()), list(check_cuda.configs(90, 132))
    assert {(p.bits, p.group, p.dtype) for p in every} >= {
        (bits, group, dtype) for bits in (2, 3, 4, 8) for group in (32, 64, 128)
        for dtype in (torch.float16, torch.bfloat16)}
    assert {p.plan.kernel for p in plans} == set(triton_config.KERNELS)
    for name, values in kernel_tuning.VARIED.items():
        assert {getattr(p.plan.config, name) for p in plans if p.plan.config} >= set(values)


def test_tuning(monkeypatch, tmp_path):
    for name in cuda_common.SHAPES:
        monkeypatch.setitem(cuda_common.SHAPES, name, [(256, 128)])
    monkeypatch.setattr(kernel_tuning, "VARIED", {"SPLIT_K": (1, 2), "num_warps": (4, 8)})
    run(tune_cuda, monkeypatch, tmp_path, "--rows", "8")
    [entry] = json.loads((tmp_path / "sm_80.json").read_text())["entries"]
    assert (entry["rows"], entry["inputs"], entry["outputs"], entry["bits"]) == (8, 256, 128, 4)


def test_timer_raises_for_wrong_products(monkeypatch):
    weight = cuda_common.random_weight(256, 128, 4, CPU)
    timer = kernel_tuning.device_timer(triton_matmul.problem_of(weight, 8, torch.float16), [weight])
    assert timer(LaunchPlan("skinny", TileConfig(8, 64, 128, 1, 4, 4))) > 0
    product = triton_matmul.quant_matmul
    monkeypatch.setattr(triton_matmul, "quant_matmul", lambda *args, **kwargs: product(*args, **kwargs) * 1.01)
    with pytest.raises(kernel_tuning.GptqBelleError, match="relative error"):
        timer(LaunchPlan("skinny", TileConfig(8, 64, 128, 1, 4, 4)))


def test_solver(monkeypatch, tmp_path):
    from gptq_belle.kernels import triton_gptq

    monkeypatch.setattr(bench_solver_cuda, "LAYERS", ((128, 40),))
    monkeypatch.setattr(bench_solver_cuda.grid, "fused_kernels", lambda tensor: triton_gptq)
    run(bench_solver_cuda, monkeypatch, tmp_path)
    [line] = json.loads((tmp_path / "cuda_solver.json").read_text())["results"]
    assert line["same_codes"] > 0.99
    assert line["times_torch"] == pytest.approx(line["torch_seconds"] / line["seconds"])
