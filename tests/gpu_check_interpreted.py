"""Steps of benchmarks/gpu_check in Triton's interpreter: what is wrong is found, what is right passes.

`test_gpu_check.py` runs this file in a separate process: TRITON_INTERPRET must be set before Triton is imported.
"""

import bfloat16_interpreter
import pytest
import torch
from conftest import packed_checkpoint
from gpu_check import (
    attention_checks,
    correctness,
    decode_steps,
    folded_checks,
    head_checks,
    matmul,
    peers,
    setting,
    solver,
    solver_checks,
    tuning,
)
from gpu_check.agreement import WrongProduct
from gpu_check.correctness import ProductCheck

from gptq_belle.bench import cuda_timing, kernel_tuning
from gptq_belle.common.timers import spread
from gptq_belle.kernels import triton_gptq, triton_matmul
from gptq_belle.kernels.triton_config import LaunchPlan, MatmulProblem, TileConfig

bfloat16_interpreter.teach()
TOY = setting.setting_of(toy=True)
SMALL = TOY._replace(sizes=TOY.sizes._replace(checked=(128, 32)))
PLAN = LaunchPlan("skinny", TileConfig(8, 64, 128, 1, 4, 4))
CHECKS = (
    ProductCheck(4, 128, True, False, torch.float16, 1, False),
    ProductCheck(3, 64, True, True, torch.float16, 11, True),
    ProductCheck(8, 32, False, True, torch.bfloat16, 65, True),
    ProductCheck(4, 128, False, True, torch.float32, 5, True),
    ProductCheck(2, 128, True, False, torch.float16, 9, False, LaunchPlan("skinny", TileConfig(16, 128, 64, 2, 4, 4))))


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.setattr(cuda_timing, "device_seconds", setting.wall_seconds)
    monkeypatch.setattr(cuda_timing, "operand_copies", lambda size, device, most=64: 2)


@pytest.fixture
def wrong_by_one_percent(monkeypatch):
    product = triton_matmul.quant_matmul
    monkeypatch.setattr(triton_matmul, "quant_matmul", lambda *args, **kwargs: product(*args, **kwargs) * 1.01)


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_right_product(check):
    error = correctness.check_product(TOY, check)["error"]
    assert 0 < error < correctness.AGREEMENT[check.dtype]


@pytest.mark.usefixtures("wrong_by_one_percent")
def test_wrong_product():
    with pytest.raises(WrongProduct):
        correctness.check_product(TOY, CHECKS[0])


def test_configuration_that_exceeds_the_gpu(monkeypatch):
    class OutOfResources(Exception):
        pass

    def refuse(*args, **kwargs):
        raise OutOfResources

    monkeypatch.setattr(triton_matmul, "quant_matmul", refuse)
    assert correctness.check_product(TOY, CHECKS[0]) == {"too_large": True}


@pytest.mark.parametrize("gated", [False, True])
def test_folded_norms_and_activations(gated, monkeypatch):
    one = folded_checks.Block(gated, torch.float16, TileConfig(8, 32, 128, 2, 4, 4), False)
    assert 0 < folded_checks.check_block(SMALL, one)["error"] < 4e-3
    run = folded_checks.run_block(SMALL, one, SMALL.device)
    run["hidden"] *= 1.02
    monkeypatch.setattr(folded_checks, "run_block", lambda *args: run)
    with pytest.raises(WrongProduct):
        folded_checks.check_block(SMALL, one)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("bloom", [False, True])
def test_ends_of_a_decode_step(bloom, sampled, monkeypatch):
    one = head_checks.Ends(bloom, torch.float16, sampled, False)
    assert 0 < head_checks.check(SMALL, one)["error"] < 4e-3
    run = head_checks.run(SMALL, one, SMALL.device)
    run["tokens"][3] = run["logits"][3].argmin()
    monkeypatch.setattr(head_checks, "run", lambda *args: run)
    with pytest.raises(WrongProduct):
        head_checks.check(SMALL, one)


@pytest.mark.parametrize("kind", ["float16", "int8"])
@pytest.mark.parametrize("bloom", [False, True])
def test_decode_attention(bloom, kind, monkeypatch):
    one = attention_checks.Attention(2, 2, 64, bloom, kind, torch.float16, (3, -1, 20), False)
    assert 0 < attention_checks.check_attention(SMALL, one)["error"] < 1e-3
    run = attention_checks.run_attention(one, SMALL.device)
    run["out"][2] *= 1.01
    monkeypatch.setattr(attention_checks, "run_attention", lambda *args: run)
    with pytest.raises(WrongProduct):
        attention_checks.check_attention(SMALL, one)


@pytest.mark.parametrize(("group", "sym"), [(128, True), (-1, False)])
def test_right_solver(group, sym):
    assert solver_checks.check_solver(SMALL, group, sym)["equal_codes"] > 0.9995


def test_wrong_solver(monkeypatch):
    solve = triton_gptq.solve_block

    def careless(W, Hinv, codes, *others, **options):
        solve(W, Hinv, codes, *others, **options)
        codes[0] ^= 1

    monkeypatch.setattr(triton_gptq, "solve_block", careless)
    with pytest.raises(WrongProduct):
        solver_checks.check_solver(SMALL, 128, True)


def test_descent(monkeypatch):
    assert solver_checks.check_descent(SMALL)["equal_codes"] > 0.9995
    monkeypatch.setattr(triton_gptq, "descend", lambda code, *others: code.zero_())
    with pytest.raises(WrongProduct):
        solver_checks.check_descent(SMALL)


def test_solver_is_timed_with_and_without_the_kernel():
    line = solver.measure(TOY, (128, 32))
    assert line["same_codes"] > 0.99
    assert line["times_torch"] == pytest.approx(line["torch_seconds"] / line["seconds"])


def test_variants_of_a_product():
    found = [matmul.measure(TOY, (128, 128), variant) for variant in ("ours, 4 bits", "ours, 8 bits", peers.CUBLAS)]
    assert [one["bytes"] for one in found] == [128 * 64 + 256, 128 * 128 + 256, 128 * 128 * 2]
    assert all(line["seconds"] > 0 for one in found for line in one["lines"])


def test_wrong_variant(monkeypatch):
    wrong = peers.Peer(lambda codes, scales: lambda x: x[:, : codes.shape[1]], torch.float16, 4)
    monkeypatch.setitem(matmul.PEERS, peers.CUBLAS, wrong)
    with pytest.raises(WrongProduct):
        matmul.measure(TOY, (128, 128), peers.CUBLAS)


def test_bits_in_a_byte_of_torch_int4():
    """The order of two codes in a byte, read back by plain arithmetic."""
    codes = torch.randint(0, 16, (64, 8), dtype=torch.uint8)
    packed = peers.nibbles(codes)
    assert torch.equal(torch.stack([packed >> 4, packed & 15], -1).flatten(1), codes.t())


@pytest.mark.parametrize(("variants", "cache"), [(decode_steps.PLAIN, "int8"), (decode_steps.DEPENDENT, "float16")])
def test_variants_of_decode_steps(variants, cache, tiny_bloom, tmp_path):
    path = packed_checkpoint(tiny_bloom, tmp_path / "packed")
    found = decode_steps.compare(TOY, path, cache, 1, 3, variants)
    assert [one["graph"] for one in found["variants"]] == [variant.graph for variant in variants]
    assert all(one["tps"]["median"] > 0 for one in found["variants"])
    assert 0 < found["modelled_tps"] < found["modelled_dependent_launch_tps"] < found["limit_tps"]


def test_timed_plan(monkeypatch):
    problem = MatmulProblem(8, 128, 128, 4, 128, "float16")
    assert 0 < tuning.time_plan(TOY, problem, PLAN) < float("inf")
    monkeypatch.setattr(cuda_timing, "device_seconds", lambda actions: spread([2.0]))
    assert tuning.time_plan(TOY, problem, PLAN) == 2.0


def test_wrong_plan_is_not_timed(monkeypatch):
    problem = MatmulProblem(8, 128, 256, 4, 128, "float16")
    tuning.time_plan(TOY, problem, PLAN)
    product = triton_matmul.quant_matmul
    monkeypatch.setattr(triton_matmul, "quant_matmul", lambda *args, **kwargs: product(*args, **kwargs) * 1.01)
    with pytest.raises(kernel_tuning.GptqBelleError):
        tuning.time_plan(TOY, problem, PLAN)
