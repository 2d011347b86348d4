"""Triton without a GPU: the layout, the choice of a kernel, and the kernels themselves in the interpreter."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from oracle_format import formula, random_words

from gptq_belle.engine.linear import QuantLinear
from gptq_belle.errors import UsageError
from gptq_belle.kernels import triton_config, triton_layout, triton_matmul
from gptq_belle.kernels.layout import checked_weight, fuse_weights
from gptq_belle.kernels.reference import dequantize
from gptq_belle.kernels.triton_config import ROW_BUCKETS, LaunchPlan, MatmulProblem, TileConfig

TESTS = Path(__file__).parent
CUDA = torch.device("cuda", 0)
IN_ORDER = torch.arange(256) // 128
CASE = MatmulProblem(16, 4096, 4096, 4, 128, "float16")


def laid_out(words, bits):
    return triton_layout.prepare(checked_weight(**words, bits=bits, zero_offset=1))


def newest_interpreter() -> bool:
    """Triton 3.6's interpreter fails under NumPy 2.4 (its scalars are arrays of one element); 3.9's does not."""
    return find_spec("triton") is not None and tuple(map(int, version("triton").split(".")[:2])) >= (3, 9)


@pytest.mark.skipif(not newest_interpreter(), reason="needs triton 3.9 or newer")
def test_the_kernels_in_the_interpreter():
    run = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "triton_interpreted.py"], cwd=TESTS,
                         env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_words_of_4_bits():
    """Word i of a block holds the codes of inputs i, 32 + i, 64 + i, 96 + i, from the lowest nibble up."""
    codes = torch.zeros(128, 2, dtype=torch.int32)
    codes[[3, 35, 67, 99], 1] = torch.tensor([0x1, 0x2, 0x3, 0xA], dtype=torch.int32)
    words = triton_layout.pack_slices(codes, 4, 128)
    assert (words.dtype, words.shape) == (torch.int16, (1, 2, 32))
    assert words[0, 1, 3] == 0xA321 - 0x10000
    assert words.count_nonzero() == 1


def test_words_of_8_bits():
    codes = torch.zeros(256, 1, dtype=torch.int32)
    codes[[128 + 5, 128 + 64 + 5], 0] = torch.tensor([0x12, 0x34], dtype=torch.int32)
    words = triton_layout.pack_slices(codes, 8, 128)
    assert words.shape == (2, 1, 64)
    assert words[1, 0, 5] == 0x3412


@pytest.mark.parametrize(("bits", "group_size", "run", "block"), [
    (4, 32, 32, 128), (4, 64, 64, 128), (4, 128, 128, 128), (4, -1, 128, 128), (8, 32, 32, 64), (8, 64, 64, 128),
    (3, 128, 128, 128), (2, 32, 32, 128)])
def test_runs_and_blocks(bits, group_size, run, block):
    weight = laid_out(random_words(bits, 512, 32, group_size), bits)
    assert (weight.run, weight.block, weight.places) == (run, block, 512)
    assert weight.order is None
    assert weight.words.shape == (512 // block, 128, block * weight.bits // 16)
    assert weight.scales.shape == (512 // run, 128)


def test_padding_of_the_last_block_does_not_shorten_runs():
    weight = laid_out(random_words(4, 288, 8, -1), 4)
    assert (weight.run, weight.places) == (128, 384)


def test_act_order_is_sorted_once():
    words = random_words(4, 128, 8, 32, act_order=True)
    weight = laid_out(words, 4)
    assert torch.equal(weight.order, words["g_idx"].sort(stable=True).indices.int())


def test_equal_zeros_take_no_memory_and_16_is_legal():
    words = random_words(4, 128, 8, 32)
    assert laid_out(words, 4).zeros.max() == 16
    words["qzeros"].fill_(-1)
    weight = laid_out(words, 4)
    assert (weight.zeros, weight.zero) == (None, 16)


def test_fused_weights_are_the_weights_one_after_another():
    parts = [random_words(4, 64, outputs, 32) for outputs in (8, 24, 16)]
    fused = fuse_weights([checked_weight(**words, bits=4, zero_offset=1) for words in parts])
    expected = torch.cat([formula(**words, bits=4, v1=True) for words in parts])
    assert torch.equal(dequantize(fused).double().t(), expected)


@pytest.mark.parametrize(("other", "message"), [
    ({"bits": 8}, "bits of"), ({"zero_offset": 0}, "zero_offset of"), ({"act_order": True}, "g_idx"),
    ({"dtype": torch.float32}, "scales of")])
def test_weights_that_differ_are_not_fused(other, message):
    def weight(bits=4, zero_offset=1, act_order=False, dtype=torch.float16):
        words = random_words(bits, 64, 8, 32, act_order=act_order)
        return checked_weight(**words | {"scales": words["scales"].to(dtype)}, bits=bits, zero_offset=zero_offset)

    with pytest.raises(ValueError, match=message):
        fuse_weights([weight(), weight(**other)])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_state_dict_is_what_stands_on_disk(bits):
    words = random_words(bits, 96, 32, 32, act_order=True)
    layer = QuantLinear(laid_out(words, bits), torch.zeros(32))
    state = layer.state_dict()
    assert set(state) == {*words, "bias"}
    assert all(torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype for name, tensor in words.items())
    with pytest.raises(UsageError, match="laid out for cpu"):
        layer.to("meta")


@pytest.fixture
def a_gpu(monkeypatch):
    """As on a machine with an H100 and everything installed."""
    monkeypatch.setattr(triton_matmul, "unavailable_reason", lambda device: None)


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(("g_idx", "device", "dtype", "reason"), [
    (IN_ORDER, CUDA, torch.float16, None),
    (torch.arange(256) % 2, CUDA, torch.bfloat16, None),
    (torch.arange(256) // 8, CUDA, torch.float16, "fill runs of 32"),
    (IN_ORDER, CUDA, torch.float32, "not torch.float32"),
    (IN_ORDER, torch.device("cpu"), torch.float16, "not cpu"),
])
def test_refusal(g_idx, device, dtype, reason):
    found = triton_matmul.unsupported_reason(g_idx, device, dtype)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(("missing", "reason"), [("find_spec", "not installed"), ("c_compiler", "C compiler")])
def test_what_is_missing_is_said(monkeypatch, missing, reason):
    if missing != "find_spec":
        monkeypatch.setattr(triton_matmul, "find_spec", lambda name: name)
    monkeypatch.setattr(triton_matmul, missing, lambda *_: None)
    assert reason in triton_matmul.unavailable_reason.__wrapped__(CUDA)


@pytest.mark.parametrize(("rows", "most"), [(1, 8), (8, 8), (9, 16), (64, 64), (65, 128), (2048, 2048), (10**6, 2048)])
def test_bucket(rows, most):
    assert triton_config.row_bucket(rows) == most


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 120])
@pytest.mark.parametrize("rows", ROW_BUCKETS)
@pytest.mark.parametrize(("outputs", "inputs"), [(4096, 4096), (11008, 4096), (4096, 11008), (250880, 4096), (8, 128)])
def test_the_rule_fills_the_device(arch, rows, outputs, inputs):
    kernel, config = triton_config.default_plan(MatmulProblem(rows, outputs, inputs, 4, 128, "float16"), arch, 108)
    assert kernel == ("skinny" if rows <= 64 else "expand" if rows >= 1024 and arch in (80, 90) else "gemm")
    if config is None:
        return
    tiles = -(-rows // config.BM) * -(-outputs // config.BN)
    blocks = inputs // 128
    assert tiles * config.SPLIT_K >= 2 * 108 or config.SPLIT_K == 16 or blocks < 8 * config.SPLIT_K


def test_a_table_goes_before_the_rule(tmp_path, monkeypatch):
    config = TileConfig(16, 128, 128, 2, 4, 5)
    entry = CASE._asdict() | {"kernel": "skinny", "config": config._asdict()}
    (tmp_path / "sm_86.json").write_text(json.dumps({"entries": [entry]}), encoding="utf-8")
    monkeypatch.setenv("GPTQ_BELLE_TUNING", str(tmp_path))
    triton_config.tuned_plans.cache_clear()
    assert triton_config.tuned_plans(86) == {CASE: LaunchPlan("skinny", config)}
    plan = triton_config.launch_plan.__wrapped__
    assert plan(CASE, 86, 82) == LaunchPlan("skinny", config)
    assert plan(CASE._replace(run=64), 86, 82) == triton_config.default_plan(CASE._replace(run=64), 86, 82)
    (tmp_path / "sm_86.json").write_text(json.dumps({"entries": [entry | {"kernel": "fast"}]}), encoding="utf-8")
    triton_config.tuned_plans.cache_clear()
    with pytest.raises(ValueError, match=r"sm_86.json is not a table of tuned kernels.*'fast'"):
        triton_config.tuned_plans(86)
    triton_config.tuned_plans.cache_clear()
